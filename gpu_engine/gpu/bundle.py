"""Bundles: a model with the machine code of all its GPU kernels, built where there is no GPU.

A bundle is a ZIP file that holds the model, a manifest in JSON and one CUBIN for each kernel and architecture. Loading
it reads data and runs none of it as Python: the model is imported and lowered as ever, and its kernels, known by the
digest of their text, are looked up instead of compiled. So neither Triton nor torch is needed there.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TypeGuard

from gpu_engine.errors import DeviceError, InvalidModel
from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.kernel import Kernel

FORMAT = 2
MANIFEST, MODEL = "manifest.json", "model.onnx"
SUFFIX = ".bundle"
LARGEST_MANIFEST = 64 << 20
DIGEST_NBYTES = 64


@dataclass(frozen=True)
class Entry:
    """One kernel's binary in the manifest: the fields of `Binary`, its code in the member `cubin`."""

    kernel: str
    digest: str
    entry: str
    arch: int
    cubin: str
    threads: int
    shared_nbytes: int
    scratch_nbytes: int
    parameters: tuple[int, ...]
    scratch_parameter: int | None


@dataclass(frozen=True)
class Bundle:
    """What a bundle's manifest says, verified; `path` is the file."""

    path: Path
    engine: str
    precision: str
    architectures: tuple[int, ...]
    entries: tuple[Entry, ...]

    def model(self) -> bytes:
        """The ONNX model."""
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(MODEL)

    def binary(self, kernel: Kernel, arch: int) -> Binary:
        """The kernel's machine code; DeviceError where the bundle lacks the architecture or the kernel."""
        if arch not in self.architectures:
            built = ", ".join(f"sm_{known}" for known in self.architectures)
            raise DeviceError(f"{self.path} is built for {built}, and the GPU is sm_{arch}: build it for that as well")
        found = next((e for e in self.entries if e.digest == kernel.digest and e.arch == arch), None)
        if found is None:
            raise DeviceError(f"{self.path} lacks kernel {kernel.name} ({kernel.digest}): build it anew")
        with zipfile.ZipFile(self.path) as archive:
            cubin = archive.read(found.cubin)
        return Binary(
            found.entry, arch, cubin, found.threads, found.shared_nbytes, found.scratch_nbytes, found.parameters,
            found.scratch_parameter,
        )  # fmt: skip


def is_bundle(source: object) -> TypeGuard[str | Path]:
    """Whether a model source is the path of a bundle: by its name, since an ONNX file may begin with any bytes."""
    return isinstance(source, str | Path) and Path(source).suffix == SUFFIX


def write_bundle(
    path: Path,
    model: bytes,
    binaries: Mapping[tuple[Kernel, int], Binary],
    architectures: Sequence[int],
    precision: str,
) -> Bundle:
    """Write a model with its kernels compiled by (kernel, architecture)."""
    members: dict[str, bytes] = {MODEL: model}
    entries = []
    for (kernel, arch), made in binaries.items():
        member = f"kernels/{kernel.name}-{kernel.digest}.sm_{arch}.cubin"
        members[member] = made.cubin
        entries.append(
            Entry(
                kernel.name, kernel.digest, made.entry, arch, member, made.threads, made.shared_nbytes,
                made.scratch_nbytes, made.parameters, made.scratch_parameter,
            )
        )  # fmt: skip
    manifest = {
        "format": FORMAT,
        "engine": version("gpu-engine"),
        "precision": precision,
        "architectures": list(architectures),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
        "kernels": [asdict(entry) for entry in entries],
    }
    write_members(path, {MANIFEST: json.dumps(manifest, indent=1).encode(), **members})
    return read_bundle(path)


def write_members(path: Path, members: Mapping[str, bytes]) -> None:
    """A ZIP file whose comment, its last bytes, is the digest of all others: against damage, not against forgery."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data, zipfile.ZIP_STORED if name == MODEL else zipfile.ZIP_DEFLATED)
        archive.comment = b"0" * DIGEST_NBYTES
    with path.open("r+b") as file:
        digest = _digest(file)
        file.seek(-DIGEST_NBYTES, os.SEEK_END)
        file.write(digest)


def _digest(file: IO[bytes]) -> bytes:
    """Of everything but the digest."""
    whole, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - DIGEST_NBYTES
    file.seek(0)
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        whole.update(piece)
        left -= len(piece)
    return whole.hexdigest().encode()


def _check_digest(path: str | Path) -> None:
    with open(path, "rb") as file:
        expected = _digest(file)
        if file.read() != expected:
            raise ValueError("its bytes are not those that were written")


def read_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check all of it: InvalidModel if anything in it is not as it was written, DeviceError if this
    version of the engine cannot use it."""
    try:
        _check_digest(path)
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(archive)
            _check_members(path, archive, manifest["sha256"])
    except FileNotFoundError:
        raise
    except DeviceError as error:
        raise DeviceError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InvalidModel(f"{path} is damaged or no bundle: {error}") from error
    entries = tuple(Entry(**{**row, "parameters": tuple(row["parameters"])}) for row in manifest["kernels"])
    return Bundle(
        Path(path), manifest["engine"], manifest["precision"], tuple(manifest["architectures"]), entries
    )  # fmt: skip


def _manifest(archive: zipfile.ZipFile) -> Mapping[str, Any]:
    if archive.getinfo(MANIFEST).file_size > LARGEST_MANIFEST:
        raise ValueError("its manifest is too long")
    manifest: Mapping[str, Any] = json.loads(archive.read(MANIFEST))
    if manifest["format"] != FORMAT:
        raise DeviceError(f"it has format {manifest['format']}, and this version reads format {FORMAT}")
    if manifest["engine"] != version("gpu-engine"):
        raise DeviceError(
            f"it was built by gpu-engine {manifest['engine']}, and this is {version('gpu-engine')}: build it anew"
        )
    return manifest


def _check_members(path: str | Path, archive: zipfile.ZipFile, expected: Mapping[str, str]) -> None:
    wrong = _differing(archive, expected)
    missing = set(expected) ^ (set(archive.namelist()) - {MANIFEST})
    if wrong or missing:
        raise ValueError(f"members that are not as they were written: {', '.join(sorted({*wrong, *missing}))}")


def _differing(archive: zipfile.ZipFile, expected: Mapping[str, str]) -> Iterable[str]:
    present = set(archive.namelist())
    return [
        name
        for name, digest in expected.items()
        if name in present and hashlib.sha256(archive.read(name)).hexdigest() != digest
    ]

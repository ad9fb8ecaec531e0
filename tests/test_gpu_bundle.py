"""Bundles: what a build writes, what loading checks, and what each kind of damage is told as."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.errors import DeviceError, InvalidModel
from gpu_engine.gpu import bundle
from gpu_engine.gpu.bundle import Bundle, read_bundle
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import gpu_plan, kernels_of
from gpu_engine.passes.batchability import prove
from gpu_engine.tools.bundles import build, imported, parse_arch
from gpu_engine.tools.cli import app
from tests.test_control import model_of
from tests.test_gpu_cuda import network


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    model = folder / "network.onnx"
    model.write_bytes(network().SerializeToString())
    return build(model, folder / "network.bundle", [90], "tf32", 1, lambda *_: None)


def test_every_kernel_is_listed(built: Bundle) -> None:
    graph = imported(built.model())
    wanted = kernels_of(gpu_plan(graph, prove(graph), GpuOptions("tf32", 90)))
    assert {(entry.digest, entry.arch) for entry in built.entries} == {(kernel.digest, 90) for kernel in wanted}
    for kernel in wanted:
        found = built.binary(kernel, 90)
        assert found.cubin.startswith(b"\x7fELF") and found.entry == kernel.name


def test_a_bundle_is_a_model(built: Bundle) -> None:
    x = np.random.default_rng().standard_normal((3, 6), np.float32)
    with gpu_engine.compile(built.path, device="interpret") as ours, gpu_engine.compile(network(), device="cpu") as cpu:
        for found, expected in zip(ours.run([x]), cpu.run([x]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_another_precision_is_refused(built: Bundle) -> None:
    with pytest.raises(DeviceError, match="built for precision 'tf32', not 'fp16'"):
        gpu_engine.compile(built.path, device="interpret", precision="fp16")


def test_a_missing_architecture_is_told(built: Bundle) -> None:
    kernel = kernels_of(gpu_plan(imported(built.model()), prove(imported(built.model())), GpuOptions("tf32", 90)))[0]
    with pytest.raises(DeviceError, match="is built for sm_90, and the GPU is sm_80"):
        built.binary(kernel, 80)


def test_a_missing_kernel_is_told(built: Bundle) -> None:
    kernel = kernels_of(gpu_plan(imported(built.model()), prove(imported(built.model())), GpuOptions("tf32", 90)))[0]
    other = type(kernel)(kernel.name, kernel.text + "\n", kernel.arguments)
    with pytest.raises(DeviceError, match="lacks kernel"):
        built.binary(other, 90)


@pytest.mark.parametrize("place", (0.05, 0.3, 0.6, 0.9, 0.99))
def test_a_flipped_byte_is_told(built: Bundle, tmp_path: Path, place: float) -> None:
    data = bytearray(built.path.read_bytes())
    data[int(place * len(data))] ^= 1
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(data)
    with pytest.raises(InvalidModel, match="is damaged"):
        read_bundle(damaged)


def test_every_flipped_bit_is_told(built: Bundle, tmp_path: Path) -> None:
    data, damaged = built.path.read_bytes(), tmp_path / "damaged.bundle"
    for place in np.random.default_rng().integers(0, len(data), 200):
        changed = bytearray(data)
        changed[place] ^= 1 << int(place) % 8
        damaged.write_bytes(changed)
        with pytest.raises(InvalidModel, match="is damaged"):
            read_bundle(damaged)


def test_a_missing_end_is_told(built: Bundle, tmp_path: Path) -> None:
    (tmp_path / "short.bundle").write_bytes(built.path.read_bytes()[:-100])
    with pytest.raises(InvalidModel, match="is damaged"):
        read_bundle(tmp_path / "short.bundle")


def rewritten(built: Bundle, path: Path, more: dict[str, bytes] | None = None, **changes: object) -> Path:
    """The bundle with fields of its manifest changed, and members added, whole by its own digest."""
    with zipfile.ZipFile(built.path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    members[bundle.MANIFEST] = json.dumps({**json.loads(members[bundle.MANIFEST]), **changes}).encode()
    bundle.write_members(path, {**members, **(more or {})})
    return path


def test_a_wrong_version_is_told(built: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"built by gpu-engine 0\.0\.1, and this is"):
        read_bundle(rewritten(built, tmp_path / "old.bundle", engine="0.0.1"))
    with pytest.raises(DeviceError, match="has format 99"):
        read_bundle(rewritten(built, tmp_path / "new.bundle", format=99))


def test_a_member_that_nobody_listed_is_told(built: Bundle, tmp_path: Path) -> None:
    path = rewritten(built, tmp_path / "more.bundle", {"more.py": b"raise SystemExit"})
    with pytest.raises(InvalidModel, match=r"more\.py"):
        read_bundle(path)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty.bundle").write_bytes(b"")
    with pytest.raises(InvalidModel, match="is damaged or no bundle"):
        gpu_engine.compile(tmp_path / "empty.bundle")
    with pytest.raises(FileNotFoundError):
        gpu_engine.compile(tmp_path / "missing.bundle")


def test_the_command_takes_the_precision_of_a_configuration(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"
    (tmp_path / "model.onnx").write_bytes(model_of(text).SerializeToString())
    (tmp_path / "model.toml").write_text('precision = "bf16"\nbatch = 8\n')
    names = [str(tmp_path / name) for name in ("model.onnx", "model.toml", "model.bundle")]
    arguments = ["build", names[0], "--config", names[1], "--output", names[2], "--processes", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = read_bundle(names[2])
    assert (found.precision, found.architectures, len(found.entries)) == ("bf16", (90,), 1)


def test_names_of_architectures() -> None:
    assert [parse_arch("sm_90"), parse_arch("sm_100"), parse_arch("sm_90a")] == [90, 100, 90]
    for text in ("90", "sm90", "sm_", "sm_9000"):
        with pytest.raises(ValueError, match="written like sm_90"):
            parse_arch(text)

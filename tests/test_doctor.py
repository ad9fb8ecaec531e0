"""`gpu-engine doctor`: what is there, what is missing, the command that installs it, and the exit status."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpu_engine.errors import DeviceError
from gpu_engine.gpu.probe import DriverFacts, GpuFacts, driver_facts, pci_gpus
from gpu_engine.runtime import late
from gpu_engine.tools import doctor
from gpu_engine.tools.cli import app
from gpu_engine.tools.doctor import Finding, examine

H200 = GpuFacts("NVIDIA H200", 90, 139 << 30)


class Library:
    """libcuda, as far as it is asked."""

    def __init__(self, version: int = 13000, status: int = 0, gpus: int = 2) -> None:
        self.version, self.status, self.gpus = version, status, gpus

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, nbytes: int, device: Any) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, nbytes: Any, device: Any) -> int:
        nbytes._obj.value = 80 << 30
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:
        number._obj.value = {75: 9, 76: device.value}[attribute]
        return 0

    def cuGetErrorName(self, status: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE" if status == 100 else None
        return 0


def test_the_driver_is_asked_without_cupy() -> None:
    facts = driver_facts(lambda name: Library())
    assert facts == DriverFacts(13000, (GpuFacts("GPU 0", 90, 80 << 30), GpuFacts("GPU 1", 91, 80 << 30)))


def test_a_driver_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert driver_facts(lambda name: Library(status=100)).trouble == "the driver sees no GPU: CUDA_ERROR_NO_DEVICE"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert driver_facts(lambda name: Library(status=101)).trouble.endswith("error 101 (CUDA_VISIBLE_DEVICES is '-1')")


def test_no_driver() -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    assert driver_facts(absent).version == 0 and "libcuda" in driver_facts(absent).trouble


def test_gpus_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert pci_gpus(tmp_path) == 1 and pci_gpus(tmp_path / "nowhere") is None


def machine(
    monkeypatch: pytest.MonkeyPatch, driver: DriverFacts, packages: dict[str, str], tools: tuple[str, ...] = ()
) -> Callable[[], dict[str, Finding]]:
    """A machine with this driver, these packages and these programs; its findings by topic."""
    known = {"gpu-engine": "0.1.0", "numpy": "2.4", "onnx": "1.23", "llvmlite": "0.50"} | packages
    monkeypatch.setattr(doctor, "driver_facts", lambda: driver)
    monkeypatch.setattr(doctor, "installed_version", lambda name: known.get(name, ""))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" if name in tools else None)
    monkeypatch.setattr(doctor.nvrtc, "has_compiler", lambda: "nvidia-cuda-nvrtc" in packages)
    monkeypatch.setattr(doctor, "requires", lambda name: REQUIRED)

    def absent(*arguments: Any, **options: Any) -> Any:
        raise DeviceError("not here")

    monkeypatch.setattr(doctor, "compile", absent)
    return lambda: {each.topic: each for each in examine("cuda").findings}


REQUIRED = [
    "numpy>=2.0",
    'cupy-cuda13x>=14; extra == "cuda"',
    'nvidia-cuda-nvrtc>=13; extra == "cuda"',
    "triton>=3.6; (sys_platform == 'linux') and extra == 'cuda'",
    "cupy-cuda12x>=14; extra == 'cuda12'",
    "nvidia-cuda-nvrtc-cu12>=12.8; extra == 'cuda12'",
]


def test_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"cupy-cuda13x": "14.2", "triton": "3.6.0", "nvidia-cuda-nvrtc": "13.0"}
    found = machine(monkeypatch, DriverFacts(13020, (H200,)), packages, ("g++",))()
    assert not [each for each in found.values() if each.trouble or each.command]
    assert found["NVIDIA driver"].found == "for CUDA up to 13.2"
    assert found["cuda:0"].found == "NVIDIA H200, sm_90, 139 GiB"
    assert found["g++"].found == "/usr/bin/g++" and found["CuPy"].found == "cupy-cuda13x 14.2"


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine(monkeypatch, DriverFacts(13020, (H200,)), {"numpy": ""}, ("dnf",))()
    assert found["numpy"].command == 'python -m pip install "numpy>=2.0"'
    assert found["CuPy"].command == 'python -m pip install "cupy-cuda13x>=14"'
    assert found["NVRTC"].command == 'python -m pip install "nvidia-cuda-nvrtc>=13"'
    assert found["Triton"].command == 'python -m pip install "triton>=3.6"'
    assert found["g++"].command == "sudo dnf install gcc-c++"
    assert all(found[topic].trouble for topic in ("numpy", "CuPy", "NVRTC", "Triton", "g++"))


def test_an_older_driver_gets_what_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = DriverFacts(12040, (GpuFacts("Tesla T4", 75, 16 << 30),))
    found = machine(monkeypatch, driver, {})()
    assert found["CuPy"].command == 'python -m pip install "cupy-cuda12x>=14"'
    assert found["NVRTC"].command == 'python -m pip install "nvidia-cuda-nvrtc-cu12>=12.8"'
    assert found["cuda:0"].trouble == "too old: kernels need sm_80 or newer"
    found = machine(monkeypatch, driver, {"cupy-cuda13x": "14.2"})()
    assert found["CuPy"].trouble.startswith("the driver knows CUDA 12 only: update it")
    assert found["CuPy"].command.endswith('uninstall cupy-cuda13x && python -m pip install "cupy-cuda12x>=14"')
    assert not machine(monkeypatch, driver, {"cupy-cuda12x": "14.2"})()["CuPy"].trouble


def test_two_cupies_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"cupy-cuda13x": "14.2", "cupy-cuda12x": "14.1"}
    found = machine(monkeypatch, DriverFacts(13000, (H200,)), packages)()["CuPy"]
    assert (found.trouble, found.command) == ("more than one", "python -m pip uninstall cupy-cuda12x")


@pytest.mark.parametrize(
    ("gpus", "tools", "command"),
    [
        (0, (), ""),
        (1, (), "https://www.nvidia.com/drivers"),
        (None, ("ubuntu-drivers",), "sudo ubuntu-drivers install"),
    ],
)
def test_no_driver_with_and_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, tools: tuple[str, ...], command: str
) -> None:
    monkeypatch.setattr(doctor, "pci_gpus", lambda: gpus)
    found = machine(monkeypatch, DriverFacts(0, trouble="no NVIDIA driver"), {}, tools)()["NVIDIA driver"]
    assert found.command == command and ("has no NVIDIA GPU" in found.trouble) == (gpus == 0)


def test_the_status_says_whether_the_device_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(late.DEVICES, "cuda", "gpu_engine.no_such_room:CudaDevice")
    fine = CliRunner().invoke(app, ["doctor"])
    assert fine.exit_code == 0 and "runs on cpu" in fine.stdout and "cuda is not usable" in fine.stdout
    assert "no quota" in fine.stdout or "a quota of" in fine.stdout
    strict = CliRunner().invoke(app, ["doctor", "--device", "cuda", "--json"])
    told = json.loads(strict.stdout)
    assert (
        strict.exit_code == 1 and told["ran_on"] == "" and told["error"].startswith("DeviceError: cuda is not usable")
    )
    assert {each["topic"] for each in told["findings"]} >= {"Python", "cores", "NVIDIA driver", "CuPy", "Triton", "g++"}
    wrong = CliRunner().invoke(app, ["doctor", "--device", "tpu"])
    assert wrong.exit_code == 1 and "unknown device" in wrong.stdout


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = machine(monkeypatch, DriverFacts(0, trouble="none"), {})
    monkeypatch.setenv("GPU_ENGINE_CACHE", "off")
    assert find()["compiled kernels"].found == "not kept, as GPU_ENGINE_CACHE=off says"
    monkeypatch.delenv("GPU_ENGINE_CACHE")
    monkeypatch.setattr(doctor, "object_cache", lambda: None)
    assert find()["compiled kernels"].command == "export GPU_ENGINE_CACHE=FOLDER"

"""What is there to run models on, what is missing, and the command that installs it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

import numpy as np

from cpu_fallback.cores import free_memory, usable_cores
from cpu_fallback.native import host
from cpu_fallback.object_cache import VARIABLE, object_cache
from gpu_engine.compiler import compile
from gpu_engine.errors import GpuEngineError
from gpu_engine.gpu import nvrtc
from gpu_engine.gpu.failures import version_text
from gpu_engine.gpu.options import OLDEST_ARCH
from gpu_engine.gpu.probe import DriverFacts, driver_facts, pci_gpus
from gpu_engine.runtime.engine import Engine
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.environment import installed_version, processor

CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")
NEWEST_CUDA = 13
DRIVERS = "https://www.nvidia.com/drivers"
COMPILERS = {"apt-get": "sudo apt-get install g++", "dnf": "sudo dnf install gcc-c++", "apk": "sudo apk add g++"}


@dataclass(frozen=True)
class Finding:
    """One thing: what was found, else what is wrong, what that means, and the command, or page, that helps."""

    topic: str
    found: str = ""
    trouble: str = ""
    command: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings; where a model ran when `device` was asked for, else the `error`."""

    findings: tuple[Finding, ...]
    device: str
    ran_on: str = ""
    error: str = ""


def examine(device: str = "auto") -> Diagnosis:
    """Look at everything and run a small model on the device."""
    driver = driver_facts()
    findings = (*_software(), *_processor(), _compiler(), *_driver(driver), *_gpu_packages(driver))
    try:
        with compile(FOLDER / "digits.onnx", device=device, warmup=False) as engine:
            assert isinstance(engine, Engine), "the shapes of the demo's network are known"
            engine.run(np.zeros((1, 1, 8, 8), np.float32))
            return Diagnosis(findings, device, ran_on=engine.device)
    except (GpuEngineError, ValueError) as error:
        return Diagnosis(findings, device, error=f"{type(error).__name__}: {error}")


def _software() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("gpu-engine", "numpy", "onnx", "llvmlite"):
        found = installed_version(package)
        yield Finding(package, found) if found else _missing(package, "it is needed", "")


def _processor() -> Iterator[Finding]:
    target, cache = host(), object_cache()
    yield Finding("processor", f"{processor()}, {target.vector_nbytes * 8}-bit vectors")
    yield Finding("cores", str(usable_cores()))
    yield Finding("free memory", f"{free_memory() / (1 << 30):.1f} GiB")
    if cache is not None:
        yield Finding("compiled kernels", f"kept in {cache.folder}")
    elif os.environ.get(VARIABLE):
        yield Finding("compiled kernels", f"not kept, as {VARIABLE}={os.environ[VARIABLE]} says")
    else:
        yield Finding("compiled kernels", "", "not kept: the folder is not safe to use", f"export {VARIABLE}=FOLDER")


def _compiler() -> Finding:
    found = shutil.which("g++")
    if found:
        return Finding("g++", found)
    command = next((command for tool, command in COMPILERS.items() if shutil.which(tool)), "")
    return Finding("g++", "", 'not there: only device="interpret" wants it, for kernels in CUDA C', command)


def _driver(driver: DriverFacts) -> Iterator[Finding]:
    if not driver.version:
        gpus = pci_gpus()
        lacks = "; this machine has no NVIDIA GPU" if gpus == 0 else ""
        command = "sudo ubuntu-drivers install" if shutil.which("ubuntu-drivers") else DRIVERS
        yield Finding("NVIDIA driver", "", driver.trouble + lacks, "" if gpus == 0 else command)
        return
    yield Finding("NVIDIA driver", f"for CUDA up to {version_text(driver.version)}", driver.trouble)
    for ordinal, gpu in enumerate(driver.gpus):
        old = f"too old: kernels need sm_{OLDEST_ARCH} or newer" if gpu.arch < OLDEST_ARCH else ""
        yield Finding(f"cuda:{ordinal}", f"{gpu.name}, sm_{gpu.arch}, {gpu.nbytes / (1 << 30):.0f} GiB", old)


def _gpu_packages(driver: DriverFacts) -> Iterator[Finding]:
    """CuPy, Triton and NVRTC; those that fit the driver where there is one."""
    newest = min(driver.version // 1000 or NEWEST_CUDA, NEWEST_CUDA)
    extra, cupy = ("cuda", "cupy-cuda13x") if newest >= NEWEST_CUDA else ("cuda12", "cupy-cuda12x")
    yield _cupy(newest, extra, cupy)
    triton = installed_version("triton")
    yield Finding("Triton", triton) if triton else _missing("triton", "GPUs run bundles only", extra, "Triton")
    if nvrtc.has_compiler():
        yield Finding("NVRTC", "found")
    else:
        package = "nvidia-cuda-nvrtc" if extra == "cuda" else "nvidia-cuda-nvrtc-cu12"
        yield _missing(package, "GPUs do not run models that sort, scatter or select, but from bundles", extra, "NVRTC")


def _cupy(newest: int, extra: str, package: str) -> Finding:
    """The CuPy that is installed, if it is one and fits a driver of this CUDA."""
    found = {name: number for name in CUPY if (number := installed_version(name))}
    if not found:
        return _missing(package, "no GPU can be used", extra, "CuPy")
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    if len(found) > 1:
        unfit = " ".join(name for name in found if name != package)
        return Finding("CuPy", said, "more than one", f"python -m pip uninstall {unfit}")
    wanted = re.search(r"\d+", next(iter(found)))
    if wanted is not None and int(wanted[0]) > newest:
        name = next(iter(found))
        command = f'python -m pip uninstall {name} && python -m pip install "{_requirement(package, extra)}"'
        return Finding("CuPy", said, f"the driver knows CUDA {newest} only: update it ({DRIVERS}), or", command)
    return Finding("CuPy", said)


def _missing(package: str, meaning: str, extra: str, topic: str = "") -> Finding:
    command = f'python -m pip install "{_requirement(package, extra)}"'
    return Finding(topic or package, "", f"not installed: {meaning}", command)


def _requirement(package: str, extra: str) -> str:
    """The package with the versions that our own metadata asks for."""
    try:
        known = requires("gpu-engine") or []
    except PackageNotFoundError:
        known = []
    mark = f"extra == '{extra}'" if extra else ""
    named = [each for each in known if re.match(rf"{package}(?![\w.-])", each) and mark in each.replace('"', "'")]
    return named[0].split(";")[0].strip() if named else package

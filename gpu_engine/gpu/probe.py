"""What NVIDIA's driver says of itself and its GPUs, asked through its own library: without CuPy, for diagnoses.

https://docs.nvidia.com/cuda/cuda-driver-api/index.html
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"


@dataclass(frozen=True)
class GpuFacts:
    """A GPU: its name, 90 for sm_90, and the bytes of its memory."""

    name: str
    arch: int
    nbytes: int


@dataclass(frozen=True)
class DriverFacts:
    """The newest CUDA that the driver knows (12040 for 12.4; 0: there is no driver), the GPUs that this process sees,
    and what is wrong ("": nothing)."""

    version: int
    gpus: tuple[GpuFacts, ...] = ()
    trouble: str = ""


def driver_facts(open_library: Callable[[str], Any] = ctypes.CDLL) -> DriverFacts:
    """Ask the driver; what it refuses is the trouble."""
    try:
        library = open_library(LIBRARY)
    except OSError as error:
        return DriverFacts(0, trouble=f"no NVIDIA driver: {error}")
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    version = number.value
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(number))
    if status:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        mask = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        return DriverFacts(version, trouble=f"the driver sees no GPU: {_error_name(library, status)}{mask}")
    return DriverFacts(version, tuple(_gpu(library, ordinal) for ordinal in range(number.value)))


def pci_gpus(folder: Path = PCI) -> int | None:
    """How many NVIDIA GPUs the machine itself has; None where the system does not say."""
    if not folder.is_dir():
        return None
    return sum(_read(each / "vendor") == NVIDIA and _read(each / "class")[:4] == DISPLAY for each in folder.iterdir())


def _gpu(library: Any, ordinal: int) -> GpuFacts:
    device, number, nbytes = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), ordinal)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device)
    capability = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return GpuFacts(name.value.decode(errors="replace"), 10 * capability[0] + capability[1], nbytes.value)


def _error_name(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

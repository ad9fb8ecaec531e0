"""CUDA C to machine code: NVIDIA's run-time compiler, called from its shared library. It needs no GPU.

https://docs.nvidia.com/cuda/nvrtc/index.html
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gpu_engine.errors import DeviceError
from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.kernel import CudaKernel

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib")
"""Where wheels put the library, under a place that Python imports from."""


def compile_cuda(kernel: CudaKernel, arch: int) -> Binary:
    """The kernel's machine code for an architecture such as 90 (sm_90); DeviceError where it does not compile."""
    parameters = tuple(8 if a.is_pointer or a.type.endswith("64") else 4 for a in kernel.arguments)
    return Binary(kernel.name, arch, cubin(kernel, arch), kernel.threads, 0, 0, parameters)


def cubin(kernel: CudaKernel, arch: int) -> bytes:
    """See `compile_cuda`."""
    library, program = _library(), ctypes.c_void_p()
    text, name = kernel.text.encode(), f"{kernel.name}-{kernel.digest}.cu".encode()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        options = (f"-arch=sm_{arch}".encode(), b"--std=c++17")
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _fetched(library, program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise DeviceError(f"kernel {kernel.name} does not compile for sm_{arch}: {log}")
        return _fetched(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def has_compiler() -> bool:
    """Whether the library is there."""
    try:
        _library()
    except DeviceError:
        return False
    return True


@cache
def _library() -> Any:
    for place in _places():
        try:
            for part in sorted(Path(place).parent.glob("libnvrtc-builtins.so*")) if "/" in place else ():
                ctypes.CDLL(str(part))  # NVRTC asks for it by its name, which is found once it is loaded
            library = ctypes.CDLL(place)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise DeviceError(f"NVRTC, which compiles CUDA C, is not installed: none of {', '.join(LIBRARIES)} was found")


def _places() -> Iterator[str]:
    for name in LIBRARIES:
        yield from (str(path) for root in sys.path for folder in FOLDERS if (path := Path(root, folder, name)).exists())
        yield name


def _fetched(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: Any, status: int) -> None:
    if status:
        raise DeviceError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")

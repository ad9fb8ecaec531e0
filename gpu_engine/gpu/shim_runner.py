"""Runs CUDA C kernels on the host: their text, compiled by g++ with the headers in `shim/`.

Every thread runs as CUDA says, barriers and exchanges within a warp included, one at a time and in a fixed order. So
races between threads stay unseen, and where a kernel reads and writes is not checked.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpu_engine.errors import DeviceError, ExecutionError, GpuEngineError
from gpu_engine.gpu.kernel import CudaKernel, c_type

HEADERS = Path(__file__).parent / "shim"
FLAGS = ("-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++")
_EXCHANGES = re.compile(r"__sync|_sync\(")


class BarrierError(ExecutionError):
    """Threads wait at a barrier that others never reach: a bug of ours."""


def has_compiler() -> bool:
    """Whether kernels can run here."""
    return shutil.which("g++") is not None


def run(kernel: CudaKernel, grid: tuple[int, int, int], values: Sequence[int]) -> None:
    """Run every thread of the grid; `values` are the kernel's arguments, host addresses and numbers.

    DeviceError if g++ is missing, BarrierError if threads wait forever.
    """
    words = (ctypes.c_int64 * len(values))(*values)
    extents = (ctypes.c_uint * 6)(*grid, kernel.threads, 1, 1)
    if _entry(kernel)(extents, words):
        raise BarrierError(f"{kernel.name}: some threads wait at a barrier that the others never reach")


@cache
def _entry(kernel: CudaKernel) -> Any:
    """The compiled kernel as a function of extents and words."""
    if not has_compiler():
        raise DeviceError(f"kernel {kernel.name} is CUDA C, which g++ compiles for the host, and g++ is not installed")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        command = ["g++", *FLAGS, "-I", str(HEADERS), "-", "-o", str(library)]
        done = subprocess.run(command, input=source(kernel), text=True, capture_output=True)
        if done.returncode:
            raise GpuEngineError(f"kernel {kernel.name} is no C++:\n{done.stderr}")
        entry = ctypes.CDLL(str(library)).run
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return entry


def source(kernel: CudaKernel) -> str:
    """The C++ of a kernel and of the function that runs it."""
    runner = "run_fibers" if _EXCHANGES.search(kernel.text) else "run_threads"
    values = ", ".join(f"({c_type(argument.type)})words[{i}]" for i, argument in enumerate(kernel.arguments))
    return "\n".join([
        '#include "fibers.h"', kernel.text,
        'extern "C" int run(const unsigned* n, const int64_t* words) {',
        f"  return {runner}({{n[0], n[1], n[2]}}, {{n[3], n[4], n[5]}}, [=] {{ {kernel.name}({values}); }});",
        "}", "",
    ])  # fmt: skip

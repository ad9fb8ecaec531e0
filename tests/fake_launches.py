"""Kernels that a recorded GPU launches: their binaries stand for them, and they are interpreted.

Parameters are read from memory as a driver reads them, when a kernel is launched: an address for each, then as many
bytes as it has. So what is tested is the device's own packing. Kernels that make tensor descriptors find scratch for
them, of every program's own, in memory that was allocated.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.interpreter import interpret
from gpu_engine.gpu.kernel import CudaKernel, Kernel
from gpu_engine.gpu.shim_runner import run
from tests.recording_cuda import Gpu

KERNELS: dict[bytes, Kernel] = {}
FUNCTIONS: dict[int, Kernel] = {}
DESCRIPTOR_NBYTES = 128
_FUNCTIONS = itertools.count(1)


class Function:
    """An entry of a module."""

    def __init__(self, kernel: Kernel) -> None:
        self.ptr = next(_FUNCTIONS)
        FUNCTIONS[self.ptr] = kernel


def threads_of(kernel: Kernel) -> int:
    return kernel.threads if isinstance(kernel, CudaKernel) else 32 * kernel.num_warps


def binary_source(kernel: Kernel, arch: int) -> Binary:
    """A binary for this fake alone, with two parameters of Triton's own, the first for the scratch of descriptors."""
    cubin = kernel.digest.encode()
    KERNELS[cubin] = kernel
    own = tuple(8 if argument.is_pointer else 4 for argument in kernel.arguments)
    extra = () if isinstance(kernel, CudaKernel) else (8, 8)
    scratch = DESCRIPTOR_NBYTES * kernel.text.count("make_tensor_descriptor")
    return Binary(
        kernel.name, arch, cubin, threads_of(kernel), 0, scratch, (*own, *extra), len(own) if scratch else None
    )  # fmt: skip


def write_scratch(gpu: Gpu, scratch: int, nbytes: int) -> None:
    """Fill the scratch that a launch passes, as the descriptors of its programs do; it must be allocated and aligned,
    and nobody else's: who else uses it finds no numbers there."""
    if nbytes:
        assert scratch % DESCRIPTOR_NBYTES == 0
        assert gpu.find(scratch, nbytes) is not None, "scratch outside of memory"
        ctypes.memset(scratch, 0xFF, nbytes)


def read_scratch(kernel: Kernel, parameters: int, nbytes: int) -> int:
    """The scratch among the parameters of a launch."""
    if isinstance(kernel, CudaKernel):
        return 0
    own = len(kernel.arguments)
    places = (ctypes.c_uint64 * (own + 2)).from_address(parameters)
    scratch, profile = (ctypes.c_uint64.from_address(place).value for place in places[own:])
    assert profile == 0 and (scratch != 0) == (nbytes != 0)
    return scratch


def launch_on(gpu: Gpu) -> Callable[..., None]:
    """cuLaunchKernel."""

    def launch(function: int, gx: int, gy: int, gz: int, bx: int, *rest: int) -> None:
        kernel, stream, parameters = FUNCTIONS[function], rest[3], rest[4]
        assert bx == threads_of(kernel)
        places = (ctypes.c_uint64 * len(kernel.arguments)).from_address(parameters)
        values = [
            (ctypes.c_uint64 if argument.is_pointer else ctypes.c_int32).from_address(place).value
            for argument, place in zip(kernel.arguments, places, strict=True)
        ]
        nbytes = DESCRIPTOR_NBYTES * kernel.text.count("make_tensor_descriptor") * gx * gy * gz
        scratch = read_scratch(kernel, parameters, nbytes)
        pointers = [value for argument, value in zip(kernel.arguments, values, strict=True) if argument.is_pointer]

        def compute() -> None:
            if not gpu.check_pointers(kernel.name, pointers):
                return
            write_scratch(gpu, scratch, nbytes)
            if isinstance(kernel, CudaKernel):
                run(kernel, (gx, gy, gz), values)
            else:
                interpret(kernel, (gx, gy, gz), values)

        gpu.enqueue("launchKernel", stream, compute, gpu.costs.kernel_s, name=kernel.name, grid=(gx, gy, gz))

    return launch

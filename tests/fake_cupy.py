"""A CuPy without a GPU: the names that the CUDA device uses, over host memory, its launches interpreted.

Parameters are read from memory as a driver reads them: an address for each, then as many bytes as it has. So what is
tested is the device's own packing. Kernels that make tensor descriptors find scratch for them, of every program's own,
in memory that was allocated. `log` holds every call in order.
"""

from __future__ import annotations

import ctypes
import itertools
import time
import weakref
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.interpreter import interpret
from gpu_engine.gpu.kernel import CudaKernel, Kernel
from gpu_engine.gpu.shim_runner import run

DEVICE_NBYTES = 1 << 30
KERNELS: dict[bytes, Kernel] = {}
FUNCTIONS: dict[int, Kernel] = {}
DESCRIPTOR_NBYTES = 128
_NUMBERS = itertools.count(1)


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where the driver says no."""


class OutOfMemoryError(MemoryError):
    """What CuPy's pool raises."""


class Pointer:
    """A place in memory that it keeps alive."""

    def __init__(self, memory: np.ndarray[Any, Any], offset: int = 0) -> None:
        self.memory, self.offset = memory, offset
        self.ptr = memory.__array_interface__["data"][0] + offset
        ALLOCATED.add(self)

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


ALLOCATED: weakref.WeakSet[Pointer] = weakref.WeakSet()


class Array(np.ndarray[Any, Any]):
    """An array in device memory."""

    def __new__(cls, shape: tuple[int, ...], dtype: Any, memptr: Pointer) -> Array:
        return super().__new__(cls, shape, dtype, memptr.memory.data, memptr.offset)

    def set(self, source: Any, stream: Any) -> None:
        assert type(source) is np.ndarray and source.dtype == self.dtype and source.flags.c_contiguous
        self[...] = source


class Entered:
    """What `with` makes current: a device or a stream."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.ptr = next(_NUMBERS)

    def __enter__(self) -> Entered:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is current any more."""

    def synchronize(self) -> None:
        """Everything has happened by then."""


class Event:
    """A moment on a stream, where everything happens at once."""

    def __init__(self) -> None:
        self.at_s = float("nan")

    def record(self, stream: Entered) -> None:
        assert isinstance(stream, Entered)
        self.at_s = time.perf_counter()


def elapsed_ms(start: Event, end: Event) -> float:
    return (end.at_s - start.at_s) * 1e3


class Module:
    """Machine code that was loaded; here the digest of the kernel."""

    def load(self, cubin: bytes) -> None:
        self._kernel = KERNELS[cubin]

    def get_function(self, entry: str) -> Entered:
        assert entry == self._kernel.name
        function = Entered()
        FUNCTIONS[function.ptr] = self._kernel
        return function


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


def write_scratch(kernel: Kernel, parameters: int, programs: int) -> None:
    """Fill the scratch that a launch passes, as the descriptors of its programs do; it must be allocated and aligned,
    and nobody else's: who else uses it finds no numbers there."""
    nbytes = DESCRIPTOR_NBYTES * kernel.text.count("make_tensor_descriptor") * programs
    own = len(kernel.arguments)
    places = (ctypes.c_uint64 * (own + 2)).from_address(parameters)
    scratch, profile = (ctypes.c_uint64.from_address(place).value for place in places[own:])
    assert profile == 0 and (scratch != 0) == (nbytes != 0)
    if nbytes:
        assert scratch % DESCRIPTOR_NBYTES == 0
        rooms = [(pointer.ptr, pointer.ptr + len(pointer.memory) - pointer.offset) for pointer in ALLOCATED]
        assert any(low <= scratch and scratch + nbytes <= high for low, high in rooms), "scratch outside of memory"
        ctypes.memset(scratch, 0xFF, nbytes)


def fake_cupy(log: list[tuple[Any, ...]], devices: int = 1) -> dict[str, ModuleType]:
    """The modules, by name, for `sys.modules`."""

    def alloc(nbytes: int) -> Pointer:
        if nbytes > DEVICE_NBYTES:
            raise OutOfMemoryError(f"{nbytes} bytes")
        log.append(("alloc", nbytes))
        room = np.full(nbytes + 256, 0xFF, np.uint8)
        return Pointer(room[-room.__array_interface__["data"][0] % 256 :][:nbytes])

    def launch(function: int, gx: int, gy: int, gz: int, bx: int, *rest: int) -> None:
        kernel, parameters = FUNCTIONS[function], rest[4]
        assert bx == threads_of(kernel)
        values = [
            (ctypes.c_uint64 if argument.is_pointer else ctypes.c_int32).from_address(place).value
            for argument, place in zip(
                kernel.arguments, (ctypes.c_uint64 * len(kernel.arguments)).from_address(parameters), strict=True
            )
        ]
        log.append(("launch", kernel.name, (gx, gy, gz), rest[3]))
        if isinstance(kernel, CudaKernel):
            run(kernel, (gx, gy, gz), values)
        else:
            write_scratch(kernel, parameters, gx * gy * gz)
            interpret(kernel, (gx, gy, gz), values)

    def count() -> int:
        if not devices:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        return devices

    memory = _module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError)
    function = _module("cupy.cuda.function", Module=Module)
    driver = _module(
        "cupy.cuda.driver",
        launchKernel=launch,
        funcSetAttribute=lambda *values: log.append(("attribute", *values)),
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
    )
    runtime = _module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        getDeviceProperties=lambda ordinal: {"major": 9, "minor": 0, "name": b"Fake H200"},
        memGetInfo=lambda: (DEVICE_NBYTES, DEVICE_NBYTES),
    )
    cuda = _module(
        "cupy.cuda", alloc=alloc, Device=Entered, Stream=Entered, memory=memory, function=function, driver=driver,
        runtime=runtime, Event=Event, get_elapsed_time=elapsed_ms,
    )  # fmt: skip
    cupy = _module("cupy", cuda=cuda, ndarray=Array, asnumpy=lambda source, stream: np.array(source))
    for name in dir(np):
        if not hasattr(cupy, name) and not name.startswith("_"):
            setattr(cupy, name, getattr(np, name))
    modules = (cupy, cuda, memory, function, driver, runtime)
    return {module.__name__: module for module in modules}


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module

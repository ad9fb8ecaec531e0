"""The NVIDIA GPU as a device: CuPy's memory and streams, and kernels launched with packed parameters."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime
from cupy.cuda.function import Module
from numpy.typing import NDArray

from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.gpu.ahead import compiled_ahead
from gpu_engine.gpu.binary import Binary, BinarySource
from gpu_engine.gpu.driver import HostArray, Piece, Touched
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import GROWTH, device_properties, gpu_plan, kernels_of
from gpu_engine.gpu.program import Program, zone_nbytes
from gpu_engine.gpu.slot import GpuStream, Weights
from gpu_engine.gpu.text import array_dtype
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.plan.zones import Ints

STATIC_SHARED_NBYTES = 48 << 10
"""A block that wants more dynamic shared memory has to say so first."""
OLDEST_ARCH = 80
LEAST_SCRATCH = 64 << 10
"""Bytes of scratch, enough for the descriptors that a program on each multiprocessor makes."""


@dataclass(frozen=True)
class Loaded:
    """A kernel in the device's memory; `module` keeps it there."""

    module: Any
    function: int
    binary: Binary


class CudaMemory:
    """Bytes of the device; CuPy frees them with the last reference."""

    def __init__(self, nbytes: int) -> None:
        try:
            self.pointer = cupy.cuda.alloc(max(nbytes, 1))
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise OutOfMemory(f"{nbytes:,} bytes could not be allocated on the GPU: {error}") from error
        self.address, self.nbytes = int(self.pointer.ptr), nbytes


class CudaDriver:
    """One CUDA stream of a device. See `driver.Driver`."""

    xp = cupy

    def __init__(self, ordinal: int, arch: int, source: BinarySource) -> None:
        self._device, self._arch, self._source = cupy.cuda.Device(ordinal), arch, source
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._zero = np.zeros(1, np.int64)
        self._scratch: list[CudaMemory] = []

    def active(self) -> AbstractContextManager[Any]:
        """The thread's current device and stream."""
        stack = ExitStack()
        stack.enter_context(self._device)
        stack.enter_context(self._stream)
        return stack

    def allocate(self, nbytes: int) -> CudaMemory:
        return CudaMemory(nbytes)

    def array(self, memory: CudaMemory, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        return cupy.ndarray(shape, array_dtype(dtype), memory.pointer + offset)

    def upload(self, target: Any, source: HostArray) -> None:
        whole = np.ascontiguousarray(source).reshape(source.shape)
        target.set(whole.view(array_dtype(whole.dtype)), self._stream)

    def download(self, source: Any, dtype: DType) -> HostArray:
        found: NDArray[Any] = cupy.asnumpy(source, stream=self._stream)
        return found.view(dtype) if found.dtype != dtype else found

    def load(self, kernel: Kernel) -> Loaded:
        binary = self._source(kernel, self._arch)
        module = Module()
        module.load(binary.cubin)
        function = module.get_function(binary.entry)
        if binary.shared_nbytes > STATIC_SHARED_NBYTES:
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, attribute, binary.shared_nbytes)
        return Loaded(module, function.ptr, binary)

    def pack(self, loaded: Loaded, words: Ints, grid: tuple[int, int, int]) -> NDArray[np.uint64]:
        """The address of every parameter, and behind them that of the scratch. A word of 32 bits is the low half of its
        8 bytes; Triton's own parameters are 0 but for the scratch."""
        own = words.__array_interface__["data"][0] + 8 * np.arange(len(words), dtype=np.uint64)
        binary = loaded.binary
        extra = np.full(len(binary.parameters) - len(words), self._zero.__array_interface__["data"][0], np.uint64)
        scratch = self._scratch_for(binary.scratch_nbytes * grid[0] * grid[1] * grid[2])
        packed = np.concatenate([own, extra, np.array([scratch], np.uint64)])
        if binary.scratch_parameter is not None:
            packed[binary.scratch_parameter] = packed.__array_interface__["data"][0] + 8 * (len(packed) - 1)
        return packed

    def _scratch_for(self, nbytes: int) -> int:
        """The address of so much memory for the launches of this stream, which use it one after the other. What was
        reserved before stays: launches that were packed before use it."""
        if not nbytes:
            return 0
        if not self._scratch or self._scratch[-1].nbytes < nbytes:
            self._scratch.append(CudaMemory(max(nbytes, LEAST_SCRATCH)))
        return self._scratch[-1].address

    def launch(
        self,
        loaded: Loaded,
        grid: tuple[int, int, int],
        packed: NDArray[np.uint64],
        touched: Callable[[], Touched],
    ) -> None:
        binary = loaded.binary
        parameters = packed.__array_interface__["data"][0]
        driver.launchKernel(
            loaded.function, *grid, binary.threads, 1, 1, binary.shared_nbytes, self._stream.ptr, parameters, 0
        )

    def discard(self, piece: Piece) -> None:
        """Nobody looks."""

    def mark(self) -> Any:
        event = cupy.cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        return [cupy.cuda.get_elapsed_time(marks[0], mark) / 1e3 for mark in marks]

    def finish(self) -> None:
        self._stream.synchronize()


class CudaDevice:
    """See `runtime.device.Device`. Raises DeviceError with the reason if the GPU cannot be used."""

    asynchronous = True
    batch_limit = None
    bucketed = False
    stream_limit = None

    def __init__(
        self,
        ordinal: int | None = None,
        precision: str = "fp32",
        source: BinarySource | None = None,
        built: bool = False,
        timed: bool = False,
    ) -> None:
        self._ordinal, self._timed = ordinal or 0, timed
        self._count = _device_count()
        if self._ordinal >= self._count:
            raise DeviceError(f"cuda:{self._ordinal} does not exist: {self._count} GPU(s) are there")
        properties = runtime.getDeviceProperties(self._ordinal)
        self._arch = 10 * properties["major"] + properties["minor"]
        self._name, self._built = properties["name"].decode(), built
        self._uuid = uuid.UUID(bytes=bytes(properties.get("uuid", b""))[:16].ljust(16, b"\0"))
        if self._arch < OLDEST_ARCH:
            raise DeviceError(f"{self._name} is sm_{self._arch}, and kernels need sm_{OLDEST_ARCH} or newer")
        if source is None:
            raise DeviceError("no source of compiled kernels: Triton is not installed, and the model is no bundle")
        self._source, self._options = source, GpuOptions(precision, self._arch)

    @property
    def name(self) -> str:
        return f"cuda:{self._ordinal}"

    @property
    def arch(self) -> int:
        """90 for sm_90."""
        return int(self._arch)

    @property
    def reason(self) -> str:
        return f"{self._name}, sm_{self._arch}"

    def properties(self) -> Mapping[str, Any]:
        """See `runtime.device.Device`. With `built` kernels come from a bundle."""
        return device_properties(self._options, self._name, str(self._uuid), built=self._built)

    def auto_streams(self) -> int:
        return 2

    def timed(self) -> CudaDevice:
        """See `runtime.device.Device`."""
        return CudaDevice(self._ordinal, self._options.precision, self._source, self._built, timed=True)

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        return gpu_plan(graph, batching, self._options, self.free_memory() // GROWTH)

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[GpuStream]:
        source = compiled_ahead(kernels_of(plan), self._arch, self._source)
        drivers = [CudaDriver(self._ordinal, self._arch, source) for _ in range(streams)]
        with drivers[0].active():
            weights = Weights(plan, drivers[0])
        drivers[0].finish()
        return [GpuStream(plan, slots, one, weights, self._timed) for one in drivers]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes; segments whose extents only running tells are left out."""
        program: Program = plan.program
        return program.weights_nbytes, zone_nbytes(program.segments[0], extents)

    def same_bits(self, plan: Plan) -> bool:
        return False

    def free_memory(self) -> int:
        with cupy.cuda.Device(self._ordinal):
            return int(runtime.memGetInfo()[0])


def _device_count() -> int:
    try:
        return int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"no GPU can be used: {error}") from error

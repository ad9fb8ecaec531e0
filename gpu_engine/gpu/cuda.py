"""The NVIDIA GPU as a device: CuPy's memory and streams, and kernels launched with packed parameters.

Each of our streams is three of CUDA's: one computes, one copies to the device and one back. One stream for both
directions would not do: the download of a batch, which waits until it is computed, would stand before the upload of the
next. Events order the three for each slot, so that uploads and downloads overlap what other slots compute.

Who waits for a batch sleeps in cudaEventSynchronize, on an event of its slot made for blocking, without the GIL: the
thread that serves the slot, or a caller of run(). While it waits, the thread of the stream's other slot stages the next
batch. The driver calls no Python, and nothing spins.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime
from cupy.cuda.function import Module
from cupy.cuda.memory import Memory
from cupy.cuda.pinned_memory import PinnedMemory, PinnedMemoryPointer
from numpy.typing import NDArray

from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.gpu.ahead import compiled_ahead
from gpu_engine.gpu.binary import Binary, BinarySource
from gpu_engine.gpu.cuda_tensors import CudaIntake, ForeignMemory, gather, read, record
from gpu_engine.gpu.driver import Copy, HostArray, Piece, Replay, Touched
from gpu_engine.gpu.exchange import Place
from gpu_engine.gpu.failures import MEMORY_ALLOCATION, CudaErrors, unusable
from gpu_engine.gpu.footprint import slot_memory
from gpu_engine.gpu.graphs import captured_nbytes
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.lending import Lender
from gpu_engine.gpu.options import OLDEST_ARCH, GpuOptions
from gpu_engine.gpu.planning import GROWTH, device_properties, gpu_plan, kernels_of
from gpu_engine.gpu.program import Program, zone_nbytes
from gpu_engine.gpu.slot import GpuStream, Weights
from gpu_engine.gpu.text import array_dtype
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.plan.zones import Ints
from gpu_engine.runtime.dlpack import CUDA

STATIC_SHARED_NBYTES = 48 << 10
"""A block that wants more dynamic shared memory has to say so first."""
CAPTURING = threading.Lock()
"""Held by whoever captures: captures at the same time get into each other's way in the driver
(https://github.com/microsoft/onnxruntime/issues/18806)."""
LEAST_SCRATCH = 64 << 10
"""Bytes of scratch, enough for the descriptors that a program on each multiprocessor makes."""


@dataclass(frozen=True)
class Loaded:
    """A kernel in the device's memory; `module` keeps it there."""

    module: Any
    function: int
    binary: Binary


class CudaMemory:
    """Bytes of the device, given back with the last reference. They are of no pool, so that no stream gets what another
    one may still use: cudaFree waits for the device."""

    def __init__(self, nbytes: int) -> None:
        self.pointer = cupy.cuda.MemoryPointer(_allocated(nbytes), 0)
        self.address, self.nbytes = int(self.pointer.ptr), nbytes


class CudaPassage:
    """See `driver.Passage`."""

    def __init__(self, stream: Any, inward: Any, outward: Any, errors: CudaErrors) -> None:
        self._stream, self._inward, self._outward, self._errors = stream, inward, outward, errors
        self._arrived, self._computed = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._ended = cupy.cuda.Event(block=True, disable_timing=True)

    def send(self, copies: Sequence[Copy]) -> None:
        for host, device, nbytes in copies:
            runtime.memcpyAsync(device, host, nbytes, runtime.memcpyHostToDevice, self._inward.ptr)
        self._arrived.record(self._inward)
        self._stream.wait_event(self._arrived)

    def fetch(self, copies: Sequence[Copy]) -> None:
        self._computed.record(self._stream)
        self._outward.wait_event(self._computed)
        for host, device, nbytes in copies:
            runtime.memcpyAsync(host, device, nbytes, runtime.memcpyDeviceToHost, self._outward.ptr)
        self._ended.record(self._outward)

    def wait(self) -> None:
        with self._errors:
            self._ended.synchronize()


class CudaDriver:
    """The CUDA streams of one of ours. See `driver.Driver`."""

    xp = cupy
    captures = True

    def __init__(self, ordinal: int, arch: int, source: BinarySource) -> None:
        self._ordinal, self._arch, self._source = ordinal, arch, source
        self._errors = CudaErrors(f"cuda:{ordinal}")
        with self._errors, cupy.cuda.Device(ordinal):
            self._stream, self._inward, self._outward = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self._capturing = threading.local()
        self._zero = np.zeros(1, np.int64)
        self._scratch: list[CudaMemory] = []

    def enter(self) -> None:
        """Makes the device the thread's for good: whoever only visits it goes back to device 0, where CUDA then sets up
        a context that nobody wants."""
        runtime.setDevice(self._ordinal)

    def active(self) -> AbstractContextManager[Any]:
        """The thread's current device and stream."""
        stack = ExitStack()
        stack.enter_context(self._errors)
        stack.enter_context(cupy.cuda.Device(self._ordinal))
        stack.enter_context(self._stream)
        return stack

    def allocate(self, nbytes: int) -> CudaMemory:
        assert not hasattr(self._capturing, "stream"), "memory is reserved before a capture"
        return CudaMemory(nbytes)

    def staging(self, nbytes: int) -> HostArray:
        try:
            memory = PinnedMemory(max(nbytes, 1), runtime.hostAllocPortable)
        except runtime.CUDARuntimeError as error:
            if error.status != MEMORY_ALLOCATION:
                raise
            raise OutOfMemory(f"{nbytes:,} bytes of page-locked memory could not be allocated: {error}") from error
        return np.frombuffer(PinnedMemoryPointer(memory, 0), np.uint8)

    def passage(self) -> CudaPassage:
        return CudaPassage(self._stream, self._inward, self._outward, self._errors)

    def capture(self, start: Callable[[], object]) -> Replay:
        """On a stream of its own, so that a capture that fails leaves nothing behind on those that work, and that takes
        the launches of this thread alone."""
        with CAPTURING:
            stream = self._capturing.stream = cupy.cuda.Stream(non_blocking=True)
            try:
                stream.begin_capture(runtime.streamCaptureModeThreadLocal)
                try:
                    start()
                except BaseException:
                    with suppress(runtime.CUDARuntimeError):
                        stream.end_capture()
                    raise
                graph = stream.end_capture()
            finally:
                del self._capturing.stream
        return partial(graph.launch, self._stream)

    def array(self, memory: CudaMemory, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        return cupy.ndarray(shape, array_dtype(dtype), memory.pointer + offset)

    def upload(self, target: Any, source: HostArray) -> None:
        whole = np.ascontiguousarray(source).reshape(source.shape)
        target.set(whole.view(array_dtype(whole.dtype)), self._stream)

    def download(self, source: Any, dtype: DType) -> HostArray:
        found: NDArray[Any] = cupy.asnumpy(source, stream=self._stream)
        return found.view(dtype) if found.dtype != dtype else found

    def view(self, address: int, nbytes: int) -> ForeignMemory:
        return ForeignMemory(address, nbytes, self._ordinal)

    def move(self, target: int, source: int, nbytes: int) -> None:
        runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDeviceToDevice, self._stream.ptr)

    def gather(self, target: int, source: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType) -> None:
        gather(target, source, shape, strides, dtype, self._ordinal)

    def read(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        with self._errors, cupy.cuda.Device(self._ordinal):
            return read(address, nbytes)

    def signal(self) -> Any:
        with cupy.cuda.Device(self._ordinal):
            return cupy.cuda.Event(disable_timing=True)

    def record(self, signal: Any, stream: int | None = None) -> None:
        record(signal, self._stream.ptr if stream is None else stream, cupy.cuda.Device(self._ordinal))

    def wait(self, signal: Any) -> None:
        runtime.streamWaitEvent(self._stream.ptr, signal.ptr)

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
        binary, stream = loaded.binary, getattr(self._capturing, "stream", self._stream)
        parameters = packed.__array_interface__["data"][0]
        try:
            driver.launchKernel(
                loaded.function, *grid, binary.threads, 1, 1, binary.shared_nbytes, stream.ptr, parameters, 0
            )
        except driver.CUDADriverError as error:
            raise self._errors.typed(error) from error

    def discard(self, piece: Piece) -> None:
        """Nobody looks."""

    def mark(self) -> Any:
        event = cupy.cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        return [cupy.cuda.get_elapsed_time(marks[0], mark) / 1e3 for mark in marks]

    def finish(self) -> None:
        for stream in (self._inward, self._stream, self._outward):
            stream.synchronize()


class CudaDevice:
    """See `runtime.device.Device`. Raises DeviceError with the reason if the GPU cannot be used."""

    asynchronous = True
    batch_limit = None
    bucketed = True
    devices = 1
    own_memory = True
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
        self._count = device_count()
        if self._ordinal >= self._count:
            raise DeviceError(f"cuda:{self._ordinal} does not exist: {self._count} GPU(s) are there")
        properties = runtime.getDeviceProperties(self._ordinal)
        self._arch = 10 * properties["major"] + properties["minor"]
        self._name, self._built = properties["name"].decode(), built
        self._uuid = uuid.UUID(bytes=bytes(properties.get("uuid", b""))[:16].ljust(16, b"\0"))
        if self._arch < OLDEST_ARCH:
            raise DeviceError(f"{self._name} is sm_{self._arch}, and kernels need sm_{OLDEST_ARCH} or newer")
        if source is None:
            raise DeviceError(
                "no source of compiled kernels: Triton is not installed, and the model is no bundle; "
                "`gpu-engine doctor` says how to install it"
            )
        self._source, self._options = source, GpuOptions(precision, self._arch)

    @property
    def name(self) -> str:
        return f"cuda:{self._ordinal}"

    @cached_property
    def intake(self) -> CudaIntake:
        return CudaIntake(self._ordinal, self.name)

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
        place = Place(self.name, (CUDA, self._ordinal), Lender(drivers[0]))
        return [GpuStream(plan, slots, one, weights, self._timed, place) for one in drivers]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes; segments whose extents only running tells are left out."""
        program: Program = plan.program
        return program.weights_nbytes, zone_nbytes(program.segments[0], extents)

    def captured_nbytes(self, plan: Plan) -> int:
        """See `runtime.device.Device`."""
        return captured_nbytes(plan)

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        """See `runtime.device.Device`."""
        return slot_memory(plan, extents).staging_nbytes

    def same_bits(self, plan: Plan) -> bool:
        return False

    def free_memory(self) -> int:
        with CudaErrors(self.name), cupy.cuda.Device(self._ordinal):
            return int(runtime.memGetInfo()[0])


def _allocated(nbytes: int) -> Any:
    """New memory; where there is none, CuPy's pool gives up what it holds and nobody uses."""
    for attempt in range(2):
        try:
            return Memory(nbytes)
        except runtime.CUDARuntimeError as error:
            if error.status != MEMORY_ALLOCATION:
                raise
            if attempt:
                raise OutOfMemory(f"{nbytes:,} bytes could not be allocated on the GPU: {error}") from error
            cupy.get_default_memory_pool().free_all_blocks()
    raise AssertionError("the second attempt returns or raises")


def device_count() -> int:
    """How many GPUs this process sees; DeviceError with the reason where CUDA cannot say."""
    try:
        return int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        raise DeviceError(unusable(error, runtime.driverGetVersion(), runtime.runtimeGetVersion())) from error

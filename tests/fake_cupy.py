"""A CuPy without a GPU: the names that the CUDA device uses, over a recorded GPU, its kernels interpreted."""

from __future__ import annotations

import ctypes
import threading
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from tests.fake_launches import DESCRIPTOR_NBYTES as DESCRIPTOR_NBYTES
from tests.fake_launches import KERNELS, Function, launch_on
from tests.fake_launches import binary_source as binary_source
from tests.recording_cuda import Block, Capture, Gpu, Operation
from tests.recording_faults import CUDADriverError, CUDARuntimeError, cuda_error

THREAD_LOCAL = 1


class Current(threading.local):
    """The devices and streams that `with` made current for a thread, the last on top."""

    def __init__(self) -> None:
        self.devices, self.streams = [0], list[Any]()


_CURRENT = Current()


class OutOfMemoryError(MemoryError):
    """What CuPy's pool raises."""


class Memory:
    """Bytes of the current device, freed with the last reference."""

    kind, freeing, pinned = "malloc", "free", False

    def __init__(self, gpu: Gpu, nbytes: int, device: int) -> None:
        self.gpu, self.size, self.ptr = gpu, nbytes, 0
        self.block: Block | None = gpu.allocate(self.kind, nbytes, device, pinned=self.pinned) if nbytes else None
        self.ptr = self.block.address if self.block is not None else 0

    def __del__(self) -> None:
        if getattr(self, "block", None) is not None:
            self.gpu.free(self.freeing, self.block)


class PinnedMemory(Memory):
    """Bytes of the host that copies reach."""

    kind, freeing, pinned = "hostAlloc", "freeHost", True


class Pointer:
    """A place in memory that it keeps alive."""

    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem, self.offset, self.ptr = mem, offset, mem.ptr + offset

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.mem, self.offset + offset)


def pinned_pointer(mem: PinnedMemory, offset: int) -> Any:
    """The whole of it as the buffer of arrays, which keep it."""
    assert not offset and mem.block is not None
    buffer = (ctypes.c_char * mem.size).from_buffer(mem.block.room)
    buffer.mem = mem  # type: ignore[attr-defined]
    return buffer


class Array(np.ndarray[Any, Any]):
    """An array in device memory. Who makes one is about to look at it."""

    def __new__(cls, shape: tuple[int, ...], dtype: Any, memptr: Pointer) -> Array:
        memptr.mem.gpu.complete_all(_CURRENT.streams[-1].ptr if _CURRENT.streams else None)
        room = memptr.mem.block.room if memptr.mem.block is not None else np.empty(0, np.uint8)
        made = super().__new__(cls, shape, dtype, room.data, memptr.offset)
        made.data_pointer = memptr
        return made

    def __array_finalize__(self, source: Any) -> None:
        self.data_pointer = getattr(source, "data_pointer", None)

    def set(self, source: Any, stream: Stream) -> None:
        assert type(source) is np.ndarray and source.dtype == self.dtype and source.flags.c_contiguous
        gpu = stream.gpu
        gpu.refuse_while_capturing("set")
        kept = source.copy()
        costs = gpu.costs

        def move() -> None:
            self[...] = kept

        seconds = costs.copy_s + source.nbytes / costs.copied_nbytes_per_s
        gpu.enqueue("set", stream.ptr, move, seconds, "in", nbytes=source.nbytes)


class Device:
    """What `with` makes current for a thread."""

    def __init__(self, ordinal: int) -> None:
        self.id = ordinal

    def __enter__(self) -> Device:
        _CURRENT.devices.append(self.id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _CURRENT.devices.pop()


def set_device(ordinal: int) -> None:
    _CURRENT.devices[-1] = ordinal


def current_device() -> int:
    return _CURRENT.devices[-1]


class Stream:
    """A CUDA stream."""

    def __init__(self, gpu: Gpu, *, non_blocking: bool) -> None:
        assert non_blocking, "a stream that waits for the default stream"
        self.gpu, self.device_id = gpu, current_device()
        self.ptr = gpu.open_lane(self.device_id).ptr

    def __enter__(self) -> Stream:
        if current_device() != self.device_id:
            raise RuntimeError("The device that the stream is created on does not match with the current device")
        _CURRENT.streams.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _CURRENT.streams.pop()

    def __del__(self) -> None:
        if hasattr(self, "ptr"):
            self.gpu.close_lane(self.ptr)

    def synchronize(self) -> None:
        lane = self.gpu.lane(self.ptr, "streamSynchronize")
        last = lane.queue[-1] if lane.queue else None
        self.gpu.wait_until("streamSynchronize", lane.tail_s, last, stream=self.ptr)

    def wait_event(self, event: Event) -> None:
        self.gpu.enqueue("streamWaitEvent", self.ptr, nothing, after=event, address=event.ptr)

    def begin_capture(self, mode: int) -> None:
        self.gpu.begin_capture(self.ptr, mode, THREAD_LOCAL)

    def end_capture(self) -> Graph:
        return Graph(self.gpu, self.gpu.end_capture(self.ptr))

    @property
    def done(self) -> bool:
        return not self.gpu.lane(self.ptr, "streamQuery").queue


class Graph:
    """What a stream captured: the same launches, with the same parameters, again and again."""

    def __init__(self, gpu: Gpu, capture: Capture) -> None:
        self.gpu, self._actions, self._seconds, self.number = gpu, capture.actions, capture.seconds, gpu.number()
        gpu.call("graphInstantiate", name=f"{len(self._actions)} nodes")
        gpu.graphs.add(self.number)

    def __del__(self) -> None:
        self.gpu.graphs.discard(self.number)

    def upload(self, stream: Stream) -> None:
        self.gpu.call("graphUpload", stream=stream.ptr)

    def launch(self, stream: Stream) -> None:
        actions = self._actions

        def replay() -> None:
            for action in actions:
                action()

        self.gpu.enqueue("graphLaunch", stream.ptr, replay, self._seconds, name=f"{len(actions)} nodes")


class Event:
    """A place in a stream's work."""

    def __init__(self, gpu: Gpu, block: bool, disable_timing: bool) -> None:
        self.gpu, self.block, self.timed, self.ptr = gpu, block, not disable_timing, gpu.number()
        gpu.call("eventCreate")
        gpu.events.add(self.ptr)
        self.marker: Operation | None = None
        self.at_s = 0.0

    def __del__(self) -> None:
        self.gpu.events.discard(self.ptr)

    def record(self, stream: Stream) -> None:
        self.marker = self.gpu.enqueue("eventRecord", stream.ptr, nothing, address=self.ptr)
        self.at_s = self.gpu.lane(stream.ptr).tail_s

    def synchronize(self) -> None:
        assert self.block, "a wait that spins"
        self.gpu.wait_until("eventSynchronize", self.at_s, self.marker, address=self.ptr)

    @property
    def done(self) -> bool:
        return self.marker is None or self.marker.done


def elapsed_ms(start: Event, end: Event) -> float:
    assert start.timed and end.timed
    return (end.at_s - start.at_s) * 1e3


def nothing() -> None:
    """Work that takes no time."""


class Module:
    """Machine code that was loaded; here the digest of the kernel."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def load(self, cubin: bytes) -> None:
        self._gpu.call("moduleLoadData", nbytes=len(cubin))
        self._kernel = KERNELS[cubin]

    def get_function(self, entry: str) -> Function:
        assert entry == self._kernel.name
        return Function(self._kernel)


def fake_cupy(gpu: Gpu) -> dict[str, ModuleType]:
    """The modules, by name, for `sys.modules`."""

    def count() -> int:
        if not gpu.devices:
            raise cuda_error("getDeviceCount", "cudaErrorInsufficientDriver")
        return gpu.devices

    def fetched(source: Array, stream: Stream) -> np.ndarray[Any, Any]:
        costs, lane = gpu.costs, gpu.lane(stream.ptr, "get")
        gpu.refuse_while_capturing("get")
        seconds = costs.copy_s + source.nbytes / costs.copied_nbytes_per_s
        last = gpu.enqueue("get", stream.ptr, nothing, seconds, "out", nbytes=source.nbytes)
        gpu.wait_until("streamSynchronize", lane.tail_s, last, stream=stream.ptr)
        return np.array(source)

    def filled(address: int, value: int, nbytes: int, stream: int) -> None:
        gpu.enqueue("memsetAsync", stream, lambda: ctypes.memset(address, value, nbytes) and None, nbytes=nbytes)

    def copied(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        gpu.copy(target, source, nbytes, {1: "in", 2: "out"}[kind], stream)

    runtime = _module(
        "cupy.cuda.runtime", CUDARuntimeError=CUDARuntimeError, getDeviceCount=count,
        driverGetVersion=lambda: 13000 * bool(gpu.devices), runtimeGetVersion=lambda: 13000,
        getDeviceProperties=lambda ordinal: {"major": 9, "minor": 0, "name": b"Fake H200"},
        memGetInfo=lambda: (gpu.nbytes - gpu.used_nbytes(device=current_device()), gpu.nbytes),
        memcpyAsync=copied, memsetAsync=filled, memcpyHostToDevice=1, memcpyDeviceToHost=2,
        streamCaptureModeThreadLocal=THREAD_LOCAL, hostAllocPortable=1, getDevice=current_device,
        setDevice=set_device,
    )  # fmt: skip
    driver = _module(
        "cupy.cuda.driver", launchKernel=launch_on(gpu), CUDADriverError=CUDADriverError,
        funcSetAttribute=lambda *values: gpu.call("funcSetAttribute"),
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
    )  # fmt: skip
    memory = _module(
        "cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, Memory=lambda n: Memory(gpu, n, current_device())
    )
    pinned = _module(
        "cupy.cuda.pinned_memory", PinnedMemory=lambda n, flags: PinnedMemory(gpu, n, current_device()),
        PinnedMemoryPointer=pinned_pointer,
    )  # fmt: skip
    function = _module("cupy.cuda.function", Module=lambda: Module(gpu))
    cuda = _module(
        "cupy.cuda", Device=Device, Stream=lambda non_blocking: Stream(gpu, non_blocking=non_blocking),
        Event=lambda block=False, disable_timing=False: Event(gpu, block, disable_timing), get_elapsed_time=elapsed_ms,
        MemoryPointer=Pointer, memory=memory, pinned_memory=pinned, function=function, driver=driver, runtime=runtime,
    )  # fmt: skip
    pool = _module("pool", free_all_blocks=lambda: None)
    cupy = _module("cupy", cuda=cuda, ndarray=Array, asnumpy=fetched, get_default_memory_pool=lambda: pool)
    for name in dir(np):
        if not hasattr(cupy, name) and not name.startswith("_"):
            setattr(cupy, name, getattr(np, name))
    modules = (cupy, cuda, memory, pinned, function, driver, runtime)
    return {module.__name__: module for module in modules}


def _module(name: str, **names: Any) -> Any:
    module = ModuleType(name)
    vars(module).update(names)
    return module

"""device="interpret": the GPU's plan and kernels on the host, checked at every access. For tests and for CI.

Memory starts, and ends its use, as NaN; every lane of every load and store must lie in what its step declares; counters
must be zero before and after a launch, whose programs run in an order that a seed chooses. Of CUDA C kernels none of
this but the memory is checked.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.gpu.device_arrays import DeviceArray, DeviceModule
from gpu_engine.gpu.driver import Copy, HostArray, Piece, Pieces, Replay, Touched
from gpu_engine.gpu.footprint import slot_memory
from gpu_engine.gpu.interpreter import AccessError, interpret, interpreting, spans
from gpu_engine.gpu.kernel import CudaKernel, Kernel
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import GROWTH, device_properties, gpu_plan
from gpu_engine.gpu.program import Program, zone_nbytes
from gpu_engine.gpu.shim_runner import run
from gpu_engine.gpu.slot import GpuStream, Weights
from gpu_engine.gpu.text import array_dtype
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.plan.zones import Ints

ALIGNMENT = 256
POISON = 0xFF
DEFAULTS = GpuOptions()


class HostMemory:
    """Aligned bytes of the host that stand for a GPU's."""

    def __init__(self, nbytes: int) -> None:
        try:
            raw = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        except MemoryError as error:
            raise OutOfMemory(f"{nbytes:,} bytes could not be allocated") from error
        start = -int(raw.__array_interface__["data"][0]) % ALIGNMENT
        self.bytes = raw[start : start + nbytes]
        self.address, self.nbytes = int(self.bytes.__array_interface__["data"][0]), nbytes


class Crossing:
    """See `driver.Passage`; everything happens at once."""

    def send(self, copies: Sequence[Copy]) -> None:
        for host, device, nbytes in copies:
            ctypes.memmove(device, host, nbytes)

    def fetch(self, copies: Sequence[Copy]) -> None:
        for host, device, nbytes in copies:
            ctypes.memmove(host, device, nbytes)

    def wait(self) -> None:
        """Everything has happened by then."""


class Interpreter:
    """See `driver.Driver`."""

    captures = False

    def __init__(self, seed: int = 0) -> None:
        self._shuffle = random.Random(seed)
        self.xp = DeviceModule()

    def allocate(self, nbytes: int) -> HostMemory:
        return HostMemory(nbytes)

    def enter(self) -> None:
        """The host is every thread's own."""

    def active(self) -> AbstractContextManager[Any]:
        return interpreting()

    def array(self, memory: HostMemory, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        return self.xp.on_device(np.ndarray(shape, array_dtype(dtype), memory.bytes.data, offset))

    def staging(self, nbytes: int) -> HostArray:
        return HostMemory(nbytes).bytes

    def passage(self) -> Crossing:
        return Crossing()

    def capture(self, start: Callable[[], object]) -> Replay:
        raise AssertionError("nothing is captured")

    def upload(self, target: DeviceArray, source: HostArray) -> None:
        self.xp.on_host(target)[...] = (
            np.ascontiguousarray(source).view(array_dtype(source.dtype)).reshape(source.shape)
        )

    def download(self, source: DeviceArray, dtype: DType) -> HostArray:
        found = np.array(self.xp.on_host(source))
        return found.view(dtype) if found.dtype != dtype else found

    def load(self, kernel: Kernel) -> Kernel:
        return kernel

    def pack(self, loaded: Kernel, words: Ints, grid: tuple[int, int, int]) -> list[int]:
        return [int(word) for word in words]

    def launch(
        self,
        loaded: Kernel,
        grid: tuple[int, int, int],
        packed: list[int],
        touched: Callable[[], Touched],
    ) -> None:
        if isinstance(loaded, CudaKernel):
            run(loaded, grid, packed)
            return
        reads, writes, zeroed = touched()
        _check_zeros(loaded, zeroed, "finds")
        interpret(loaded, grid, packed, spans([*reads, *writes]), spans(writes), self._shuffle)
        _check_zeros(loaded, zeroed, "leaves")

    def discard(self, piece: Piece) -> None:
        address, nbytes = piece
        ctypes.memset(address, POISON, nbytes)

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]

    def finish(self) -> None:
        """Everything has happened by then."""


def _check_zeros(kernel: Kernel, pieces: Pieces, verb: str) -> None:
    for address, nbytes in pieces:
        if any(ctypes.string_at(address, nbytes)):
            raise AccessError(f"{kernel.name} {verb} counters that are not zero")


class InterpretDevice:
    """See `runtime.device.Device`."""

    asynchronous = False
    batch_limit = None
    bucketed = False
    devices = 1
    own_memory = True
    stream_limit = None

    def __init__(
        self, ordinal: int | None = None, seed: int = 0, options: GpuOptions = DEFAULTS, timed: bool = False
    ) -> None:
        if ordinal not in (None, 0):
            raise DeviceError(f"there is one interpreter; interpret:{ordinal} does not exist")
        self._driver, self._options, self._timed = Interpreter(seed), options, timed

    @property
    def name(self) -> str:
        return "interpret"

    @property
    def reason(self) -> str:
        return "the GPU's kernels on the host, for tests"

    @property
    def arrays(self) -> DeviceModule:
        """The module of the device's arrays, which notes what a GPU would wait for."""
        return self._driver.xp

    def properties(self) -> Mapping[str, Any]:
        return device_properties(self._options, self.reason, str(uuid.UUID(int=0)))

    def auto_streams(self) -> int:
        return 1

    def timed(self) -> InterpretDevice:
        """See `runtime.device.Device`."""
        return InterpretDevice(options=self._options, timed=True)

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        return gpu_plan(graph, batching, self._options, self.free_memory() // GROWTH)

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[GpuStream]:
        weights = Weights(plan, self._driver)
        return [GpuStream(plan, slots, self._driver, weights, self._timed) for _ in range(streams)]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes; segments whose extents only running tells are left out."""
        program: Program = plan.program
        return program.weights_nbytes, zone_nbytes(program.segments[0], extents)

    def captured_nbytes(self, plan: Plan) -> int:
        """See `runtime.device.Device`."""
        return 0

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        """See `runtime.device.Device`."""
        return slot_memory(plan, extents).staging_nbytes

    def same_bits(self, plan: Plan) -> bool:
        return False

    def free_memory(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

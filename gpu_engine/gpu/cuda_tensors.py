"""Tensors of other libraries on an NVIDIA GPU: their memory, and the order of their streams and ours.

Handles of streams are CUDA's: 1 is the legacy default stream, 2 the calling thread's own
(https://docs.nvidia.com/cuda/cuda-runtime-api/stream-sync-behavior.html).
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from numpy.typing import NDArray

from gpu_engine.gpu.failures import CudaErrors
from gpu_engine.gpu.text import array_dtype
from gpu_engine.ir.dtypes import DType
from gpu_engine.runtime.device_tensors import DeviceTensor
from gpu_engine.runtime.dlpack import CUDA, CUDA_HOST, CUDA_MANAGED, LEGACY_STREAM, PER_THREAD_STREAM, Exported

INTAKE_STREAMS = 8
"""Producers are waited for on these in turn: whoever comes behind so many others waits for the work of the first, too.
"""
_TYPES = {2: CUDA, 3: CUDA_MANAGED}


class Ready:
    """An event behind a producer's work, used again once nobody needs this.

    It is no `__del__` that gives it back: in a cycle of garbage the event's own would have destroyed it.
    """

    __slots__ = ("__weakref__", "event")

    def __init__(self, event: Any, spare: deque[Any]) -> None:
        self.event = event
        weakref.finalize(self, spare.append, event).atexit = False

    @property
    def ptr(self) -> int:
        return int(self.event.ptr)


class CudaIntake:
    """See `runtime.device_tensors.Intake`."""

    def __init__(self, ordinal: int, name: str) -> None:
        self._device, self.name, self._errors = cupy.cuda.Device(ordinal), name, CudaErrors(name)
        self.devices = frozenset({(CUDA, ordinal)})
        self._spare: deque[Any] = deque()

    def own(self, value: Any) -> Exported | None:
        if isinstance(value, DeviceTensor) and value.device == self.name:
            return Exported(value.address, value.shape, None, value.dtype, None, value)
        return None

    def at(self, place: tuple[int, int]) -> CudaIntake:
        return self

    def stream(self) -> int:
        return int(next(self._streams).ptr)

    @cached_property
    def _streams(self) -> Iterator[Any]:
        with self._errors, self._device:
            return itertools.cycle([cupy.cuda.Stream(non_blocking=True) for _ in range(INTAKE_STREAMS)])

    def after(self, stream: int) -> Ready:
        with self._errors:
            try:
                event = self._spare.popleft()
            except IndexError:
                with self._device:
                    event = cupy.cuda.Event(disable_timing=True)
            record(event, stream, self._device)
        return Ready(event, self._spare)

    def device_of(self, address: int) -> tuple[int, int]:
        with self._errors:
            found = runtime.pointerGetAttributes(address)
        return _TYPES.get(found.type, CUDA_HOST), found.device if found.type in _TYPES else 0


def record(event: Any, stream: int, device: Any) -> None:
    """Record an event on a stream of a device. The handles of default streams mean those of the current device."""
    if stream not in (LEGACY_STREAM, PER_THREAD_STREAM):
        runtime.eventRecord(event.ptr, stream)
        return
    with device:
        runtime.eventRecord(event.ptr, stream)


class ForeignMemory:
    """Bytes of the device that somebody else holds. See `driver.Memory`."""

    def __init__(self, address: int, nbytes: int, ordinal: int) -> None:
        self.pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, max(nbytes, 1), None, ordinal), 0)
        self.address, self.nbytes = address, nbytes


def gather(
    target: int, source: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType, ordinal: int
) -> None:
    """See `driver.Driver.gather`, on the current stream."""
    raw = array_dtype(dtype)
    packed = ForeignMemory(target, math.prod(shape) * raw.itemsize, ordinal)
    spread = ForeignMemory(source, raw.itemsize, ordinal)
    steps = tuple(raw.itemsize * stride for stride in strides)
    cupy.ndarray(shape, raw, packed.pointer)[...] = cupy.ndarray(shape, raw, spread.pointer, steps)


def read(address: int, nbytes: int) -> NDArray[np.uint8]:
    """See `driver.Driver.read`: in the order of the legacy default stream, which no slot's stream waits for."""
    found = np.empty(nbytes, np.uint8)
    if nbytes:
        runtime.memcpy(found.ctypes.data, address, nbytes, runtime.memcpyDeviceToHost)
    return found

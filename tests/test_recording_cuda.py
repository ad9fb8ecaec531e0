"""The recorded GPU itself: when things run and end, what it refuses, and errors that it is told to raise."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.fake_cupy import fake_cupy
from tests.recording_cuda import Costs, Gpu
from tests.recording_faults import CUDADriverError, CUDARuntimeError

COPY = Costs(call_s=1.0, copy_s=10.0, copied_nbytes_per_s=1e30)


class Room:
    """Memory of the host and of the device, and streams between them."""

    def __init__(self, gpu: Gpu, nbytes: int = 8) -> None:
        modules = fake_cupy(gpu)
        self.gpu, self.cuda, self.nbytes = gpu, modules["cupy.cuda"], nbytes
        self.runtime: ModuleType = modules["cupy.cuda.runtime"]
        pinned = modules["cupy.cuda.pinned_memory"]
        self.memory = self.cuda.memory.Memory(nbytes)
        self.sent, self.found = (
            np.frombuffer(pinned.PinnedMemoryPointer(pinned.PinnedMemory(nbytes, 1), 0), np.uint8) for _ in range(2)
        )
        self.up, self.down = (self.cuda.Stream(non_blocking=True) for _ in range(2))
        self.event = self.cuda.Event(block=True, disable_timing=True)

    def copy(self, stream: Any, host: np.ndarray[Any, Any], inward: bool) -> None:
        ends = (self.memory.ptr, host.__array_interface__["data"][0])
        self.runtime.memcpyAsync(*(ends if inward else ends[::-1]), self.nbytes, 1 if inward else 2, stream.ptr)


def test_copies_run_when_somebody_waits_for_them() -> None:
    room = Room(Gpu())
    room.sent[...] = 3
    room.copy(room.up, room.sent, True)
    room.event.record(room.up)
    room.down.wait_event(room.event)
    room.copy(room.down, room.found, False)
    room.event.record(room.down)
    assert (room.found == 0xFF).all()
    room.event.synchronize()
    assert (room.found == 3).all() and not room.gpu.violations


def test_what_was_not_ordered_is_not_there() -> None:
    room = Room(Gpu())
    room.sent[...] = 3
    room.copy(room.up, room.sent, True)
    room.copy(room.down, room.found, False)
    room.down.synchronize()
    assert (room.found == 0xFF).all()


def test_directions_have_engines_and_streams_have_an_order() -> None:
    room = Room(Gpu(costs=COPY))
    room.copy(room.up, room.sent, True)
    room.copy(room.down, room.found, False)
    room.copy(room.down, room.sent, True)
    times = [(call.begun_s, call.ended_s) for call in room.gpu.of("memcpyAsync")]
    made = [call.called_s for call in room.gpu.of("memcpyAsync")]
    assert times[0] == (made[0], made[0] + 10) and times[1] == (made[1], made[1] + 10)
    assert times[2] == (times[1][1], times[1][1] + 10)
    room.down.synchronize()
    assert room.gpu.call("now").called_s == times[2][1] + 1


def test_pageable_memory_is_not_copied_behind_the_hosts_back() -> None:
    room = Room(Gpu())
    room.copy(room.up, np.zeros(8, np.uint8), True)
    assert room.gpu.violations == ["an asynchronous copy of memory that is not pinned"]


def test_a_capture_refuses_to_wait_and_to_allocate() -> None:
    room = Room(Gpu())
    for forbidden in (room.event.synchronize, room.up.synchronize, lambda: room.cuda.memory.Memory(4)):
        room.up.begin_capture(mode=1)
        with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            forbidden()
        with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
            room.up.end_capture()
    assert len(room.gpu.violations) == 3


def test_a_graph_does_what_was_captured_and_only_then() -> None:
    room = Room(Gpu())
    room.up.begin_capture(mode=1)
    room.copy(room.up, room.found, False)
    graph = room.up.end_capture()
    room.up.synchronize()
    assert room.gpu.graphs == {graph.number} and room.gpu.kinds().count("graphInstantiate") == 1
    room.sent[...] = 5
    room.copy(room.up, room.sent, True)
    graph.launch(room.up)
    room.up.synchronize()
    assert (room.found == 5).all()
    del graph
    assert not room.gpu.graphs


def test_two_captures_and_closed_streams_are_noted() -> None:
    room = Room(Gpu())
    room.up.begin_capture(mode=1)
    room.down.begin_capture(mode=1)
    assert room.gpu.violations == ["two captures at a time"]
    room.up.end_capture()
    room.down.end_capture()
    ptr = room.up.ptr
    del room.up
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        room.runtime.memsetAsync(room.memory.ptr, 0, 8, ptr)


def test_the_nth_call_fails_and_sticky_errors_stay() -> None:
    room = Room(Gpu())
    room.gpu.fail_at("memcpyAsync", 2, "cudaErrorInvalidValue")
    room.copy(room.up, room.sent, True)
    with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidValue") as found:
        room.copy(room.up, room.sent, True)
    assert found.value.status == 1
    room.copy(room.up, room.sent, True)
    room.gpu.fail_at("eventSynchronize", 1, "cudaErrorIllegalAddress")
    room.event.record(room.up)
    with pytest.raises(CUDARuntimeError, match="cudaErrorIllegalAddress"):
        room.event.synchronize()
    with pytest.raises(CUDARuntimeError, match="cudaErrorIllegalAddress"):
        room.copy(room.up, room.sent, True)
    with pytest.raises(CUDADriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        room.gpu.call("launchKernel")
    room.gpu.heal()
    room.copy(room.up, room.sent, True)


def test_memory_is_limited_and_counted() -> None:
    room = Room(Gpu(nbytes=100))
    assert room.gpu.used_nbytes() == 8 and room.gpu.used_nbytes(pinned=True) == 16
    with pytest.raises(CUDARuntimeError, match="cudaErrorMemoryAllocation"):
        room.cuda.memory.Memory(93)
    held = room.cuda.memory.Memory(92)
    assert room.gpu.used_nbytes() == 100
    del held
    assert room.gpu.used_nbytes() == 8

"""A GPU of recorded calls with a clock of its own: what CUDA would do with them, when, and what it forbids.

Kernels and copies run as late as their order allows: when somebody waits for what comes behind them (with `late=False`
at once). So what is read, overwritten or launched without having been ordered gives wrong numbers. Host memory that a
copy is to fill holds 0xFF until the copy has run.

Time is a number for each thread of the host and each stream. A stream does one thing after the other, and so does the
engine of each direction of copies; kernels of different streams do not slow each other down.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.recording_faults import ERRORS, Fault, Faults, cuda_error

POISON = 0xFF
ALIGNMENT = 256
LEGACY_STREAM = 1
"""And 2 for the threads' own, which is one stream here."""
Action = Callable[[], None]


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds."""

    call_s: float = 2e-6
    copy_s: float = 5e-6
    copied_nbytes_per_s: float = 25e9
    moved_nbytes_per_s: float = 2e12
    kernel_s: float = 100e-6


@dataclass(frozen=True, slots=True)
class Call:
    """A call by CUDA's name, when the host made it, and when its work began and ended on its stream.

    `name` is that of a kernel, or the direction of a copy ("in", "out"). In a graph it was `captured`, not run.
    """

    kind: str
    called_s: float
    thread: int
    stream: int = 0
    begun_s: float = float("nan")
    ended_s: float = float("nan")
    name: str = ""
    nbytes: int = 0
    grid: tuple[int, ...] = ()
    address: int = 0
    captured: bool = False


@dataclass(eq=False)
class Operation:
    """Work on a stream, and what it comes after besides what stands before it."""

    action: Action
    lane: Lane
    after: tuple[Operation, ...] = ()
    done: bool = False


@dataclass
class Capture:
    """What a stream records instead of running it."""

    thread: int
    seconds: float = 0.0
    actions: list[Action] = field(default_factory=list)
    invalid: bool = False


@dataclass(eq=False)
class Lane:
    """A CUDA stream."""

    ptr: int
    device: int
    queue: deque[Operation] = field(default_factory=deque)
    tail_s: float = 0.0
    capture: Capture | None = None


@dataclass(frozen=True)
class Block:
    """Memory that was allocated."""

    address: int
    nbytes: int
    pinned: bool
    device: int
    room: np.ndarray[Any, Any]


class Gpu:
    """All devices of a process. `violations` says what was done that CUDA, or the house, forbids.

    With `pace` waiting takes so many real seconds for each of the clock's, so that threads get ahead of each other.
    """

    def __init__(
        self, devices: int = 1, nbytes: int = 1 << 30, late: bool = True, pace: float = 0.0, costs: Costs = Costs()
    ) -> None:
        self.devices, self.nbytes, self.late, self.pace, self.costs = devices, nbytes, late, pace, costs
        self.calls: list[Call] = []
        self.violations: list[str] = []
        self.blocks: dict[int, Block] = {}
        self.lanes: dict[int, Lane] = {}
        self.events: set[int] = set()
        self.graphs: set[int] = set()
        self.captures = 0
        self._faults = Faults()
        self._hosts: dict[int, float] = defaultdict(float)
        self._engines: dict[tuple[int, str], float] = defaultdict(float)
        self._reading: list[tuple[Operation, int, int]] = []
        self._numbers = iter(range(2 * devices + 1, 1 << 62))
        self._lock = threading.RLock()
        self._defaults = {1 + i: Lane(1 + i, i // 2) for i in range(2 * devices)}

    def fail_at(self, kind: str, nth: int, error: str) -> None:
        """Let the nth call of this kind from now on (1: the next) fail with an error of `recording_faults.ERRORS`.

        Kinds are CUDA's names as `calls` has them: "malloc", "hostAlloc", "memcpyAsync", "launchKernel",
        "graphLaunch", "eventRecord", "streamWaitEvent", "eventSynchronize", "streamSynchronize", "streamBeginCapture",
        "streamEndCapture", "moduleLoadData", "set", "get", ...
        """
        assert error in ERRORS and nth > 0
        with self._lock:
            self._faults.waiting.setdefault(kind, []).append(Fault(nth, error))

    def heal(self) -> None:
        """Forget all faults, and the error that every call fails with."""
        with self._lock:
            self._faults = Faults()

    def number(self) -> int:
        return next(self._numbers)

    def kinds(self) -> list[str]:
        return [call.kind for call in self.calls]

    def of(self, *kinds: str) -> list[Call]:
        return [call for call in self.calls if call.kind in kinds]

    def used_nbytes(self, *, pinned: bool = False, device: int | None = None) -> int:
        with self._lock:
            blocks = [b for b in self.blocks.values() if b.pinned == pinned and device in (None, b.device)]
            return sum(block.nbytes for block in blocks)

    def forbid(self, what: str) -> None:
        """Note what must not happen."""
        self.violations.append(what)

    def call(self, kind: str, *, fails: bool = True, **details: Any) -> Call:
        """Record a call of the calling thread; raises the error that was asked for."""
        with self._lock:
            thread = threading.get_ident()
            self._hosts[thread] += self.costs.call_s
            made = Call(kind, self._hosts[thread], thread, **details)
            self.calls.append(made)
            if fails:
                try:
                    self._faults.check(kind)
                except RuntimeError:
                    for capture in self._captures(thread):
                        capture.invalid = True
                    raise
            return made

    def refuse_while_capturing(self, kind: str) -> None:
        """What a thread may not do while it captures: it ends the capture, too."""
        captures = self._captures(threading.get_ident())
        for capture in captures:
            capture.invalid = True
        if captures:
            self.forbid(f"{kind} during a capture")
            raise cuda_error(kind, "cudaErrorStreamCaptureUnsupported")

    def _captures(self, thread: int) -> list[Capture]:
        found = [lane.capture for lane in self.lanes.values() if lane.capture is not None]
        return [capture for capture in found if capture.thread == thread]

    def allocate(self, kind: str, nbytes: int, device: int, *, pinned: bool) -> Block:
        with self._lock:
            self.call(kind, nbytes=nbytes)
            self.refuse_while_capturing(kind)
            if not pinned and self.used_nbytes(device=device) + nbytes > self.nbytes:
                raise cuda_error(kind, "cudaErrorMemoryAllocation")
            room = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
            room = room[-int(room.__array_interface__["data"][0]) % ALIGNMENT :][:nbytes]
            block = Block(int(room.__array_interface__["data"][0]), nbytes, pinned, device, room)
            self.blocks[block.address] = block
            return block

    def free(self, kind: str, block: Block) -> None:
        """CUDA waits for the device before it frees."""
        with self._lock, suppress(RuntimeError):
            self.call(kind, fails=False, nbytes=block.nbytes)
            self.refuse_while_capturing(kind)
            self.complete_all()
        with self._lock:
            self.blocks.pop(block.address, None)

    def find(self, address: int, nbytes: int) -> Block | None:
        """The block that has these bytes."""
        blocks = self.blocks.values()
        return next((b for b in blocks if b.address <= address and address + nbytes <= b.address + b.nbytes), None)

    def lane(self, ptr: int, kind: str = "") -> Lane:
        """A stream that is open."""
        lane = self.lanes.get(ptr) or self._defaults.get(ptr)
        if lane is None:
            self.forbid(f"{kind} on a stream that is closed")
            raise cuda_error(kind, "cudaErrorInvalidResourceHandle")
        return lane

    def default_stream(self, handle: int, device: int) -> int:
        """What a handle means where a device is current: 1 and 2 are its default streams."""
        return handle + 2 * device if handle in (LEGACY_STREAM, LEGACY_STREAM + 1) else handle

    def open_lane(self, device: int) -> Lane:
        with self._lock:
            self.call("streamCreate")
            lane = Lane(self.number(), device)
            self.lanes[lane.ptr] = lane
            return lane

    def close_lane(self, ptr: int) -> None:
        """What was started still runs."""
        with self._lock:
            if (lane := self.lanes.get(ptr)) is not None:
                self.call("streamDestroy", fails=False, stream=ptr)
                self.complete(lane.queue[-1] if lane.queue else None)
                del self.lanes[ptr]

    def enqueue(
        self, kind: str, ptr: int, action: Action, seconds: float = 0.0, engine: str = "", after: Any = None, **how: Any
    ) -> Operation:  # fmt: skip
        """Put work on a stream, behind `after`, an event; while the stream captures, into its graph."""
        with self._lock:
            lane = self.lane(ptr, kind)
            if lane.capture is not None:
                return self._captured(kind, lane, lane.capture, action, seconds, how)
            made = self.call(kind, stream=ptr, **how)
            key = (lane.device, engine)
            held_s = self._engines[key] if engine else 0.0
            begun_s = max(made.called_s, lane.tail_s, held_s, after.at_s if after is not None else 0.0)
            lane.tail_s = begun_s + seconds
            if engine:
                self._engines[key] = lane.tail_s
            self.calls[-1] = replace(made, begun_s=begun_s, ended_s=lane.tail_s)
            operation = Operation(action, lane, (after.marker,) if after is not None and after.marker else ())
            lane.queue.append(operation)
            if not self.late:
                self.complete(operation)
            return operation

    def _captured(
        self, kind: str, lane: Lane, capture: Capture, action: Action, seconds: float, how: dict[str, Any]
    ) -> Operation:
        self.call(kind, stream=lane.ptr, captured=True, **how)
        if capture.thread != threading.get_ident():
            self.forbid(f"{kind} by another thread on a stream that captures")
        if kind in ("eventRecord", "streamWaitEvent"):
            capture.invalid = True
            self.forbid(f"{kind} on a stream that captures: it would belong to the graph")
        capture.actions.append(action)
        capture.seconds += seconds
        return Operation(action, lane)

    def complete(self, operation: Operation | None) -> None:
        """Run all that an operation needs, and itself."""
        with self._lock:
            while operation is not None and not operation.done:
                first = operation.lane.queue[0]
                for earlier in first.after:
                    self.complete(earlier)
                first.done = True
                operation.lane.queue.popleft()
                first.action()

    def complete_all(self, ptr: int | None = None) -> None:
        """Run all that was put on a stream, or on any."""
        with self._lock:
            for lane in [each for each in (*self.lanes.values(), *self._defaults.values()) if ptr in (None, each.ptr)]:
                self.complete(lane.queue[-1] if lane.queue else None)

    def wait_until(self, kind: str, ended_s: float, operation: Operation | None, **what: int) -> None:
        """Let the calling thread wait for work that ends then. The call stands in `calls` where it returned."""
        with self._lock:
            made = self.call(kind, **what)
            self.calls.pop()
            self.refuse_while_capturing(kind)
            wait_s = max(0.0, ended_s - made.called_s)
        if self.pace:
            time.sleep(wait_s * self.pace)
        self.complete(operation)
        with self._lock:
            self._hosts[made.thread] += wait_s
            self.calls.append(replace(made, begun_s=made.called_s, ended_s=made.called_s + wait_s))

    def begin_capture(self, ptr: int, mode: int, wanted: int) -> None:
        with self._lock:
            self.call("streamBeginCapture", stream=ptr)
            lane = self.lane(ptr, "streamBeginCapture")
            if mode != wanted:
                self.forbid("a capture whose mode is not that of its thread alone")
            if self.captures:
                self.forbid("two captures at a time")
            self.captures += 1
            lane.capture = Capture(threading.get_ident())
        if self.pace:
            time.sleep(1e-3)

    def end_capture(self, ptr: int) -> Capture:
        """What was captured; raises if the capture is void."""
        with self._lock:
            lane = self.lane(ptr, "streamEndCapture")
            capture, lane.capture = lane.capture, None
            assert capture is not None, "no capture was begun"
            self.captures -= 1
            self.call("streamEndCapture", stream=ptr)
            if capture.invalid:
                raise cuda_error("streamEndCapture", "cudaErrorStreamCaptureInvalidated")
            return capture

    def copy(self, target: int, source: int, nbytes: int, direction: str, ptr: int) -> None:
        """An asynchronous copy between the host's pinned memory and the device, or inside it: "within"."""
        if direction == "within":
            self._move(target, source, nbytes, ptr)
            return
        host, device = (source, target) if direction == "in" else (target, source)
        with self._lock:
            ends = self.find(host, nbytes), self.find(device, nbytes)
            if ends[0] is None or not ends[0].pinned:
                self.forbid("an asynchronous copy of memory that is not pinned")
            if ends[1] is None or ends[1].pinned:
                self.forbid("a copy of memory that is not the device's")
                raise cuda_error("memcpyAsync", "cudaErrorInvalidValue")
            self._reading = [(read, first, last) for read, first, last in self._reading if not read.done]
            if direction == "out" and not any(
                target < last and first < target + nbytes for _, first, last in self._reading
            ):
                ctypes.memset(target, POISON, nbytes)
        seconds = self.costs.copy_s + nbytes / self.costs.copied_nbytes_per_s

        def move() -> None:
            if self.find(host, nbytes) is None or self.find(device, nbytes) is None:
                self.forbid("a copy of memory that was freed")
                return
            ctypes.memmove(target, source, nbytes)

        made = self.enqueue("memcpyAsync", ptr, move, seconds, direction, name=direction, nbytes=nbytes, address=device)
        if direction == "in":
            self._reading.append((made, host, host + nbytes))

    def _move(self, target: int, source: int, nbytes: int, ptr: int) -> None:
        def move() -> None:
            if self.check_pointers("a copy", (target, source, target + nbytes - 1, source + nbytes - 1)):
                ctypes.memmove(target, source, nbytes)

        seconds = self.costs.copy_s + nbytes / self.costs.moved_nbytes_per_s
        self.enqueue("memcpyAsync", ptr, move, seconds, name="within", nbytes=nbytes, address=target)

    def check_pointers(self, name: str, pointers: Sequence[int]) -> bool:
        """Whether all of a kernel's pointers lie in memory of the device."""
        found = [self.find(pointer, 0) for pointer in pointers if pointer]
        if all(block is not None and not block.pinned for block in found):
            return True
        self.forbid(f"{name} was launched with memory that was freed, or is none of the device's")
        return False

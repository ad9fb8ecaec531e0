"""One execution on a slot: rows in, launch, rows out; a failing batch is halved until the request at fault is alone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import DeviceLost, OutOfMemory
from gpu_engine.plan.signature import Family, Fit
from gpu_engine.runtime.arrays import Array
from gpu_engine.runtime.device import Cut, Slot, Stream
from gpu_engine.runtime.observation import Moments, Watch
from gpu_engine.runtime.requests import Join, Part, Placed, Request, gather, scatter
from gpu_engine.runtime.rooms import Rooms
from gpu_engine.runtime.scheduler import Batch
from gpu_engine.runtime.statistics import Counters
from gpu_engine.runtime.tokens import Tokens

_LOGGER = logging.getLogger(__name__)
clock = time.monotonic
Shortage = Callable[[Family, int], None]
POLL_S = 1e-3
"""Between looks for an idle slot, where no thread tells."""


def seconds_left(ends: float | None) -> float | None:
    """Until a time of the clock, at least 0 and at most what a lock can wait; None for never."""
    return None if ends is None else max(0.0, min(ends - clock(), threading.TIMEOUT_MAX))


class Lane:
    """A stream with the lock under which its slots are staged and launched, and how busy it has been."""

    __slots__ = ("busy_s", "in_flight", "lock", "max_in_flight", "since", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream, self.lock = stream, threading.Lock()
        self.in_flight = self.max_in_flight = 0
        self.since = self.busy_s = 0.0

    def begin(self, now: float) -> None:
        """Count an execution that begins; the caller serializes `begin` and `end`."""
        if not self.in_flight:
            self.since = now
        self.in_flight += 1
        if self.in_flight > self.max_in_flight:
            self.max_in_flight = self.in_flight

    def end(self, now: float) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.busy_s += now - self.since

    def release(self, workers: Iterable[Worker]) -> None:
        """Close the stream, whose slots no worker has any more."""
        for worker in workers:
            if worker.lane is self:
                worker.watch = None
                del worker.slot
        try:
            self.stream.close()
        except Exception:
            _LOGGER.exception("a stream could not be closed")

    def busy_until(self, now: float) -> float:
        """Seconds with an execution in flight."""
        return self.busy_s + (now - self.since if self.in_flight else 0.0)


class Worker:
    """A slot, what it did, and the thread that serves it.

    Whoever took the worker out of the pool's idle list owns the slot: its own thread, woken by a token while `called`
    is set, or a caller of run(). `batch` is what the thread runs at the moment; `watch` is told of every execution;
    `lost` is how an execution found the device broken; `shortage` is told how many rows had too little memory.
    """

    __slots__ = ("batch", "called", "counters", "lane", "lost", "shortage", "slot", "thread", "tokens", "watch")

    def __init__(self, lane: Lane, slot: Slot, shortage: Shortage | None = None) -> None:
        self.lane, self.slot, self.shortage, self.counters = lane, slot, shortage, Counters()
        self.tokens = Tokens()
        self.thread: threading.Thread | None = None
        self.called = False
        self.batch: Batch[Request] | None = None
        self.watch: Watch | None = None
        self.lost: DeviceLost | None = None


def run_alone(
    worker: Worker, arrays: Sequence[Array], fit: Fit, started: float, reason: str, placed: Placed | None
) -> Sequence[Any]:
    """Run one set of inputs on the calling thread, which owns the worker's slot; raises what the device raises."""
    counters = worker.counters
    try:
        if placed is None or not placed.outputs:
            outputs, staged, computed = _launch(worker, fit.extents, arrays, started, placed)
            result: Sequence[Any] = [output.copy() for output in outputs]
        else:
            _, staged, computed = _launch(worker, fit.extents, arrays, started, placed, [Cut(0, fit.rows)])
            result = _given(worker)[0]
    except Exception as error:
        counters.failed += 1
        raise _seen(worker, error) from error.__cause__
    copied = clock()
    if (watch := worker.watch) is not None:
        watch(None, fit.rows, fit.extents, Moments(started, staged, computed, copied))
    counters.copy_out_s += copied - computed
    counters.sizes[fit.rows] += 1
    counters.alone[reason] += 1
    return result


def execute(worker: Worker, parts: Sequence[Part], batched_outputs: Sequence[bool]) -> None:
    """Run parts of one key together and settle their requests; never raises."""
    try:
        if worker.lost is not None:
            raise worker.lost
        results = _run(worker, parts, batched_outputs)
    except BaseException as error:
        failure = _seen(worker, error)
        if isinstance(failure, OutOfMemory) and worker.shortage is not None:
            worker.shortage(parts[0][0].fit.family, sum([stop - start for _, start, stop in parts]))
    else:
        _settle(parts, results)
        return
    halves = _halves(parts, failure, batched_outputs)
    worker.counters.retried += bool(halves)
    for half in halves:
        execute(worker, half, batched_outputs)
    if halves:
        return
    for request, _, _ in parts:
        worker.counters.failed += not request.future.done()
        request.fail(failure)


def _run(worker: Worker, parts: Sequence[Part], batched_outputs: Sequence[bool]) -> list[Any]:
    """The result of each request, None for a part whose request has others to come."""
    started, counters = clock(), worker.counters
    first, start, stop = parts[0]
    rows = sum([stop - start for _, start, stop in parts])
    whole = len(parts) == 1 and stop - start == first.rows
    extents = first.fit.extents if whole else first.fit.family.extents(rows)
    sources, placed = gather(parts, first.fit.family.blocks), first.placed
    cuts = _cuts(parts) if placed is not None and placed.outputs else []
    outputs, staged, computed = _launch(worker, extents, sources, started, placed, cuts)
    pieces = _given(worker) if cuts else scatter(outputs, parts, rows, batched_outputs)
    results = [
        part[0].wrap(piece) if part[0].join is None else _joined(part, piece)
        for part, piece in zip(parts, pieces, strict=True)
    ]
    copied = clock()
    if (watch := worker.watch) is not None:
        watch(parts, first.fit.rows if whole else rows, extents, Moments(started, staged, computed, copied))
    counters.copy_out_s += copied - computed
    counters.sizes[first.fit.rows if whole else rows] += 1
    counters.queue_s += sum([started - request.arrival for request, start, _ in parts if not start])
    return results


def _launch(
    worker: Worker,
    extents: tuple[int, ...],
    sources: Sequence[Array | list[Array]],
    started: float,
    placed: Placed | None = None,
    cuts: Sequence[Cut] = (),
) -> tuple[Sequence[Any], float, float]:
    """Stage, fill, launch and wait: the outputs, valid until the slot is staged again, when all was staged, and now.

    With `cuts` the outputs of each stay on the device, and are the slot's `given`.
    """
    counters, slot = worker.counters, worker.slot
    with worker.lane.lock:
        targets = slot.stage(extents)
        if placed is not None:
            targets, sources = _place(slot, targets, sources, placed, cuts)
        for target, source in zip(targets, sources):  # noqa: B905 - admission counted them
            if type(source) is list:
                np.concatenate(source, out=target)
            else:
                target[...] = source
        packed = clock()
        slot.launch()
    outputs, computed = slot.wait(), clock()
    counters.copy_in_s += packed - started
    counters.compute_s += computed - packed
    return outputs, packed, computed


def _place(
    slot: Any, targets: Sequence[Array], sources: Sequence[Any], placed: Placed, cuts: Sequence[Cut]
) -> tuple[list[Array], list[Any]]:
    """Tell the slot what lies on the device; what is left to be filled, and with what."""
    for i, (source, on_device) in enumerate(zip(sources, placed.inputs, strict=True)):
        if on_device:
            slot.read(i, source if type(source) is list else [source])
    if cuts:
        slot.give(cuts[-1].stop, cuts)
    left = [i for i, on_device in enumerate(placed.inputs) if not on_device]
    return [targets[i] for i in left], [sources[i] for i in left]


def _given(worker: Worker) -> Sequence[Sequence[Any]]:
    """The outputs of each cut of the launch that was waited for."""
    slot: Any = worker.slot
    found: Sequence[Sequence[Any]] = slot.given()
    return found


def _cuts(parts: Sequence[Part]) -> list[Cut]:
    """Which rows of an execution are whose."""
    cuts: list[Cut] = []
    end = 0
    for request, start, stop in parts:
        cuts.append(Cut(end, end + stop - start, start, request.join))
        end = cuts[-1].stop
    return cuts


def _joined(part: Part, outputs: Sequence[Any]) -> Any:
    request, start, stop = part
    join, placed = request.join, request.placed
    if join is None:
        return None
    complete = join.put(outputs, start, stop) if placed is None or not placed.outputs else join.done(start, stop)
    return request.wrap(join.outputs) if complete else None


def _settle(parts: Sequence[Part], results: Sequence[Any]) -> None:
    """Hand results over only after all of them left the slot: a callback may use the engine again, or wait for another
    request of the batch."""
    watched = [
        request
        for (request, _, _), result in zip(parts, results, strict=True)
        if result is not None and request.succeed(result)
    ]
    for request in watched:
        request.future.run_callbacks()


def _seen(worker: Worker, error: BaseException) -> BaseException:
    """The error itself, but what Python says about memory in our terms; that the device is lost is noted."""
    if isinstance(error, DeviceLost):
        worker.lost = error
    if isinstance(error, MemoryError) and not isinstance(error, OutOfMemory):
        return OutOfMemory(f"no memory is left for the results: {error}")
    return error


def _halves(parts: Sequence[Part], error: BaseException, batched_outputs: Sequence[bool]) -> Sequence[Sequence[Part]]:
    """Two executions that may succeed where one failed: fewer requests and, where memory ran out, fewer rows of a
    single one. Nothing helps on a device that is broken."""
    if not isinstance(error, Exception) or isinstance(error, DeviceLost):
        return ()
    if len(parts) > 1:
        half = len(parts) // 2
        return parts[:half], parts[half:]
    request, start, stop = parts[0]
    if stop - start < 2 or not isinstance(error, OutOfMemory):
        return ()
    if request.join is None:
        request.join = Join(request.rows, batched_outputs, Rooms())
    middle = (start + stop) // 2
    return [(request, start, middle)], [(request, middle, stop)]

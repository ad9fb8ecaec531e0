"""One execution on a slot: rows in, launch, rows out; a failing batch is halved until the request at fault is alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.plan.signature import Fit
from gpu_engine.runtime.arrays import Array
from gpu_engine.runtime.device import Slot, Stream
from gpu_engine.runtime.observation import Moments, Watch
from gpu_engine.runtime.requests import Part, Request, gather, scatter
from gpu_engine.runtime.scheduler import Batch
from gpu_engine.runtime.statistics import Counters
from gpu_engine.runtime.tokens import Tokens

clock = time.monotonic
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
        self.stream.close()

    def busy_until(self, now: float) -> float:
        """Seconds with an execution in flight."""
        return self.busy_s + (now - self.since if self.in_flight else 0.0)


class Worker:
    """A slot, what it did, and the thread that serves it.

    Whoever took the worker out of the pool's idle list owns the slot: its own thread, woken by a token while `called`
    is set, or a caller of run(). `batch` is what the thread runs at the moment; `watch` is told of every execution.
    """

    __slots__ = ("batch", "called", "counters", "lane", "slot", "thread", "tokens", "watch")

    def __init__(self, lane: Lane, slot: Slot) -> None:
        self.lane, self.slot, self.counters = lane, slot, Counters()
        self.tokens = Tokens()
        self.thread: threading.Thread | None = None
        self.called = False
        self.batch: Batch[Request] | None = None
        self.watch: Watch | None = None


def run_alone(worker: Worker, arrays: Sequence[Array], fit: Fit, started: float, reason: str) -> list[Array]:
    """Run one set of inputs on the calling thread, which owns the worker's slot; raises what the device raises."""
    counters = worker.counters
    try:
        outputs, staged, computed = _launch(worker, fit.extents, arrays, started)
        result = [output.copy() for output in outputs]
    except Exception as error:
        counters.failed += 1
        raise _typed(error) from error.__cause__
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
        results = _run(worker, parts, batched_outputs)
    except BaseException as error:
        failure = _typed(error)
    else:
        _settle(parts, results)
        return
    if len(parts) > 1 and _may_retry(failure):
        worker.counters.retried += 1
        half = len(parts) // 2
        execute(worker, parts[:half], batched_outputs)
        execute(worker, parts[half:], batched_outputs)
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
    outputs, staged, computed = _launch(worker, extents, gather(parts, first.fit.family.blocks), started)
    pieces = scatter(outputs, parts, rows, batched_outputs)
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
    worker: Worker, extents: tuple[int, ...], sources: Sequence[Array | list[Array]], started: float
) -> tuple[Sequence[Array], float, float]:
    """Stage, fill, launch and wait: the outputs, valid until the slot is staged again, when all was staged, and now."""
    counters, slot = worker.counters, worker.slot
    with worker.lane.lock:
        for target, source in zip(slot.stage(extents), sources):  # noqa: B905 - admission counted them
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


def _joined(part: Part, outputs: Sequence[Array]) -> Any:
    request, start, stop = part
    complete = request.join is not None and request.join.put(outputs, start, stop)
    return request.wrap(request.join.outputs) if request.join is not None and complete else None


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


def _typed(error: BaseException) -> BaseException:
    """The error itself, but what Python says about memory in our terms."""
    if isinstance(error, MemoryError) and not isinstance(error, OutOfMemory):
        return OutOfMemory(f"no memory is left for the results: {error}")
    return error


def _may_retry(error: BaseException) -> bool:
    """Whether running fewer requests may succeed: not on a device that is broken."""
    return isinstance(error, Exception) and (not isinstance(error, DeviceError) or isinstance(error, OutOfMemory))

"""The scheduler in virtual time: the engine's own batcher, a device of given costs, and an event queue for a clock.

No threads, no waiting: what takes hours on eight GPUs takes seconds here. Every run checks what the engine promises.
Nothing is lost or run twice, requests of one key run in their order, and a stream has no more in flight than slots.

A batch passes four stages: the host forms it, it is copied to a stream, computed, and copied back. The host does one
at a time; a stream copies in one at a time and computes one at a time, so that with two slots the next batch is copied
while one computes. Streams do not slow each other down: give costs as they are with all streams busy.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpu_engine.errors import QueueFull
from gpu_engine.runtime.scheduler import Batch, Batcher
from gpu_engine.tools.measures import rank

NEVER = math.inf


@dataclass(frozen=True)
class Cost:
    """Seconds of one stage of a batch: so many, and so many more for each row."""

    fixed_s: float = 0.0
    row_s: float = 0.0


FREE = Cost()


@dataclass(frozen=True)
class Costs:
    """Of the stages of a batch."""

    compute: Cost
    copy_in: Cost = FREE
    copy_out: Cost = FREE
    host: Cost = FREE


@dataclass(frozen=True)
class Queue:
    """Streams with `slots` each, and the queue before them; `batch`, `timeout_s` and `max_size` as the engine's."""

    streams: int
    slots: int
    batch: int
    timeout_s: float = 0.0
    max_size: int = 0


@dataclass(frozen=True)
class Load:
    """Requests by number: when each arrives (not before the one ahead of it), its rows and its key.

    With `clients` the times do not count: so many callers have one request each, and send the next at its end.
    `timeout_s` is how long a request waits at most, `leaves_s` (by number) after how long its caller cancels it.
    """

    arrivals: Sequence[float]
    rows: Sequence[int] = ()
    keys: Sequence[int] = ()
    clients: int = 0
    timeout_s: float = 0.0
    leaves_s: Sequence[float] = ()


@dataclass(slots=True)
class Clock:
    now: float = 0.0


@dataclass(slots=True, eq=False)
class VirtualRequest:
    """See `scheduler.Waiting`, whose batcher may keep its `level`, `gone` and `place` here. `taken` rows were put into
    batches, `left` did not come back yet."""

    number: int
    key: int
    rows: int
    limit: int
    arrival: float
    deadline: float | None
    leaves: float
    clock: Clock
    left: int
    taken: int = 0
    claimed: bool = False
    level: int = 0
    gone: int = 0
    place: int = 0

    def cancelled(self) -> bool:
        return not self.claimed and self.clock.now >= self.leaves

    def claim(self) -> bool:
        if not self.claimed:
            self.claimed = self.clock.now < self.leaves
        return self.claimed


Part = tuple[VirtualRequest, int, int]


@dataclass(slots=True)
class Lane:
    """A stream: when it is free to copy and to compute, how many executions are in flight, and what it did."""

    slots: int
    copies_at: float = 0.0
    computes_at: float = 0.0
    in_flight: int = 0
    most: int = 0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Launch:
    """A batch that ran, for a log: its stream, parts as (request, start row, stop row), and when it was formed and
    done."""

    stream: int
    parts: tuple[tuple[int, int, int], ...]
    formed_s: float
    done_s: float
    reason: str


@dataclass
class Outcome:
    """What became of a load. `latencies` are seconds from arrival to result, of the requests that got one, in the
    order of their results; `busy` the fraction of time that each stream computed."""

    submitted: int = 0
    rejected: int = 0
    expired: int = 0
    cancelled: int = 0
    rows: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    batches: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    busy: tuple[float, ...] = ()
    max_in_flight: tuple[int, ...] = ()

    @property
    def completed(self) -> int:
        return len(self.latencies)

    @property
    def executions(self) -> int:
        return self.batches.total()


def simulate(load: Load, queue: Queue, costs: Costs, log: list[Launch] | None = None) -> Outcome:
    """What becomes of `load`; every launch is appended to `log`. AssertionError if a promise is broken."""
    return _Simulation(load, queue, costs, log).run()


class _Simulation:
    """The state of one run. Slots are (lane, number), idle ones last used last, as the engine keeps them."""

    def __init__(self, load: Load, queue: Queue, costs: Costs, log: list[Launch] | None) -> None:
        self.load, self.queue, self.costs, self.log = load, queue, costs, log
        self.clock = Clock()
        self.batcher: Batcher[VirtualRequest] = Batcher(queue.timeout_s, queue.max_size)
        self.lanes = [Lane(queue.slots) for _ in range(queue.streams)]
        self.idle = [stream for _ in range(queue.slots) for stream in range(queue.streams)][::-1]
        self.idle_in = [queue.slots] * queue.streams
        self.outcome = Outcome()
        self.done: list[tuple[float, int, int, Batch[VirtualRequest]]] = []
        self.issued = 0
        self.host_at = 0.0
        self.newest: dict[int, int] = {}

    def run(self) -> Outcome:
        """Event after event: a result, an arrival, or a batch that closes for its age."""
        total, arrivals, clock = len(self.load.arrivals), self.load.arrivals, self.clock
        for _ in range(min(self.load.clients, total)):
            self._submit()
        closes = self._dispatch()
        open_loop = not self.load.clients
        while True:
            arrives = arrivals[self.issued] if open_loop and self.issued < total else NEVER
            done = self.done[0][0] if self.done else NEVER
            now = min(arrives, done, closes)
            if now == NEVER:
                return self._finished()
            clock.now = now
            if done == now:
                self._collect(heapq.heappop(self.done))
            elif arrives == now:
                self._submit()
            if self.batcher.size:
                closes = self._dispatch()

    def _submit(self) -> None:
        """The next request arrives now."""
        number, load, now = self.issued, self.load, self.clock.now
        self.issued += 1
        self.outcome.submitted += 1
        rows = load.rows[number] if load.rows else 1
        deadline = now + load.timeout_s if load.timeout_s else None
        leaves = now + load.leaves_s[number] if load.leaves_s else NEVER
        key = load.keys[number] if load.keys else 0
        try:
            self.batcher.add(
                VirtualRequest(number, key, rows, self.queue.batch, now, deadline, leaves, self.clock, rows)
            )
        except QueueFull:
            self.outcome.rejected += 1

    def _dispatch(self) -> float:
        """Give idle slots what may run now; when the batch that is collecting closes."""
        while self.idle and self.batcher.size:
            batch = self.batcher.take(self.clock.now)
            gone = self.batcher.pop_expired()
            self._issue_for(len(gone))
            if batch is None:
                closes = self.batcher.closes_at()
                return NEVER if closes is None else closes
            self._start(self._pick(), batch)
        return NEVER

    def _pick(self) -> int:
        """The stream of an idle slot: of those with the most idle slots the one used last, as `runtime.pool` does."""
        if self.queue.slots == 1:
            return self.idle.pop()
        idle, idle_in = self.idle, self.idle_in
        most = max([idle_in[stream] for stream in idle])
        place = len(idle) - 1
        while idle_in[idle[place]] != most:
            place -= 1
        return idle.pop(place)

    def _start(self, stream: int, batch: Batch[VirtualRequest]) -> None:
        lane, costs, rows, now = self.lanes[stream], self.costs, batch.rows, self.clock.now
        self._check(batch)
        self.idle_in[stream] -= 1
        lane.in_flight += 1
        lane.most = max(lane.most, lane.in_flight)
        assert lane.in_flight <= lane.slots, f"stream {stream} has {lane.in_flight} executions in flight"
        formed = self.host_at = max(now, self.host_at) + costs.host.fixed_s + rows * costs.host.row_s
        copied = lane.copies_at = max(formed, lane.copies_at) + costs.copy_in.fixed_s + rows * costs.copy_in.row_s
        takes = costs.compute.fixed_s + rows * costs.compute.row_s
        computed = lane.computes_at = max(copied, lane.computes_at) + takes
        lane.compute_s += takes
        done = computed + costs.copy_out.fixed_s + rows * costs.copy_out.row_s
        heapq.heappush(self.done, (done, self.outcome.executions, stream, batch))
        self.outcome.batches[rows] += 1
        if self.log is not None:
            parts = tuple((request.number, start, stop) for request, start, stop in batch.parts)
            self.log.append(Launch(stream, parts, now, done, batch.reason))

    def _check(self, batch: Batch[VirtualRequest]) -> None:
        """One key, its requests in their order, no row twice and none left out, no more rows than fit."""
        first = batch.parts[0][0]
        newest, rows = self.newest.get(first.key, -1), 0
        for request, start, stop in batch.parts:
            assert request.key == first.key, f"requests {first.number} and {request.number} share a batch"
            assert request.number >= newest, f"request {request.number} runs behind {newest}"
            assert start == request.taken < stop, f"request {request.number}: rows {start} after {request.taken}"
            newest, request.taken = request.number, stop
            rows += stop - start
        assert rows == batch.rows <= first.limit, f"{rows} rows in a batch of {batch.rows}"
        self.newest[first.key] = newest

    def _collect(self, event: tuple[float, int, int, Batch[VirtualRequest]]) -> None:
        """A slot is done: results for its requests, and their callers come again."""
        now, _, stream, batch = event
        lane, outcome = self.lanes[stream], self.outcome
        lane.in_flight -= 1
        self.idle.append(stream)
        self.idle_in[stream] += 1
        outcome.rows += batch.rows
        finished = 0
        for request, start, stop in batch.parts:
            request.left -= stop - start
            if not request.left:
                outcome.latencies.append(now - request.arrival)
                finished += 1
        self._issue_for(finished)

    def _issue_for(self, count: int) -> None:
        """Clients whose request ended send the next one."""
        if self.load.clients:
            for _ in range(min(count, len(self.load.arrivals) - self.issued)):
                self._submit()

    def _finished(self) -> Outcome:
        outcome, batcher = self.outcome, self.batcher
        assert not batcher.size and not batcher.rows, f"{batcher.size} requests were left in the queue"
        outcome.expired, outcome.cancelled = batcher.expired, batcher.cancelled
        ended = outcome.completed + outcome.expired + outcome.cancelled + outcome.rejected
        assert ended == outcome.submitted, f"{outcome.submitted} requests were submitted, {ended} ended"
        outcome.reasons = batcher.reasons
        outcome.seconds = self.clock.now
        outcome.busy = tuple(lane.compute_s / outcome.seconds if outcome.seconds else 0.0 for lane in self.lanes)
        outcome.max_in_flight = tuple(lane.most for lane in self.lanes)
        return outcome


def percentile(ordered: Sequence[float], p: float) -> float:
    """See `measures.rank`, of `ordered` values; NaN of none."""
    return ordered[rank(len(ordered), p) - 1] if ordered else math.nan

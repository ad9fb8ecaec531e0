"""The batcher: which waiting requests run together next. Arithmetic only: no threads, no clock, no device.

Times are seconds of one monotonic clock, passed in. The caller serializes all calls. A batch is formed when a slot
asks for one, from the first waiting request and those after it that share its key. Requests stand in the order of
their levels (0 goes first), and of arrival inside a level; requests of other keys keep their place, so order is first
in, first out for each key and level, and inside a level no key starves another.

The specification (3.1) has a CPU stream stage a batch while another one runs. Here the queue is the stage: it stays
open until the stream frees, and gathering costs about a hundredth of an execution (`copy_in_ns` beside `compute_ns`),
so that a thread that gathers ahead would win less than it takes from the cores that compute.

A batch closes for the first of these reasons that holds: `full` (no more rows fit), `shape` (the next request cannot
join and heads the next batch), `flush`, `timeout` (its oldest request waited that long), `idle` (without a timeout, a
free slot takes what there is).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from gpu_engine.errors import QueueFull

_SLACK = 64
_LEVEL = attrgetter("level")


class Waiting(Protocol):
    """A request in the queue.

    Requests of equal `key` may share a batch of at most `limit` rows. A request of more rows than `limit` is cut into
    parts. `deadline` is when it expires, or None. The batcher alone writes `level`, once the request is queued,
    `gone`, how many of its rows left the queue, and `place`, its number in the order of arrival, from 0.
    """

    level: int
    gone: int
    place: int

    @property
    def key(self) -> Hashable: ...
    @property
    def rows(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def deadline(self) -> float | None: ...

    def cancelled(self) -> bool:
        """Whether nobody waits for it any more: it was cancelled, or a part of it has failed."""
        ...

    def claim(self) -> bool:
        """Called as a batch takes a part of it; False if it was cancelled or has failed: then it leaves the queue."""
        ...


R = TypeVar("R", bound=Waiting)


@dataclass(slots=True)
class Batch(Generic[R]):
    """Parts (request, start row, stop row) that run together, `rows` in all, and why it was closed."""

    parts: list[tuple[R, int, int]]
    rows: int
    reason: str


@dataclass(slots=True)
class _Group(Generic[R]):
    """The waiting requests of one key, by level and arrival; `rows` of theirs are not dispatched."""

    requests: deque[R] = field(default_factory=deque)
    rows: int = 0


class Batcher(Generic[R]):
    """The queue and the rule that cuts batches from it.

    timeout_s   how long a batch that is not full may wait for more rows, from its oldest request; 0: not at all
    max_size    requests that may wait; 0: no limit
    levels      how many levels requests may have
    delays      whether expired requests run after all others instead of leaving the queue
    """

    def __init__(self, timeout_s: float = 0.0, max_size: int = 0, levels: int = 1, delays: bool = False) -> None:
        self.timeout_s, self.max_size = timeout_s, max_size
        self.size = self.rows = 0
        self.rejected = self.cancelled = self.expired = self.delayed = 0
        self.reasons: Counter[str] = Counter()
        self._ranked = levels > 1 or delays
        self._last_level = levels if delays else None
        self._groups: dict[Hashable, _Group[R]] = {}
        self._order: deque[R] = deque()
        self._added = self._flushed = 0
        self._expired: list[R] = []

    def full(self) -> bool:
        """Whether `max_size` requests wait."""
        return 0 < self.max_size <= self.size

    def add(self, request: R) -> None:
        """Queue a request of at least one row; QueueFull if `max_size` wait already."""
        if self.max_size and self.size >= self.max_size:
            self.rejected += 1
            raise QueueFull(f"Exceeds maximum queue size of {self.max_size} requests")
        group = self._groups.get(request.key)
        if group is None:
            group = self._groups[request.key] = _Group()
        if self._ranked:
            self._rank(group, request)
        else:
            group.requests.append(request)
            self._order.append(request)
        group.rows += request.rows
        request.place = self._added
        self._added += 1
        self.size += 1
        self.rows += request.rows

    def take(self, now: float) -> Batch[R] | None:
        """The next batch; None if nothing waits, or if what waits may still collect until `closes_at`."""
        while (group := self._next_group(now)) is not None:
            key = group.requests[0].key
            if self.timeout_s:
                self._purge(group, now)
                if not self._closes(group, now):
                    return None
            batch = self._cut(group, now)
            if not group.requests:
                del self._groups[key]
            if batch.parts:
                if batch.reason != "full":
                    batch.reason = self._reason(batch)
                self.reasons[batch.reason] += 1
                return batch
        return None

    def ready(self, now: float) -> bool:
        """Whether what waits would close a batch at `now`; counts requests that were cancelled since."""
        head = self._first()
        return head is not None and (not self.timeout_s or self._closes(self._groups[head.key], now))

    def closes_at(self) -> float | None:
        """When the batch that is collecting closes for its age, or None if nothing waits."""
        head = self._first()
        return None if head is None else self._oldest(self._groups[head.key]) + self.timeout_s

    def flush(self) -> None:
        """Let all that waits now run without waiting for more rows."""
        self._flushed = self._added

    def pop_expired(self) -> list[R]:
        """The requests that `take` found expired since the last call; they have left the queue."""
        expired, self._expired = self._expired, []
        return expired

    def drop_cancelled(self) -> None:
        """Let cancelled requests leave now, so that others find room; batches leave them out anyway."""
        for key in list(self._groups):
            group = self._groups[key]
            for _ in range(len(group.requests)):
                if group.requests[0].cancelled():
                    group.requests[0].claim()
                    self._drop(group)
                else:
                    group.requests.rotate(-1)
            if not group.requests:
                del self._groups[key]

    def clear(self) -> list[R]:
        """Empty the queue; returns what waited, whether or not it was cancelled."""
        left = [request for group in self._groups.values() for request in group.requests]
        self._groups.clear()
        self._order.clear()
        self.size = self.rows = 0
        return left

    def _rank(self, group: _Group[R], request: R) -> None:
        """Put a request behind those of its level, in its group and in the order of all."""
        if len(self._order) > 2 * self.size + _SLACK:
            self._order = deque([waiting for waiting in self._order if waiting.gone < waiting.rows])
        for line in (group.requests, self._order):
            if line and line[-1].level > request.level:
                line.insert(bisect_right(line, request.level, key=_LEVEL), request)
            else:
                line.append(request)

    def _first(self) -> R | None:
        """The first waiting request; forgets those that left the queue in the batch of an earlier one."""
        order = self._order
        while order:
            request = order[0]
            if request.gone < request.rows:
                return request
            order.popleft()
        return None

    def _next_group(self, now: float) -> _Group[R] | None:
        """The requests of the key that is next, the first of them neither cancelled nor expired."""
        while (request := self._first()) is not None:
            group = self._groups[request.key]
            if not self._leaves(group, now):
                return group
            if not group.requests:
                del self._groups[request.key]
        return None

    def _is_flushed(self, group: _Group[R]) -> bool:
        """Whether a request of the group that is next was there at the last flush."""
        if not self._ranked:
            return group.requests[0].place < self._flushed
        return self._flushed > 0 and any(request.place < self._flushed for request in group.requests)

    def _oldest(self, group: _Group[R]) -> float:
        """When the oldest request of the group that is next arrived."""
        if not self._ranked:
            return group.requests[0].arrival
        return min(request.arrival for request in group.requests)

    def _closes(self, group: _Group[R], now: float) -> bool:
        full, shape = group.rows >= group.requests[0].limit, len(self._groups) > 1
        return full or shape or self._is_flushed(group) or now >= self._oldest(group) + self.timeout_s

    def _reason(self, batch: Batch[R]) -> str:
        """Why a batch that took its whole group closed below its limit."""
        if self._groups:
            return "shape"
        if self._flushed and any(request.place < self._flushed for request, _, _ in batch.parts):
            return "flush"
        return "timeout" if self.timeout_s else "idle"

    def _cut(self, group: _Group[R], now: float) -> Batch[R]:
        """Take parts from a group up to its limit, in order; what expired or was cancelled leaves on the way."""
        requests, limit = group.requests, group.requests[0].limit
        parts, room = [], limit  # type: tuple[list[tuple[R, int, int]], int]
        while requests and room:
            request = requests[0]
            taken = request.gone
            count = request.rows - taken
            if count > room:
                if request.rows <= limit:
                    if self._leaves(group, now):
                        continue
                    room = 0
                    break
                count = room
            if request.deadline is not None and self._is_expired(request, now):
                self._leaves(group, now)
            elif not request.claim():
                self._drop(group)
            else:
                parts.append((request, taken, taken + count))
                room -= count
                self._advance(group, count)
        return Batch(parts, sum([stop - start for _, start, stop in parts]), "" if room else "full")

    def _advance(self, group: _Group[R], count: int) -> None:
        """Take `count` rows of a group's first request; a request whose rows are all taken leaves the queue."""
        request = group.requests[0]
        group.rows -= count
        self.rows -= count
        request.gone += count
        if request.gone == request.rows:
            group.requests.popleft()
            self.size -= 1

    def _drop(self, group: _Group[R]) -> None:
        """Take a cancelled request, or the rest of a failed one, from the queue."""
        request = group.requests[0]
        self.cancelled += request.gone == 0
        self._advance(group, request.rows - request.gone)

    def _expire(self, group: _Group[R]) -> None:
        """Take a group's first request from the queue, or put it behind all others."""
        request = group.requests[0]
        if self._last_level is None:
            self._expired.append(request)
            self.expired += 1
            self._advance(group, request.rows)
            return
        self.delayed += 1
        self._order.remove(group.requests.popleft())
        request.level = self._last_level
        group.requests.append(request)
        self._order.append(request)

    def _purge(self, group: _Group[R], now: float) -> None:
        """Drop what expired or was cancelled from a collecting group, whose first request stays.

        Only then may its rows be counted: a batch is not full of requests that nobody waits for. What is behind the
        rows of one batch is left alone.
        """
        requests, kept, rows = group.requests, [], 0  # type: tuple[deque[R], list[R], int]
        while requests and rows < requests[0].limit:
            if not self._leaves(group, now):
                rows += requests[0].rows - requests[0].gone
                kept.append(requests.popleft())
        requests.extendleft(reversed(kept))

    def _leaves(self, group: _Group[R], now: float) -> bool:
        """Take a group's first request from its place if it was cancelled, has failed or expired."""
        request = group.requests[0]
        if request.cancelled():
            request.claim()
            self._drop(group)
            return True
        if self._is_expired(request, now):
            self._expire(group)
            return True
        return False

    def _is_expired(self, request: R, now: float) -> bool:
        """Whether the request waited too long; one of which a part was dispatched no longer expires."""
        deadline = request.deadline
        return deadline is not None and now >= deadline and not request.gone and request.level != self._last_level

"""The batcher: which waiting requests run together next. Arithmetic only: no threads, no clock, no device.

Times are seconds of one monotonic clock, passed in. The caller serializes all calls. A batch is formed when a slot
asks for one, from the oldest waiting request and those after it that share its key, in order of arrival; requests of
other keys keep their place, so order is first in, first out for each key and no key starves another.

The specification (3.1) has a CPU stream stage a batch while another one runs. Here the queue is the stage: it stays
open until the stream frees, and gathering costs about a hundredth of an execution (`copy_in_ns` beside `compute_ns`),
so that a thread that gathers ahead would win less than it takes from the cores that compute.

A batch closes for the first of these reasons that holds: `full` (no more rows fit), `shape` (the next request cannot
join and heads the next batch), `flush`, `timeout` (its oldest request waited that long), `idle` (without a timeout, a
free slot takes what there is).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from gpu_engine.errors import QueueFull


class Waiting(Protocol):
    """A request in the queue.

    Requests of equal `key` may share a batch of at most `limit` rows. A request of more rows than `limit` is cut into
    parts. `deadline` is when it expires, or None.
    """

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

    def cancelled(self) -> bool: ...

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
    """The waiting requests of one key, `rows` rows in all; `taken` rows of the first are dispatched already."""

    requests: deque[R] = field(default_factory=deque)
    rows: int = 0
    taken: int = 0


class Batcher(Generic[R]):
    """The queue and the rule that cuts batches from it.

    timeout_s   how long a batch that is not full may wait for more rows, from its oldest request; 0: not at all
    max_size    requests that may wait; 0: no limit
    """

    def __init__(self, timeout_s: float = 0.0, max_size: int = 0) -> None:
        self.timeout_s, self.max_size = timeout_s, max_size
        self.size = self.rows = 0
        self.rejected = self.cancelled = self.expired = 0
        self.reasons: Counter[str] = Counter()
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
        group.requests.append(request)
        group.rows += request.rows
        self._order.append(request)
        self._added += 1
        self.size += 1
        self.rows += request.rows

    def take(self, now: float) -> Batch[R] | None:
        """The next batch; None if nothing waits, or if what waits may still collect until `closes_at`."""
        while (head := self._head(now)) is not None:
            key, group = head.key, self._groups[head.key]
            if self.timeout_s:
                if not self._purge(key, group, now):
                    continue
                if not self._closes(group, now):
                    return None
            flushed = self._is_flushed()
            batch = self._cut(group, now)
            if not group.requests:
                del self._groups[key]
            if batch.parts:
                if batch.reason != "full":
                    batch.reason = self._reason(flushed)
                self.reasons[batch.reason] += 1
                return batch
        return None

    def ready(self, now: float) -> bool:
        """Whether what waits would close a batch at `now`; counts requests that were cancelled since."""
        head = self._oldest()
        return head is not None and (not self.timeout_s or self._closes(self._groups[head.key], now))

    def closes_at(self) -> float | None:
        """When the batch that is collecting closes for its age, or None if nothing waits."""
        head = self._oldest()
        return None if head is None else head.arrival + self.timeout_s

    def flush(self) -> None:
        """Let all that waits now run without waiting for more rows."""
        self._flushed = self._added

    def pop_expired(self) -> list[R]:
        """The requests that `take` found expired since the last call; they have left the queue."""
        expired, self._expired = self._expired, []
        return expired

    def clear(self) -> list[R]:
        """Empty the queue; returns what waited, whether or not it was cancelled."""
        left = [request for group in self._groups.values() for request in group.requests]
        self._groups.clear()
        self._order.clear()
        self.size = self.rows = 0
        return left

    def _oldest(self) -> R | None:
        """The oldest waiting request; forgets those that left the queue in the batch of an older one."""
        while self._order:
            request = self._order[0]
            group = self._groups.get(request.key)
            if group is not None and group.requests[0] is request:
                return request
            self._order.popleft()
        return None

    def _head(self, now: float) -> R | None:
        """The oldest request that has not expired; one of which a part was dispatched no longer expires."""
        while (request := self._oldest()) is not None:
            group = self._groups[request.key]
            if group.taken or not _is_expired(request, now):
                return request
            self._expire(group)
            if not group.requests:
                del self._groups[request.key]
        return None

    def _is_flushed(self) -> bool:
        """Whether the oldest request was there at the last flush: its number is that of the first in `_order`."""
        self._oldest()
        return self._added - len(self._order) < self._flushed

    def _closes(self, group: _Group[R], now: float) -> bool:
        head = group.requests[0]
        full, shape = group.rows >= head.limit, len(self._groups) > 1
        return full or shape or self._is_flushed() or now >= head.arrival + self.timeout_s

    def _reason(self, flushed: bool) -> str:
        """Why a batch that took its whole group closed below its limit."""
        if self._groups:
            return "shape"
        if flushed:
            return "flush"
        return "timeout" if self.timeout_s else "idle"

    def _cut(self, group: _Group[R], now: float) -> Batch[R]:
        """Take parts from a group up to its limit, in order; what expired or was cancelled leaves on the way."""
        requests, limit = group.requests, group.requests[0].limit
        parts, room = [], limit  # type: tuple[list[tuple[R, int, int]], int]
        while requests and room:
            request, taken = requests[0], group.taken
            count = request.rows - taken
            if count > room:
                if request.rows <= limit:
                    room = 0
                    break
                count = room
            if request.deadline is not None and now >= request.deadline and not taken:
                self._expire(group)
            elif not request.claim():
                self._drop(group)
            else:
                parts.append((request, taken, taken + count))
                room -= count
                self._advance(group, count)
        return Batch(parts, sum([stop - start for _, start, stop in parts]), "" if room else "full")

    def _advance(self, group: _Group[R], count: int) -> None:
        """Take `count` rows of a group's first request; a request whose rows are all taken leaves the queue."""
        group.rows -= count
        self.rows -= count
        group.taken += count
        if group.taken == group.requests[0].rows:
            group.requests.popleft()
            group.taken = 0
            self.size -= 1

    def _drop(self, group: _Group[R]) -> None:
        """Take a cancelled request, or the rest of a failed one, from the queue."""
        self.cancelled += group.taken == 0
        self._advance(group, group.requests[0].rows - group.taken)

    def _expire(self, group: _Group[R]) -> None:
        self._expired.append(group.requests[0])
        self.expired += 1
        self._advance(group, group.requests[0].rows)

    def _purge(self, key: Hashable, group: _Group[R], now: float) -> bool:
        """Drop what expired or was cancelled from a collecting group; False, and the group is gone, if nothing is left.

        Only then may its rows be counted: a batch is not full of requests that nobody waits for.
        """
        for _ in range(len(group.requests)):
            request = group.requests[0]
            if request.cancelled():
                request.claim()
                self._drop(group)
            elif _is_expired(request, now) and not group.taken:
                self._expire(group)
            elif group.taken:
                return True
            else:
                group.requests.rotate(-1)
        if not group.requests:
            del self._groups[key]
        return bool(group.requests)


def _is_expired(request: Waiting, now: float) -> bool:
    return request.deadline is not None and now >= request.deadline

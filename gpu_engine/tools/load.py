"""Load generators: closed loop, open loop with Poisson arrivals, and all requests at once. They own no clock.

In an open loop a latency counts from when a request was meant to be sent, not from when the generator got to it: a
server that stalls may not hide the requests that nobody could send meanwhile ("coordinated omission").
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gpu_engine.tools.measures import Times, is_steady

MOST_WAITING = 20_000
"""An open loop ends where so many requests wait: the rate is far above what is served."""

WARM_ROUNDS = 5
"""A window of the warm-up holds at least so many times what is in flight, so that whole batches do not shake it."""

Done = tuple[int, float]
"""(number of a request, when it finished)"""


class Target(Protocol):
    """What serves requests. Times are seconds of its own clock; only one thread uses it."""

    def now(self) -> float: ...

    def send(self, number: int) -> None:
        """Begin a request that `receive` will return by its number."""
        ...

    def receive(self, until: float | None = None) -> Done | None:
        """The next finished request; None if there is none at `until`. Raises what the request raised."""
        ...


@dataclass(frozen=True)
class Course:
    """How long to measure: `seconds` and at least `least` queries, or `queries` where they are given.

    Before that a warm-up of at least `warmup_s` seconds goes on until windows of `window_s` are steady, for as long as
    the measurement at most; 0: none.
    """

    seconds: float
    warmup_s: float = 0.0
    queries: int | None = None
    least: int = 0

    @property
    def window_s(self) -> float:
        return min(1.0, self.seconds / 10)


@dataclass(frozen=True)
class Taken:
    """What a load generator saw between `start_s` and `stop_s`: when queries finished, in order, and their latencies.

    `lag_s` is how late an open loop sent. `unfinished` queries did not finish in time: their latencies are how long
    they have waited so far. `overloaded`: the load ended early, with MOST_WAITING requests waiting.
    """

    start_s: float
    stop_s: float
    finished_s: Times
    latencies_s: Times
    lag_s: Times = field(default_factory=lambda: np.empty(0))
    unfinished: int = 0
    overloaded: bool = False
    warm: bool = True

    @property
    def seconds(self) -> float:
        return self.stop_s - self.start_s


@dataclass
class Grouped:
    """A target whose requests are queries of `size` requests each; a query is finished with its last request."""

    target: Target
    size: int
    _left: dict[int, int] = field(default_factory=dict)

    def now(self) -> float:
        return self.target.now()

    def send(self, number: int) -> None:
        self._left[number] = self.size
        for part in range(self.size):
            self.target.send(number * self.size + part)

    def receive(self, until: float | None = None) -> Done | None:
        while (done := self.target.receive(until)) is not None:
            number = done[0] // self.size
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
                return number, done[1]
        return None


def closed_loop(target: Target, in_flight: int, course: Course) -> Taken:
    """Keep `in_flight` queries in flight: whenever one finishes, the next is due, and its latency counts from then.

    The number of queries measured is a multiple of `in_flight`.
    """
    flight = _Flight(target, [0.0] * in_flight, [*range(in_flight)])
    try:
        warm = _warm_up(flight, in_flight, course)
        start = target.now()
        if course.queries is None:
            samples = flight.turn(start + course.seconds, course.least)
        else:
            samples = flight.turn(start, course.queries)
    finally:
        flight.land()
    began, finished = np.array(samples).T
    return Taken(start, float(finished.max()), np.sort(finished), finished - began, warm=warm)


@dataclass
class _Flight:
    """Queries in flight by number: when each was due, and the numbers that are not in flight."""

    target: Target
    due: list[float]
    free: list[int]

    def turn(self, until: float, least: int, limit: float = math.inf) -> list[tuple[float, float]]:
        """(due, finished) of the queries that finish until then, at least so many and a multiple of those in flight;
        after the limit however few there are.

        As few calls as can be for each query: whatever the generator does is missing in a throughput.
        """
        target, due, in_flight = self.target, self.due, len(self.due)
        send, receive = target.send, target.receive
        found: list[tuple[float, float]] = []
        try:
            while self.free:
                number = self.free.pop()
                due[number] = target.now()
                send(number)
            while True:
                number, finished = receive()  # type: ignore[misc]
                found.append((due[number], finished))
                enough = finished >= until and (len(found) >= least or finished >= limit)
                if enough and not len(found) % in_flight:
                    self.free.append(number)
                    return found
                due[number] = finished
                send(number)
        except BaseException:
            self.free.append(0)  # what failed is in flight no more, be it that it was received or not sent
            raise

    def land(self) -> None:
        """Wait for what is in flight; its errors say nothing new."""
        for _ in range(len(self.due) - len(self.free)):
            with contextlib.suppress(Exception):
                self.target.receive()


def _warm_up(flight: _Flight, in_flight: int, course: Course) -> bool:
    """Windows until the warm-up is over; whether it ended with steady ones (or was not asked for)."""
    if not course.warmup_s:
        return True
    first = opened = flight.target.now()
    rates: list[float] = []
    limit = first + course.warmup_s + course.seconds
    while opened < limit:
        samples = flight.turn(min(opened + course.window_s, limit), WARM_ROUNDS * in_flight, limit)
        rates.append(len(samples) / (samples[-1][1] - opened))
        opened = samples[-1][1]
        if opened >= first + course.warmup_s and is_steady(rates):
            return True
    return False


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Seconds between arrivals of a Poisson process of `rate` per second; ValueError unless it is above 0."""
    if not 0 < rate < math.inf:
        raise ValueError(f"a rate is a number of requests per second above 0, given {rate:g}")
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(rate)


def open_loop(target: Target, gaps: Iterator[float], course: Course) -> Taken:
    """Send a query after each gap, whether or not earlier ones have finished, then wait for those in flight.

    Counted are the queries that were meant to be sent in the `course.seconds` after the warm-up, or the first one after
    that. Those still unfinished as long again after the last are given up.
    """
    due = begin = target.now()
    start, stop = begin + course.warmup_s, begin + course.warmup_s + course.seconds
    meant: list[float] = []
    lags: list[float] = []
    finished: dict[int, float] = {}
    for gap in gaps:
        due += gap
        if (due >= stop and meant and meant[-1] >= start) or len(meant) - len(finished) >= MOST_WAITING:
            break
        _receive_until(target, due, finished, len(meant))
        lags.append(max(0.0, target.now() - due))
        meant.append(due)
        target.send(len(meant) - 1)
    overloaded = due < stop
    stop = min(due, max(stop, meant[-1]))
    _receive_until(target, max(target.now(), stop) + course.seconds, finished, len(meant), drain=True)
    given_up = target.now()
    counted = [number for number, at in enumerate(meant) if at >= start]
    return Taken(
        start_s=start,
        stop_s=stop,
        finished_s=np.sort(np.array([finished[number] for number in counted if number in finished])),
        latencies_s=np.array([finished.get(number, given_up) - meant[number] for number in counted]),
        lag_s=np.array([lags[number] for number in counted]),
        unfinished=sum(number not in finished for number in counted),
        overloaded=overloaded,
    )


def _receive_until(target: Target, until: float, finished: dict[int, float], sent: int, drain: bool = False) -> None:
    """Note what finishes until then; with `drain` no longer than until all that was sent has finished."""
    while target.now() < until and not (drain and len(finished) == sent):
        done = target.receive(until)
        if done is not None:
            finished[done[0]] = done[1]


def all_at_once(target: Target, queries: int) -> Taken:
    """Send all queries, then wait for the last."""
    start = target.now()
    for number in range(queries):
        target.send(number)
    ends = np.empty(queries)
    for place in range(queries):
        done = target.receive()
        assert done is not None
        ends[place] = done[1]
    return Taken(start, float(ends.max()), np.sort(ends), ends - start)


def joined(parts: list[Taken]) -> Taken:
    """Rounds of the same load, one after the other, without the time between them."""
    shifts = np.cumsum([0.0, *(part.seconds for part in parts)])
    moved = [part.finished_s - part.start_s + shift for part, shift in zip(parts, shifts, strict=False)]
    return Taken(
        start_s=0.0,
        stop_s=float(shifts[-1]),
        finished_s=np.concatenate(moved),
        latencies_s=np.concatenate([part.latencies_s for part in parts]),
        lag_s=np.concatenate([part.lag_s for part in parts]),
        unfinished=sum(part.unfinished for part in parts),
        overloaded=any(part.overloaded for part in parts),
        warm=all(part.warm for part in parts),
    )

"""The search of `gpu-engine tune`: which streams, threads and batch to measure next. Arithmetic on what was measured.

A lane is a number of streams with the threads of each; its ladder are the batches, smallest first. Up a ladder latency
grows, and throughput until the processor is busy. So a lane is climbed from where the lane before was best, until the
tail of the latency misses the bound or throughput stops growing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GROWTH = 1.02
"""What another batch must bring to count as growth."""
PATIENCE = 2
"""So many steps without growth end a climb: one alone may be noise."""
GPU_STREAMS = 4
CLOSE, MOST_CONFIRMED = 0.95, 3
"""Points that reach this share of the best are measured again before one is chosen."""


@dataclass(frozen=True, order=True)
class Point:
    """A configuration; `threads` of each stream are the device's choice if None. `in_flight` requests are kept up."""

    streams: int
    threads: int | None
    batch: int
    in_flight: int

    @property
    def lane(self) -> tuple[int, int | None]:
        return self.streams, self.threads

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" of {_count(self.threads, 'thread')}"
        return f"{_count(self.streams, 'stream')}{threads}, batch {self.batch}, {self.in_flight} in flight"


@dataclass(frozen=True)
class Measured:
    """What a point gave; `tail_ms` is the percentile that the bound is for."""

    point: Point
    items_per_s: float
    median_ms: float
    tail_ms: float
    mean_batch: float = 0.0
    steady: bool = True


@dataclass(frozen=True)
class Space:
    """All points: lanes (streams, threads) that use the whole device, others that do not, and the batches of each."""

    full: tuple[tuple[int, int | None], ...]
    partial: tuple[tuple[int, int | None], ...]
    batches: tuple[int, ...]

    @property
    def lanes(self) -> tuple[tuple[int, int | None], ...]:
        return self.full + self.partial

    def ladder(self, lane: tuple[int, int | None]) -> list[Point]:
        """The points of a lane: one request for each stream, then two batches of each size for each stream."""
        streams, threads = lane
        return [
            Point(streams, threads, 1, streams),
            *(Point(streams, threads, batch, 2 * batch * streams) for batch in self.batches),
        ]

    @property
    def points(self) -> list[Point]:
        return [point for lane in self.lanes for point in self.ladder(lane)]


@dataclass(frozen=True)
class Found:
    """Every measurement in its order, the chosen one, and for each lane why no larger batch was measured."""

    measured: tuple[Measured, ...]
    chosen: Measured
    bound_ms: float | None
    measurements: int
    ends: dict[tuple[int, int | None], str]

    @property
    def within_bound(self) -> bool:
        return keeps(self.chosen, self.bound_ms)


Measure = Callable[[Point], Measured]


def space(cores: int | None, most_batch: int, most_streams: int | None = None) -> Space:
    """The space of a device: of a CPU with `cores`, or of one that divides itself (None).

    Streams are powers of two and as many as there are cores.
    """
    limit = most_streams or cores or GPU_STREAMS
    counts = [*_powers(limit), *([limit] if limit not in _powers(limit) else [])]
    if cores is None:
        return Space(tuple((streams, None) for streams in counts), (), _powers(most_batch))
    full = [(streams, cores // streams) for streams in counts if streams <= cores]
    partial = [(streams, threads) for streams, most in full for threads in reversed(_powers(most)) if threads < most]
    return Space(tuple(full), tuple(partial), _powers(most_batch))


def _powers(limit: int) -> tuple[int, ...]:
    return tuple(1 << exponent for exponent in range(max(1, limit).bit_length()))


def keeps(measured: Measured, bound_ms: float | None) -> bool:
    return bound_ms is None or measured.tail_ms <= bound_ms


def best(measured: Sequence[Measured], bound_ms: float | None) -> Measured:
    """The highest throughput within the bound; where nothing keeps it, the least tail."""
    good = [each for each in measured if keeps(each, bound_ms)]
    if good:
        return max(good, key=lambda each: each.items_per_s)
    return min(measured, key=lambda each: each.tail_ms)


def exhaustive(space: Space, measure: Measure, bound_ms: float | None) -> Found:
    """Measure every point."""
    measured = [measure(point) for point in space.points]
    ends = dict.fromkeys(space.lanes, "every batch was measured")
    return Found(tuple(measured), best(measured, bound_ms), bound_ms, len(measured), ends)


def search(space: Space, measure: Measure, bound_ms: float | None) -> Found:
    """Climb the lanes that fill the device, with more and more streams, then the best of them with fewer threads, as
    long as that brings something. The best points are measured again, and the means decide."""
    climb = _Climb(measure, bound_ms)
    start = 0
    for lane in space.full:
        start = climb.run(space.ladder(lane), start)
    point = best(climb.measured, bound_ms).point
    start = space.ladder(point.lane).index(point)
    for lane in [lane for lane in space.partial if lane[0] == point.streams]:
        before = climb.best_rate()
        climb.run(space.ladder(lane), start)
        if climb.best_rate() <= before:
            break
    measured, again = _confirmed(climb.measured, measure, bound_ms)
    return Found(tuple(measured), best(measured, bound_ms), bound_ms, len(measured) + again, climb.ends)


@dataclass
class _Climb:
    measure: Measure
    bound_ms: float | None
    measured: list[Measured] = field(default_factory=list)
    ends: dict[tuple[int, int | None], str] = field(default_factory=dict)

    def best_rate(self) -> float:
        return max((each.items_per_s for each in self.measured if keeps(each, self.bound_ms)), default=0.0)

    def run(self, ladder: Sequence[Point], start: int) -> int:
        """Climb a ladder from a rung, down where it misses the bound or nothing grows upwards; the best rung."""
        taken = {start: self._take(ladder[start])}
        if keeps(taken[start], self.bound_ms):
            self._up(ladder, start, taken)
        else:
            self.ends[ladder[0].lane] = _misses(ladder[start])
        if best([*taken.values()], self.bound_ms) is taken[start]:
            self._down(ladder, start, taken)
        chosen = best([*taken.values()], self.bound_ms)
        return next(rung for rung, each in taken.items() if each is chosen)

    def _up(self, ladder: Sequence[Point], start: int, taken: dict[int, Measured]) -> None:
        top, barren, end = taken[start].items_per_s, 0, "the largest batch was measured"
        for rung in range(start + 1, len(ladder)):
            taken[rung] = self._take(ladder[rung])
            if not keeps(taken[rung], self.bound_ms):
                end = _misses(ladder[rung])
                break
            barren = 0 if taken[rung].items_per_s > top * GROWTH else barren + 1
            top = max(top, taken[rung].items_per_s)
            if barren == PATIENCE:
                end = f"throughput stopped growing at batch {ladder[rung - PATIENCE].batch}"
                break
        self.ends[ladder[0].lane] = end

    def _down(self, ladder: Sequence[Point], start: int, taken: dict[int, Measured]) -> None:
        for rung in reversed(range(start)):
            before = best([*taken.values()], self.bound_ms)
            taken[rung] = self._take(ladder[rung])
            if best([*taken.values()], self.bound_ms) is before:
                break

    def _take(self, point: Point) -> Measured:
        self.measured.append(self.measure(point))
        return self.measured[-1]


def _confirmed(measured: list[Measured], measure: Measure, bound_ms: float | None) -> tuple[list[Measured], int]:
    """The measurements, those close to the best replaced by means with a second one; how many were made."""
    top = best(measured, bound_ms)
    close = [each for each in measured if keeps(each, bound_ms) and each.items_per_s >= CLOSE * top.items_per_s]
    if len(close) < 2:
        return measured, 0
    close = sorted(close, key=lambda each: -each.items_per_s)[:MOST_CONFIRMED]
    second = {each.point: _mean(each, measure(each.point)) for each in close}
    return [second.get(each.point, each) for each in measured], len(second)


def _mean(one: Measured, other: Measured) -> Measured:
    return Measured(
        one.point,
        (one.items_per_s + other.items_per_s) / 2,
        (one.median_ms + other.median_ms) / 2,
        (one.tail_ms + other.tail_ms) / 2,
        (one.mean_batch + other.mean_batch) / 2,
        one.steady and other.steady,
    )


def reasons(found: Found) -> list[str]:
    """Why the chosen point: sentences."""
    good = [each for each in found.measured if keeps(each, found.bound_ms)]
    chosen = found.chosen
    if not good:
        return [
            f"No point keeps the bound of {found.bound_ms:g} ms. "
            f"{chosen.point} comes closest, with {chosen.tail_ms:.3g} ms."
        ]
    share = "all" if len(good) == len(found.measured) else f"the {len(good)} of {len(found.measured)}"
    within = "measured" if found.bound_ms is None else f"measured points within {found.bound_ms:g} ms"
    sentences = [f"The most items a second of {share} {within}: {chosen.items_per_s:,.4g}, with {chosen.point}."]
    end = found.ends.get(chosen.point.lane)
    if end:
        sentences.append(f"With its streams and threads, {end}.")
    rivals = [each for each in good if each.point.lane != chosen.point.lane]
    if rivals:
        rival = max(rivals, key=lambda each: each.items_per_s)
        share_less = 1 - rival.items_per_s / chosen.items_per_s
        sentences.append(f"The best with others ({rival.point}) gives {share_less:.1%} less, {rival.items_per_s:,.4g}.")
    return sentences


def _misses(point: Point) -> str:
    return f"batch {point.batch} with {point.in_flight} in flight misses the bound"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"

"""What the soak watches beside its answers: progress, memory, threads, and latencies in bounded room."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

GROWTH_NBYTES = 16 << 20
"""What the resident memory may grow by after the warm-up, as the median of its last tenth. The allocator keeps pieces
that threads freed, and 64 threads that send requests of all sizes in a random order find new ways to split them for
minutes, a few MiB in all. A leak is another matter: at 3,000 requests a second 100 bytes each are 16 MiB in a minute.
"""
BUCKETS_PER_DECADE = 115
"""Latencies are counted in buckets 2 % wide."""
SHORTEST_S, DECADES = 1e-6, 9


class Progress:
    """When each client last did something, by a clock that stands still while others have the processor.

    Whoever watches calls `tick` every `period_s`. What it comes late by counts once more at most: on a machine that is
    busy with other things nobody hangs who merely gets no time.
    """

    def __init__(self, clients: int, period_s: float) -> None:
        self._period_s, self._now_s, self._ticked = period_s, 0.0, time.monotonic()
        self._beats = [0.0] * clients

    def tick(self) -> None:
        now = time.monotonic()
        self._now_s += min(now - self._ticked, 2 * self._period_s)
        self._ticked = now

    def beat(self, client: int) -> None:
        self._beats[client] = self._now_s

    def stalled(self, seconds: float) -> list[int]:
        """The clients that did nothing for so long."""
        return [client for client, beat in enumerate(self._beats) if self._now_s - beat > seconds]


@dataclass(frozen=True)
class Resources:
    """What the process holds, so many seconds after the start."""

    at_s: float
    nbytes: int
    threads: int

    @staticmethod
    def now(process: psutil.Process, at_s: float) -> Resources:
        return Resources(at_s, process.memory_info().rss, process.num_threads())


def growth(samples: Sequence[Resources], warm_up_s: float) -> list[str]:
    """What grew after the warm-up more than it may: medians of the tenth after it and of the last tenth."""
    later = [sample for sample in samples if sample.at_s >= warm_up_s]
    tenth = max(1, len(later) // 10)
    if len(later) < 2:
        return []
    first, last = later[:tenth], later[-tenth:]
    nbytes = statistics.median(one.nbytes for one in last) - statistics.median(one.nbytes for one in first)
    threads = max(one.threads for one in last) - max(one.threads for one in first)
    found = []
    if nbytes > GROWTH_NBYTES:
        found.append(f"memory grew by {nbytes / 2**20:.1f} MiB after the warm-up")
    if threads > 0:
        found.append(f"{threads} threads more than after the warm-up")
    return found


class Latencies:
    """A histogram of fixed size."""

    def __init__(self) -> None:
        self._counts = [0] * (BUCKETS_PER_DECADE * DECADES)

    def add(self, seconds: float) -> None:
        place = int(math.log10(max(seconds, SHORTEST_S) / SHORTEST_S) * BUCKETS_PER_DECADE)
        self._counts[min(place, len(self._counts) - 1)] += 1

    @staticmethod
    def merged(many: Iterable[Latencies]) -> Latencies:
        result = Latencies()
        for one in many:
            result._counts = [a + b for a, b in zip(result._counts, one._counts, strict=True)]
        return result

    def percentile(self, p: float) -> float:
        """The upper end of the bucket of the ceil(n * p / 100)-th smallest, in seconds; NaN of none."""
        wanted, seen = math.ceil(sum(self._counts) * p / 100), 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return float(SHORTEST_S * 10 ** ((place + 1) / BUCKETS_PER_DECADE))
        return math.nan

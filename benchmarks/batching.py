"""What batching is worth: `python -m benchmarks.batching`.

As many callers as `--callers` says call `run` in a closed loop, each with one row of its own, first on an engine that
may batch, up to 8 rows, and measures whether that pays, then on the same engine with batching off, in turns of one run;
the median over the turns counts, beside the same by CPU time, which other programs disturb less. Models whose cost is
weights or calls must gain, compute-bound ones must lose nothing. Then requests arrive at random (a Poisson process) at
70 % of the rate that the batching engine reached; latency counts from the intended arrival, and its 99th percentile
must stay below three times the latency of a lone request. Every output is compared with what an engine without batching
gives that row alone. Both engines hand every request from thread to thread and back, which bounds what batching can
gain where that costs as much as the arithmetic; so what it costs here is told, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gpu_engine
from benchmarks.batching_cases import CASES, Case, Feed
from benchmarks.contest import quiet_collector
from benchmarks.fetch import Unavailable
from gpu_engine.runtime.engine import Engine
from gpu_engine.tools.heap import frozen_heap
from gpu_engine.tools.measures import percentile

LOAD = 0.7
P99_LIMIT = 3.0
ROUNDS = 4
"""So many requests of every caller make a turn, or its last ones, which run with fewer beside them, would weigh in."""
Found = list[tuple[int, Any]]


@dataclass
class Contest:
    """One model: rates in rows a second by turn, the same in rows a second of CPU time, the latency of a lone request
    and of requests at random."""

    case: Case
    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    on_cpu: list[float] = field(default_factory=list)
    off_cpu: list[float] = field(default_factory=list)
    batch: float = 0.0
    reason: str = ""
    alone_s: float = 0.0
    p99_s: float = 0.0
    wrong: int = 0
    checked: int = 0

    @property
    def gain(self) -> float:
        """How many times the rate without batching: the median over turns side by side."""
        return statistics.median(on / off for on, off in zip(self.on, self.off, strict=True))

    @property
    def cpu_gain(self) -> float:
        """The same by CPU time of the whole process, callers included."""
        return statistics.median(on / off for on, off in zip(self.on_cpu, self.off_cpu, strict=True))

    @property
    def missed(self) -> list[str]:
        found = [f"gain {self.gain:.2f} < {self.case.target}"] * (self.gain < self.case.target)
        tail = self.p99_s / self.alone_s
        found += [f"p99 {tail:.1f} x a lone request >= {P99_LIMIT}"] * (tail >= P99_LIMIT)
        return found + [f"{self.wrong} wrong outputs"] * (self.wrong > 0)


def compete(case: Case, callers: int, turns: int, turn_s: float, open_s: float) -> Contest:
    """All measurements of one model."""
    feeds = case.feeds(callers)
    result = Contest(case)
    with (
        ExitStack() as opened,
        gpu_engine.compile(case.model(), device="cpu", streams="auto") as on,
        gpu_engine.compile(case.model(), device="cpu", streams="auto", auto_batching=False) as off,
    ):
        assert isinstance(on, Engine) and isinstance(off, Engine)
        on.warmup(feeds[0])
        expected = [off.run(feed) for feed in feeds]
        for engine in (on, off):
            rate, found = closed_loop(engine, feeds, turn_s / 2)
        opened.enter_context(frozen_heap())
        turn_s = max(turn_s, ROUNDS * callers / rate)
        before = on.statistics()
        for _ in range(turns):
            for engine, rates, by_cpu in ((on, result.on, result.on_cpu), (off, result.off, result.off_cpu)):
                used_s = time.process_time()
                rate, found = closed_loop(engine, feeds, turn_s)
                by_cpu.append(len(found) / (time.process_time() - used_s))
                rates.append(rate)
                check(result, found, expected)
        after = on.statistics()
        rows, launches = (getattr(after, n) - getattr(before, n) for n in ("inference_count", "execution_count"))
        result.batch, result.reason = rows / launches, on.explain_batching().reason
        result.alone_s = lone_latency(on, feeds, turn_s)
        with quiet_collector():  # all outputs are kept, which no server does: walking over them would be the tail
            latencies, found = open_loop(on, feeds, LOAD * statistics.median(result.on), open_s)
        result.p99_s = percentile(latencies, 99)
        check(result, found, expected)
    return result


def closed_loop(engine: Engine, feeds: Sequence[Feed], seconds: float) -> tuple[float, Found]:
    """Every feed from a thread of its own, again and again: rows a second, and all outputs by the feed's number."""
    found: list[Found] = [[] for _ in feeds]
    start = threading.Barrier(len(feeds) + 1)
    ends = [0.0]

    def call(number: int) -> None:
        run, feed, mine = engine.run, feeds[number], found[number]
        start.wait()
        while time.perf_counter() < ends[0]:
            mine.append((number, run(feed)))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(feeds))]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    ends[0] = started + seconds
    start.wait()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - started
    everything = [item for mine in found for item in mine]
    return len(everything) / took_s, everything


def lone_latency(engine: Engine, feeds: Sequence[Feed], seconds: float) -> float:
    """The median time of a request while no other is there."""
    times, ends = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < ends:
        started = time.perf_counter()
        engine.submit(feeds[len(times) % len(feeds)]).result()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def open_loop(engine: Engine, feeds: Sequence[Feed], rate: float, seconds: float) -> tuple[list[float], Found]:
    """Requests at random times, `rate` a second: each one's seconds from its intended time, and its outputs."""
    gaps = np.random.default_rng(7).exponential(1 / rate, max(64, int(rate * seconds)))
    done = [0.0] * len(gaps)
    futures = []
    started = time.perf_counter() + 0.01
    intended = (started + np.cumsum(gaps)).tolist()

    def stamp(number: int) -> Any:
        def finish(_: Any) -> None:
            done[number] = time.perf_counter()

        return finish

    for number, at in enumerate(intended):
        left = at - time.perf_counter()
        if left > 0:
            time.sleep(left)
        future = engine.submit(feeds[number % len(feeds)])
        future.add_done_callback(stamp(number))
        futures.append(future)
    found = [(number % len(feeds), future.result()) for number, future in enumerate(futures)]
    return [end - at for end, at in zip(done, intended, strict=True)], found


def handover_s(turns: int = 5000) -> float:
    """CPU seconds for one thread to wake another and sleep: every request of a caller that waits needs at least one."""
    here, there = threading.Lock(), threading.Lock()
    here.acquire()
    there.acquire()

    def answer() -> None:
        for _ in range(turns):
            here.acquire()
            there.release()

    other = threading.Thread(target=answer)
    other.start()
    used_s = time.process_time()
    for _ in range(turns):
        here.release()
        there.acquire()
    other.join()
    return (time.process_time() - used_s) / (2 * turns)


def check(result: Contest, found: Found, expected: Sequence[Any]) -> None:
    """Count outputs that are not, within the model's tolerance, those of the row alone."""
    for number, outputs in found:
        result.checked += 1
        result.wrong += not result.case.agrees(outputs, expected[number])


def table(results: Sequence[Contest]) -> str:
    """One line for each model."""
    lines = [
        f"{'model':28}{'off/s':>10}{'on/s':>10}{'gain':>7}{'by CPU':>8}{'target':>8}{'batch':>7}"
        f"{'alone ms':>10}{'p99 ms':>9}{'x':>6}{'checked':>9}"
    ]
    for found in results:
        off, on = statistics.median(found.off), statistics.median(found.on)
        lines.append(
            f"{found.case.name:28}{off:10,.0f}{on:10,.0f}{found.gain:7.2f}{found.cpu_gain:8.2f}{found.case.target:8}{found.batch:7.2f}"
            f"{found.alone_s * 1e3:10.2f}{found.p99_s * 1e3:9.2f}{found.p99_s / found.alone_s:6.2f}{found.checked:9,}"
        )
        lines += [f"    MISSED: {text}" for text in found.missed]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn-s", type=float, default=0.5)
    parser.add_argument("--open-s", type=float, default=2.0)
    arguments = parser.parse_args()
    results = []
    for name in arguments.models or CASES:
        try:
            result = compete(CASES[name], arguments.callers, arguments.turns, arguments.turn_s, arguments.open_s)
        except Unavailable as error:
            print(f"{name}: not measured, {error}")
            continue
        results.append(result)
        print(f"{name}: {result.reason}", flush=True)
    print(table(results))
    print(f"a thread that wakes another and sleeps takes {handover_s() * 1e6:.0f} us of CPU here")
    sys.exit(1 if any(found.missed for found in results) else 0)


if __name__ == "__main__":
    main()

"""One network through this engine: on the device alone, with copies, on several streams, and on the timeline."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import gpu_engine
from benchmarks.gpu_floor import Rates, floor
from benchmarks.gpu_networks import NEAR, Network, distance
from benchmarks.gpu_places import Place, opened, wall_times
from benchmarks.gpu_replay import Replay, replay
from benchmarks.gpu_timeline import overlap_of, profile_of
from gpu_engine.gpu.offline import compile_binary
from gpu_engine.gpu.planning import kernels_of
from gpu_engine.passes.batchability import prove
from gpu_engine.plan.plan import Plan
from gpu_engine.tools.measures import percentile

STREAMS, ONE_SLOT = (1, 2, 4), "one slot"
STREAM_EFFORTS = 4
"""How many times as long as another figure the rate of one number of streams is measured."""
AHEAD = 2
"""Requests that wait for every slot, so that none is idle because of the client."""
PROFILED_RUNS, WARM_ROUNDS = 5, 3


@dataclass(frozen=True)
class Subject:
    """A network lowered for the device, its kernels compiled; `compile_s` is what that took."""

    network: Network
    plan: Plan
    arch: int
    compile_s: float


def subject(network: Network, place: Place) -> Subject:
    """Compile with all processors, so that the engine finds its kernels on disk."""
    started_s = time.perf_counter()
    device: Any = opened(place.kernels, network.engine_precision)
    graph = network.graph()
    plan, arch = device.lower(graph, prove(graph)), getattr(device, "arch", 0)
    if arch:
        compile_ahead(plan, arch)
    return Subject(network, plan, arch, time.perf_counter() - started_s)


def compile_ahead(plan: Plan, arch: int) -> None:
    """Fill Triton's cache with a plan's kernels, a process for each processor."""
    kernels = kernels_of(plan)
    workers = min(len(kernels), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(compile_binary, kernels, itertools.repeat(arch)):
            pass


def figures(times_s: list[float], rows: int) -> dict[str, Any]:
    """Median and 99th percentile in milliseconds, rows a second by the median, and of how many."""
    middle = median(times_s)
    return {"median_ms": middle * 1e3, "p99_ms": percentile(times_s, 99) * 1e3, "rows_per_s": rows / middle,
            "runs": len(times_s)}  # fmt: skip


def measure(one: Subject, place: Place, rows: int, rates: Rates) -> dict[str, Any]:
    """`device`: the launches over inputs that lie on the GPU. `host`: `run` with arrays of the host, in and out."""
    feed = one.network.feed(rows)
    least = floor(one.network.graph(), feed, rates)
    found: dict[str, Any] = {"compile_s": one.compile_s, "floor": asdict(least)}
    with _engine(one.network, place, hint="LATENCY") as engine:
        expected = engine.run(feed)
        found["host"] = figures(wall_times(lambda: engine.run(feed), place.effort), rows)
    with _replaying(one, place, rows) as (ready, run):
        found["launches"] = len(ready.loaded)
        found["device"] = figures(place.engine_times(ready.driver, run), rows)
        pairs = zip(ready.outputs(), expected.values(), strict=True)
        found["distance"] = max(distance(output, wanted) for output, wanted in pairs)
    if found["distance"] > NEAR[one.network.precision]:
        raise AssertionError(f"the replay is {found['distance']:.1e} from what the engine gives")
    return found


def timeline(one: Subject, place: Place, rows: int) -> dict[str, Any]:
    """What lies between the kernels of a replay, and how much of the copies lies beside kernels under load."""
    with _replaying(one, place, rows) as (ready, run):
        whole_s = median(place.engine_times(ready.driver, run))

        def several() -> None:
            for _ in range(PROFILED_RUNS):
                run()
            ready.driver.finish()

        with ready.driver.active():
            kernels = profile_of(place.activities(several), PROFILED_RUNS, whole_s)
    with _engine(one.network, place, streams=1, auto_batching=False) as engine:
        requests = [one.network.feed(rows, seed) for seed in range(4)]
        _loop(engine.submit, requests, 2 * AHEAD, lambda done: done >= 2 * AHEAD)
        copies = overlap_of(place.activities(lambda: _loop(engine.submit, requests, 2 * AHEAD, lambda n: n >= 16)))
    return kernels | copies


def streams(one: Subject, place: Place, rows: int) -> dict[str, Any]:
    """Rows a second through `submit`, requests of `rows` each: one slot of one stream, then two slots of 1, 2 and 4."""
    limit_s = STREAM_EFFORTS * place.effort.seconds
    requests = [one.network.feed(rows, seed) for seed in range(4)]
    found: dict[str, Any] = {}
    with _engine(one.network, place, hint="LATENCY", streams=1) as engine:
        found[ONE_SLOT] = rows * _rate(engine, requests, AHEAD, limit_s)
    for count in STREAMS:
        with _engine(one.network, place, streams=count, auto_batching=False) as engine:
            found[str(count)] = rows * _rate(engine, requests, count * 2 * AHEAD, limit_s)
    return found


def _rate(engine: Any, requests: list[Any], in_flight: int, seconds: float) -> float:
    _loop(engine.submit, requests, in_flight, lambda done: done >= WARM_ROUNDS * in_flight)
    started_s = time.perf_counter()
    least = 2 * in_flight
    done = _loop(engine.submit, requests, in_flight,
                 lambda done: done >= least and time.perf_counter() - started_s >= seconds)  # fmt: skip
    return done / (time.perf_counter() - started_s)


def _loop(submit: Callable[[Any], Any], requests: list[Any], in_flight: int, enough: Callable[[int], bool]) -> int:
    """Keep so many requests in flight until so many are done; how many were."""
    waiting: deque[Any] = deque()
    source, done = itertools.cycle(requests), 0
    while not enough(done):
        while len(waiting) < in_flight:
            waiting.append(submit(next(source)))
        waiting.popleft().result()
        done += 1
    for future in waiting:
        future.result()
    return done + len(waiting)


def _engine(network: Network, place: Place, **options: Any) -> Any:
    return gpu_engine.compile(
        network.model,
        device=place.engine,
        precision=None if place.engine == "cpu" else network.engine_precision,
        warmup=False,
        **options,
    )


@contextmanager
def _replaying(one: Subject, place: Place, rows: int) -> Iterator[tuple[Replay, Callable[[], Any]]]:
    """The launches, and how they are started all at a time."""
    driver = place.driver(one.arch)
    with driver.active():
        ready = replay(one.plan, driver, one.network.feed(rows))
        driver.finish()
        run = place.replayable(driver, ready.run)
    yield ready, run

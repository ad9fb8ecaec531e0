"""Times tiles on a GPU: every candidate of a problem on cold caches, and the table of the fastest ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_problems import Problem, choices, plan_with
from gpu_engine.errors import DeviceError, OutOfMemory
from gpu_engine.gpu.driver import Touched
from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.tile_filter import examined
from gpu_engine.gpu.tiles import Choice
from gpu_engine.gpu.tuned_tiles import Record, bucket
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import is_float
from gpu_engine.plan.plan import Plan, root
from gpu_engine.plan.words import Address

RUNS, WARM_RUNS = 20, 3
Timer = Callable[[Callable[[], None]], float]
"""timer(run) gives the seconds that the device was busy with what `run` starts, on cold caches."""
Fits = Callable[[str, Any, int], bool]
"""fits(family, tile, arch) says whether a tile can be run well."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Launches with their memory: `held` keeps alive what the parameters point to."""

    launches: tuple[tuple[Any, tuple[int, int, int], Any], ...]
    held: tuple[Any, ...]

    def run(self, driver: Any) -> None:
        for loaded, grid, packed in self.launches:
            driver.launch(loaded, grid, packed, lambda: Touched((), ()))


def prepared(plan: Plan, driver: Any, rng: np.random.Generator) -> Prepared:
    """A plan whose extents are all known, with random numbers where it reads, counters at zero, and kernels loaded."""
    memories = {}
    counters = {buffer for step in plan.steps for buffer in step.kernel.zeroed}
    for index, buffer in enumerate(plan.buffers):
        shape = tuple(map(dims.number, buffer.shape))
        content = buffer.constant if buffer.constant is not None else _content(buffer.dtype, shape, rng)
        content = np.zeros_like(content) if index in counters else content
        if root(plan.buffers, index) == index:
            memories[index] = driver.allocate(content.nbytes)
            driver.upload(driver.array(memories[index], 0, shape, buffer.dtype), content)
    launches, held = [], []
    for step in plan.steps:
        assert isinstance(step.kernel, Launch)
        words = np.array([_word(word, plan, memories) for word in step.kernel.words], np.int64)
        loaded = driver.load(step.kernel.kernel)
        x, y, z = map(dims.number, step.kernel.grid)
        launches.append((loaded, (x, y, z), driver.pack(loaded, words, (x, y, z))))
        held.append(words)
    return Prepared(tuple(launches), (*held, *memories.values()))


def _content(dtype: Any, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if is_float(dtype):
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def _word(word: Any, plan: Plan, memories: dict[int, Any]) -> int:
    if isinstance(word, Address):
        return int(memories[root(plan.buffers, word.buffer)].address) + dims.number(word.offset)
    return dims.number(word)


def fastest(
    problem: Problem, driver: Any, timer: Timer, fits: Fits, runs: int = RUNS, tell: Tell = lambda line: None
) -> Record | None:  # fmt: skip
    """The record of the candidate with the least median, None where none can be run."""
    rng, best = np.random.default_rng(0), None
    for choice in choices(problem):
        if not fits(problem.family, choice.tile, problem.options.arch):
            continue
        try:
            median_s = _median_s(problem, choice, driver, timer, runs, rng)
        except (DeviceError, OutOfMemory) as error:
            tell(f"{problem.family} {choice.tile}: {error}")
            continue
        if best is None or median_s < best[1]:
            best = choice, median_s
    return None if best is None else _record(problem, *best)


def _median_s(
    problem: Problem, choice: Choice, driver: Any, timer: Timer, runs: int, rng: np.random.Generator
) -> float:  # fmt: skip
    ready = prepared(plan_with(problem, choice), driver, rng)
    for _ in range(WARM_RUNS):
        ready.run(driver)
    return statistics.median(timer(lambda: ready.run(driver)) for _ in range(runs))


def _record(problem: Problem, choice: Choice, median_s: float) -> Record:
    tile, extents = choice.tile, problem.extents
    fields = tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, tile.group_m
    where = bucket(map(dims.number, extents[:4]))
    return Record(problem.family, problem.kind, extents.nbytes, where, fields, choice.splits, median_s)


def tuned(
    problems: Iterable[Problem], driver: Any, timer: Timer, fits: Fits, runs: int, tell: Tell
) -> list[Record]:  # fmt: skip
    """A record for every bucket, the first problem of one standing for it."""
    found: dict[tuple[Any, ...], Record] = {}
    for problem in problems:
        key = problem.family, problem.kind, problem.extents.nbytes, bucket(map(dims.number, problem.extents[:4]))
        if key in found:
            continue
        record = fastest(problem, driver, timer, fits, runs, tell)
        if record is not None:
            found[key] = record
            tell(f"{problem.kind} {problem.family} {tuple(problem.extents)}: {record.tile} in {record.splits} parts, "
                 f"{record.median_s * 1e6:.1f} us")  # fmt: skip
    return sorted(found.values(), key=lambda one: (one.family, one.kind, one.nbytes, one.bucket))


def survives(family: str, tile: Any, arch: int) -> bool:
    """Whether compiling a tile shows nothing against it: see `tile_filter`."""
    return not examined(family, tile, arch)[1]


def kernels_of(problems: Sequence[Problem]) -> list[Any]:
    """The distinct kernels of all candidates, to be compiled by many processes first."""
    plans = (plan_with(problem, choice) for problem in problems for choice in choices(problem))
    return list(dict.fromkeys(step.kernel.kernel for plan in plans for step in plan.steps))

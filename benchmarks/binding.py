"""How long an unseen shape takes to bind, and what else happens meanwhile: `python -m benchmarks.binding`.

Binding is timed where a slot is staged for extents that it never saw, after memory for the largest has been reserved.
Then whole requests of 50 unseen shapes run under a profiler that sees every Python call of every thread: a call into
a pass, into the front end or into llvmlite, or of the built-in `compile`, would be counted. The same witness watches
the model being compiled, so that zero means something.
"""

from __future__ import annotations

import builtins
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import gpu_engine
from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from gpu_engine.compiler import open_device
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.options import parse_device
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Plan
from gpu_engine.plan.signature import Signature
from gpu_engine.runtime.device import Device

SHAPES = 50
TARGET_US, LIMIT_US = 2.0, 5.0
WATCHED = {"/gpu_engine/passes/": "passes", "/gpu_engine/frontend/": "front end", "/llvmlite/": "compilations"}
BUILT_IN = {builtins.compile, builtins.exec, builtins.eval}


@dataclass(frozen=True)
class Timing:
    """Seconds to bind each unseen shape, for a plan of `steps` steps."""

    steps: int
    seconds: tuple[float, ...]

    @property
    def us_per_step(self) -> float:
        """The median."""
        return statistics.median(self.seconds) * 1e6 / self.steps


def rec_shapes() -> list[tuple[int, ...]]:
    """50 widths and row counts of text lines, the widest last."""
    return [(1 + number % 3, 48, 96 + 8 * number) for number in range(SHAPES)]


def minilm_shapes() -> list[tuple[int, ...]]:
    """50 lengths and row counts of sentences, the longest last."""
    return [(1 + number % 3, 5 + number) for number in range(SHAPES)]


def lowered(path: Path) -> tuple[Plan, Device]:
    """The plan that `gpu_engine.compile` makes, and its device."""
    device, _ = open_device(parse_device("cpu"))
    graph = optimize(import_model(read(path), SpecificationFunctions()))
    return device.lower(graph, prove(graph)), device


def time_binding(path: Path, feeds: list[Feed]) -> Timing:
    """Bind the plan to the extents of every feed once."""
    plan, device = lowered(path)
    signature, names = Signature(plan), [port.name for port in plan.input_ports]
    extents = [signature.fit([feed[name].shape for name in names]).extents for feed in feeds]
    (stream,) = device.open(plan, 1, 1, 1)
    slot = stream.slots[0]
    slot.stage(tuple(map(max, zip(*extents, strict=True))))
    seconds = []
    for unseen in extents:
        began = time.perf_counter()
        slot.stage(unseen)
        seconds.append(time.perf_counter() - began)
    stream.close()
    return Timing(len(plan.steps), tuple(seconds))


@contextmanager
def witness(counts: Counter[str]) -> Iterator[None]:
    """Counts calls into what is WATCHED, in this thread and in all that start meanwhile."""
    kinds: dict[CodeType, str | None] = {}

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in kinds:
                kinds[code] = next((kind for part, kind in WATCHED.items() if part in code.co_filename), None)
            if (kind := kinds[code]) is not None:
                counts[kind] += 1
        elif event == "c_call" and argument in BUILT_IN:
            counts["compilations"] += 1

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def count_work(path: Path, feeds: list[Feed]) -> tuple[Counter[str], Counter[str]]:
    """Calls into passes, front end and compilers: (while the model compiles, while requests of all feeds run)."""
    counts: Counter[str] = Counter()
    with witness(counts):
        engine = gpu_engine.compile(path, device="cpu", streams=2, requests=16)
        engine.run(feeds[-1])
        compiling = counts.copy()
        counts.clear()
        for feed in feeds:
            engine.run(feed)
        for future in [engine.submit(feed) for feed in feeds]:
            future.result()
        running = counts.copy()
        engine.close()
    return compiling, running


def main() -> int:
    failed = False
    makers: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "ppocrv4_rec": rec_shapes,
        "minilm_l6_int8": minilm_shapes,
    }
    for name, shapes in makers.items():
        model = MODELS[name]
        feeds = [model.feed(*shape) for shape in shapes()]
        timing = time_binding(model.path(), feeds)
        compiling, running = count_work(model.path(), feeds)
        print(
            f"{name}: {timing.us_per_step:.2f} us a step (target {TARGET_US:g}, at most {LIMIT_US:g}): "
            f"{statistics.median(timing.seconds) * 1e6:,.0f} us for {timing.steps} steps, "
            f"from {min(timing.seconds) * 1e6:,.0f} to {max(timing.seconds) * 1e6:,.0f} over {len(feeds)} unseen shapes"
        )
        for kind in WATCHED.values():
            print(
                f"    {kind}: {compiling[kind]:,} calls while compiling, {running[kind]} while {len(feeds)} shapes ran"
            )
        failed |= (
            timing.us_per_step > LIMIT_US or running.total() > 0 or not all(compiling[k] for k in WATCHED.values())
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

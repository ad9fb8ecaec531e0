"""`gpu-engine bench` beside an application of 20 lines: `python -m benchmarks.agreement MODEL`.

Both keep the same requests in flight on one engine, in turns, each first in every other round; the medians must agree
within 5 per cent. On a machine that does other work meanwhile, the CPU time of an item tells more.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import gpu_engine
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.load import Course, closed_loop
from gpu_engine.tools.peers import Mode
from gpu_engine.tools.subject import open_subject

WITHIN = 0.05


def application(engine: gpu_engine.Engine, inputs: Any, in_flight: int, seconds: float) -> float:
    """What a user would write: rows a second through submit()."""
    flying = deque(engine.submit(inputs) for _ in range(in_flight))
    started, done = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        flying.popleft().result()
        flying.append(engine.submit(inputs))
        done += 1
    elapsed = time.perf_counter() - started
    for future in flying:
        future.result()
    return done / elapsed


def main(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")] = FOLDER / "digits.onnx",
    shape: Annotated[list[str] | None, typer.Option(help="As for bench.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="In flight.")] = 16,
    streams: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each turn.")] = 1.0,
) -> None:
    """Print both throughputs; exit with 1 if they differ by more than 5 per cent."""
    options = {"device": "cpu", "streams": streams, "requests": requests}
    subject = open_subject(model, options, Request(shapes=shape or ()))

    def bench() -> float:
        target = subject.target(Mode(cores=0, in_flight=requests, queue=True))
        taken = closed_loop(target, requests, Course(seconds))
        return len(taken.finished_s) / taken.seconds

    def program() -> float:
        return application(subject.engine, subject.feed, requests, seconds)

    found: dict[Callable[[], float], list[tuple[float, float]]] = {bench: [], program: []}
    for number in range(rounds):
        for each in (bench, program)[:: 1 if number % 2 else -1]:
            rows, cpu_s = subject.engine.statistics().inference_count, time.process_time()
            rate = each() * subject.rows
            used_s = time.process_time() - cpu_s
            found[each].append((rate, used_s / (subject.engine.statistics().inference_count - rows)))
    subject.close()
    _compare([*found.values()])


def _compare(found: list[list[tuple[float, float]]]) -> None:
    """Print the medians of (items a second, CPU seconds of an item); exit with 1 if the first differ too much."""
    console = Console(highlight=False)
    rates, costs = zip(
        *([statistics.median(column) for column in zip(*each, strict=True)] for each in found), strict=True
    )
    for name, rate, cost in zip(("bench", "application"), rates, costs, strict=True):
        console.print(f"{name:12}{rate:12,.1f} items/s{cost * 1e6:14,.1f} us of CPU time an item")
    console.print(f"{'ratio':12}{rates[0] / rates[1]:12.3f}        {costs[0] / costs[1]:14.3f}")
    raise typer.Exit(abs(rates[0] / rates[1] - 1) > WITHIN)


if __name__ == "__main__":
    typer.run(main)

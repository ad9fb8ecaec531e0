"""`gpu-engine bench` beside an application of 20 lines: `python -m benchmarks.agreement MODEL`.

Both keep the same requests in flight on engines of the same options, in turns of a second or two; the medians must
agree within 5 per cent.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import gpu_engine
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.load import Course, closed_loop
from gpu_engine.tools.peers import Mode
from gpu_engine.tools.subject import Request, open_subject

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
    ours, theirs = [], []
    for _ in range(rounds):
        target = subject.target(Mode(cores=0, in_flight=requests, queue=True))
        taken = closed_loop(target, requests, Course(seconds))
        ours.append(len(taken.finished_s) * subject.rows / taken.seconds)
        theirs.append(application(subject.engine, subject.feed, requests, seconds) * subject.rows)
    subject.close()
    bench, program = statistics.median(ours), statistics.median(theirs)
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    console = Console(highlight=False)
    console.print(f"bench        {bench:12,.1f} items/s")
    console.print(f"application  {program:12,.1f} items/s")
    console.print(f"ratio        {ratio:12.3f}, the median of {rounds} rounds")
    raise typer.Exit(abs(ratio - 1) > WITHIN)


if __name__ == "__main__":
    typer.run(main)

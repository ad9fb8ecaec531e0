"""The search of `gpu-engine tune` beside an exhaustive one: `python -m benchmarks.tuning MODEL --latency-ms 20`.

Both search once. Then the points that they chose are measured in turns, so that other work on the machine hits both
alike: the search's must reach 95 % of the other's throughput, in fewer measurements.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.fetch import ROOT
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.search import Measured, Point
from gpu_engine.tools.tune import Tuned, Tuning, measure_point, tune

WITHIN = 0.95
CONSOLE = Console(highlight=False, soft_wrap=True)


def searched(tuning: Tuning) -> Tuned:
    """Search and say what came of it."""
    found = tune(tuning, lambda point, *_: None)
    title = "exhaustive" if tuning.exhaustive else "search"
    CONSOLE.print(f"{title:10} {_text(found.found.chosen)}; {found.found.measurements} measurements")
    return found


def in_turns(tuning: Tuning, points: tuple[Point, Point], rounds: int) -> list[tuple[Measured, Measured]]:
    """Both points in every round."""
    options = {"device": "cpu"}
    return [
        (measure_point(tuning, options, points[0]), measure_point(tuning, options, points[1])) for _ in range(rounds)
    ]


def _text(measured: Measured) -> str:
    return f"{measured.point}: {measured.items_per_s:.4g} items/s, tail {measured.tail_ms:.3g} ms"


def main(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")] = ROOT / ".cache" / "models" / "ppocrv4_rec.onnx",
    shape: Annotated[list[str], typer.Option(help="As for bench.")] = ["x:1x3x48x320"],  # noqa: B006
    latency_ms: Annotated[float, typer.Option(help="The bound.")] = 60.0,
    percentile: Annotated[float, typer.Option()] = 99.0,
    seconds: Annotated[float, typer.Option(min=0.01)] = 1.0,
    max_batch: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Exit with 1 if the search missed the best by more than 5 % or took as many measurements."""
    request = Request(shapes=shape)
    quick = Tuning(model, {"device": "cpu"}, request, latency_ms, percentile, seconds, max_batch)
    ours, every = searched(quick), searched(replace(quick, exhaustive=True))
    points = ours.found.chosen.point, every.found.chosen.point
    turns = in_turns(quick, points, rounds) if points[0] != points[1] else []
    ratio = statistics.median([one.items_per_s / other.items_per_s for one, other in turns] or [1.0])
    for one, other in turns:
        CONSOLE.print(f"in turns   {one.items_per_s:.4g} and {other.items_per_s:.4g} items/s")
    fewer = ours.found.measurements < every.found.measurements
    CONSOLE.print(
        f"the search's point reaches {ratio:.1%} of the exhaustive one's, with {'fewer' if fewer else 'no fewer'}"
    )
    raise typer.Exit(ratio < WITHIN or not fewer)


if __name__ == "__main__":
    typer.run(main)

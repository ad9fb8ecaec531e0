"""The options of `gpu-engine tune`, its progress and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpu_engine.tools.bench_command import Config, Device, Inputs, Model, Precision, Seed, Shapes
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.measures import rank
from gpu_engine.tools.report import page, short
from gpu_engine.tools.search import Point, keeps
from gpu_engine.tools.tune import Tuned, Tuning, configuration_text
from gpu_engine.tools.tune import tune as find


def tune(
    model: Model,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", min=0.001, help="The most that the tail latency may be.")
    ] = None,
    percentile: Annotated[float, typer.Option("--percentile", help="Which percentile is the tail.")] = 99.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The configuration to write; MODEL.toml here unless given.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="The report to write; beside the configuration unless given.")
    ] = None,
    device: Device = "auto",
    config: Config = None,
    precision: Precision = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="The largest batch to try.")] = 32,
    seconds: Annotated[float, typer.Option("--seconds", "-t", min=0.01, help="Measured at each point at least.")] = 2.0,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Measure every point.")] = False,
    inputs: Inputs = None,
    shapes: Shapes = None,
    seed: Seed = 0,
) -> None:
    """Find the streams, threads and batch with the highest throughput within a latency bound, by measuring."""
    rank(1, percentile)
    console = Console()
    kept = {"device": device, "config": config, "precision": precision}
    wanted = Tuning(
        model=model,
        options={name: value for name, value in kept.items() if value is not None},
        request=Request(inputs or (), shapes or (), seed),
        bound_ms=latency_ms,
        percent=percentile,
        seconds=seconds,
        most_batch=max_batch,
        exhaustive=exhaustive,
    )
    columns = (BarColumn(), TextColumn("{task.completed} of at most {task.total}"), TimeElapsedColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task("compiling", total=None)

        def tell(point: Point, done: int, most: int) -> None:
            progress.update(task, description=str(point), completed=done, total=max(most, done))

        tuned = find(wanted, tell)
    _write(tuned, output or Path(model.stem + ".toml"), report, console)


def _write(tuned: Tuned, output: Path, report: Path | None, console: Console) -> None:
    output.write_text(configuration_text(tuned), encoding="utf-8")
    report = report or output.with_suffix(".html")
    report.write_text(page(tuned), encoding="utf-8")
    console.print(table(tuned))
    for sentence in tuned.reasons:
        console.print(sentence, highlight=False)
    points = len(tuned.space.points)
    console.print(f"{tuned.found.measurements} measurements; the space has {points} points", highlight=False)
    console.print(f"configuration in {output}, report in {report}", highlight=False, soft_wrap=True)


def table(tuned: Tuned) -> Table:
    """Every measurement, in the order of the points."""
    grid = Table(box=SIMPLE_HEAD)
    titles = ("streams", "threads", "batch", "in flight", "items/s", "median ms", f"p{tuned.tuning.percent:g} ms", "")
    for title in titles:
        grid.add_column(title, justify="right")
    for each in sorted(tuned.found.measured, key=lambda each: each.point):
        remark = "chosen" if each == tuned.found.chosen else "" if keeps(each, tuned.found.bound_ms) else "too slow"
        point = each.point
        counts = (point.streams, "" if point.threads is None else point.threads, point.batch, point.in_flight)
        figures = map(short, (each.items_per_s, each.median_ms, each.tail_ms))
        grid.add_row(*map(str, counts), *figures, remark, style="bold" if remark == "chosen" else "")
    return grid

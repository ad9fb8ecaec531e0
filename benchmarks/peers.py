"""This engine beside ONNX Runtime and OpenVINO over the whole catalogue: `python -m benchmarks.peers`.

For every model, at the size that clients bring, in turns: the CPU time of one inference on one thread, then inferences
a second with every core busy. Of many short samples the least CPU time counts, so that other work on the machine hits
all alike, and the median throughput: threads that wait for each other have lucky moments, which no client can count on.
Every output is compared with ONNX Runtime's, its optimisations off. Each measurement becomes a row of a CSV file, and
the ratios a chart: how many times as fast as the faster peer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import peer_report as report
from benchmarks.arithmetic import model_flops
from benchmarks.contest import Contender, contest, peak, quiet_collector
from benchmarks.engines import OPENERS, OURS, PACKAGES, Opened, Outputs, exact_session
from benchmarks.fetch import ROOT, Unavailable
from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from benchmarks.peer_chart import draw
from benchmarks.peer_report import CPU, THROUGHPUT, Comparison, Row
from benchmarks.real_model import RealModel, Tolerance
from cpu_fallback.cores import usable_cores
from cpu_fallback.native import host
from gpu_engine.tools.environment import processor

RESULTS, TRIALS = ROOT / "benchmarks" / "results", ROOT / ".cache" / "results"
CPU_SAMPLE_S, WALL_SAMPLE_S = 2e-3, 30e-3
CONSOLE = Console(width=160)


@dataclass(frozen=True)
class Case:
    """A model with its inputs, what ONNX Runtime gives for them, and its operations where they are known."""

    model: RealModel
    path: str
    feed: Feed
    expected: Outputs
    flops: int | None


def prepared(model: RealModel) -> Case:
    """Raises `Unavailable` where the file cannot be had."""
    path, feed = str(model.path()), model.feed(*model.timed_shape)
    expected = list(exact_session(path, optimized=False).run(None, feed))
    return Case(model, path, feed, expected, model_flops(path, feed))


def measure(case: Case, kind: str, seconds: float) -> list[Row]:
    """One row for each engine; `seconds` for each of them."""
    cores = len(usable_cores().numbers)
    opened, reasons = {}, {}
    with ExitStack() as open_engines, quiet_collector():
        for name, opener in OPENERS.items():
            try:
                engine = opener(case.path, case.feed, 1 if kind == CPU else cores)
                open_engines.callback(engine.close)
                engine.infer()
                opened[name] = engine
            except Exception as refusal:
                reasons[name] = _reason(refusal)
        errors = {name: _difference(engine.infer(), case) for name, engine in opened.items()}
        times_s, peak_gflops = _race(opened, kind, seconds)
    rows = []
    for name in OPENERS:
        taken_s = times_s.get(name)
        error, agrees = errors.get(name, (None, True))
        value = None if taken_s is None else taken_s * 1e3 if kind == CPU else cores / taken_s
        gflops = case.flops / taken_s / 1e9 if case.flops and taken_s and kind == CPU else None
        rows.append(
            Row(
                date.today().isoformat(), processor(), cores, case.model.name, _shapes(case.feed), kind, name,
                version(PACKAGES[name]) if name in PACKAGES else "", value, error, agrees, gflops,
                peak_gflops if gflops else None, reasons.get(name, ""),
            )
        )  # fmt: skip
    return rows


def _race(opened: Mapping[str, Opened], kind: str, seconds: float) -> tuple[dict[str, float], float]:
    """({engine: seconds for an inference on every core that it has}, the peak in GFLOP/s of one core)."""
    contenders = [Contender(name, engine.work) for name, engine in opened.items()]
    if kind == THROUGHPUT:
        contest(contenders, seconds * len(contenders), time.perf_counter_ns, WALL_SAMPLE_S)
        return {contender.name: contender.median_s for contender in contenders}, 0.0
    top, operations = peak(host())
    contest([*contenders, top], seconds * len(contenders), time.process_time_ns, CPU_SAMPLE_S)
    return {contender.name: contender.best_s for contender in contenders}, operations / top.best_s / 1e9


def _difference(outputs: Outputs, case: Case) -> tuple[float, bool]:
    """(the largest difference, whether the tolerance allows it); a sequence of maps by its values."""
    found = [_one_difference(*pair, case.model.tolerance) for pair in zip(outputs, case.expected, strict=True)]
    return max(error for error, _ in found), all(agrees for _, agrees in found)


def _one_difference(found: object, expected: object, tolerance: Tolerance) -> tuple[float, bool]:
    if isinstance(expected, list) and isinstance(found, list):
        found, expected = ([list(entry.values()) for entry in maps] for maps in (found, expected))
    ours, theirs = np.asarray(found), np.asarray(expected)
    if ours.shape != theirs.shape:
        return float("nan"), False
    if theirs.dtype.kind not in "fiub":
        return 0.0, bool((ours == theirs).all())
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    agrees = np.allclose(ours, theirs, tolerance.rtol, tolerance.atol, equal_nan=True)
    error = np.abs(ours - theirs)
    return float(error.max(initial=0.0)), bool(agrees and error.mean() <= tolerance.mean)


def _reason(error: Exception) -> str:
    """The last line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def _shapes(feed: Feed) -> str:
    return " ".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in feed.items())


def table(rows: Sequence[Row], kind: str) -> Table:
    """Every model's figures under one measure."""
    grid = Table(title=f"{report.TITLES[kind]}, {'ms' if kind == CPU else 'inferences a second'}", title_justify="left")
    for title in ("model", *OPENERS, "ratio", *(("GFLOP/s", "of peak") if kind == CPU else ()), "error", "remark"):
        grid.add_column(title, justify="left" if title in ("model", "remark") else "right", no_wrap=title != "remark")
    for found in report.comparisons(rows, kind):
        grid.add_row(*_cells(found))
    return grid


def _cells(found: Comparison) -> list[str]:
    ours, ratio = found.rows[0], found.ratio
    values = ["-" if row.value is None else f"{row.value:.4g}" for row in found.rows]
    colour = "" if ratio is None else "[green]" if ratio >= 1 else "[red]"
    share = ours.gflops / ours.peak_gflops if ours.gflops and ours.peak_gflops else None
    speed = [] if found.measure != CPU else [f"{ours.gflops:.1f}", f"{share:.0%}"] if share else ["", ""]
    notes = [f"{row.engine}: {row.note}" for row in found.rows if row.note]
    notes += [f"{row.engine} is off by {report.exact(row.error)}" for row in found.rows if not row.agrees]
    return [
        found.model, *values, "-" if ratio is None else f"{colour}{ratio:.2f}", *speed,
        report.exact(ours.error), "; ".join(notes),
    ]  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Both tables, and the means."""
    for kind in report.TITLES:
        if any(row.measure == kind for row in rows):
            CONSOLE.print(table(rows, kind))
    for line in report.summary(rows):
        CONSOLE.print(f"{line[0]}: geometric mean {line[2]} over {line[1]} models, least {line[3]}, {line[4]} below 1")
    for remark in report.remarks(rows):
        CONSOLE.print(remark)
    peaks = [row.peak_gflops for row in rows if row.peak_gflops]
    if peaks:
        CONSOLE.print(f"{processor()}: multiply-adds on registers, one core: {max(peaks):.1f} GFLOP/s")


def measured(names: Sequence[str], kinds: Sequence[str], seconds: float, path: Path) -> list[Row]:
    """Measure models one after the other; the file holds what there is after each."""
    rows: list[Row] = []
    for name in names:
        try:
            case = prepared(MODELS[name])
        except Unavailable as reason:
            CONSOLE.print(f"{name} is left out: {reason}")
            continue
        for kind in kinds:
            found = measure(case, kind, seconds)
            rows += found
            (comparison,) = report.comparisons(found, kind)
            CONSOLE.print(f"{report.TITLES[kind]:26}", *_cells(comparison), sep="  ", soft_wrap=True)
            report.write_rows(path, rows)
    return rows


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each engine, model and measure.")] = 3.0,
    only: Annotated[str, typer.Option(help="cpu or throughput.")] = "",
    update: Annotated[Path | None, typer.Option(help="Rewrite the figures in this Markdown file.")] = None,
    redraw: Annotated[Path | None, typer.Option(help="Measure nothing: take the rows of this CSV file.")] = None,
) -> None:
    """Compare with ONNX Runtime and OpenVINO. Exits with 1 if an output of ours is outside its tolerance."""
    kinds = {"": (CPU, THROUGHPUT), "cpu": (CPU,), "throughput": (THROUGHPUT,)}.get(only)
    unknown = set(model or ()) - set(MODELS)
    if kinds is None or unknown:
        raise typer.BadParameter(f"no model {', '.join(unknown)}" if unknown else f"--only {only}: cpu or throughput")
    folder = redraw.parent if redraw else TRIALS if model else RESULTS
    path = redraw or folder / f"peers-{date.today().isoformat()}.csv"
    rows = report.read_rows(path) if redraw else measured(model or list(MODELS), kinds, seconds, path)
    show(rows)
    draw(folder / report.CHART, rows)
    CONSOLE.print(f"rows in {path}, chart in {folder / report.CHART}")
    if update is not None:
        chart, file = (os.path.relpath(place, update.parent) for place in (folder / report.CHART, path))
        report.update_between_marks(update, report.markdown(rows, chart, file))
    if any(row.engine == OURS and not row.agrees for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

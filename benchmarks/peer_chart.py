"""The chart of `benchmarks.peers`: two bars for each model, from 1 to how many times as fast as the best peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.contest import geometric_mean
from benchmarks.peer_report import CPU, THROUGHPUT, TITLES, Row, ratios

INK, FAINT = "#768390", "#76839055"  # read on white and on black
COLOURS = {CPU: "#1f83e0", THROUGHPUT: "#e0791b"}
WIDE_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0)
BAR, ROW_INCHES = 0.4, 0.235


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Write the chart as the kind of file that the path's suffix names, on a transparent ground."""
    found = {measure: ratios(rows, measure) for measure in TITLES}
    order = found[CPU] or found[THROUGHPUT]
    models = sorted({model for group in found.values() for model in group}, key=lambda model: order.get(model, 0.0))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "peers", "font.size": 8.5, "text.color": INK}):
        figure = Figure(figsize=(8.6, 1.3 + ROW_INCHES * len(models)), layout="constrained")
        axes = figure.add_subplot()
        for shift, measure in ((BAR / 2, CPU), (-BAR / 2, THROUGHPUT)):
            _bars(axes, models, found[measure], measure, shift)
        _frame(axes, models, [ratio for group in found.values() for ratio in group.values()])
        figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=INK)
        first = rows[0]
        figure.supxlabel(f"{first.processor}, {first.cores} cores, {first.date}", fontsize=7.5, color=INK)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Axes, models: Sequence[str], found: dict[str, float], measure: str, shift: float) -> None:
    """The bars of one measure, each with its figure behind its end."""
    if not found:
        return
    places = [(place + shift, found[model]) for place, model in enumerate(models) if model in found]
    mean = geometric_mean(list(found.values()))
    label = f"{TITLES[measure]} (geometric mean {mean:.2f})"
    heights, widths = [place for place, _ in places], [ratio - 1 for _, ratio in places]
    axes.barh(heights, widths, BAR, left=1, color=COLOURS[measure], label=label, linewidth=0)
    for place, ratio in places:
        near, side = (3, "left") if ratio >= 1 else (-3, "right")
        axes.annotate(
            f"{ratio:.2f}", (ratio, place), (near, 0), textcoords="offset points", va="center_baseline", ha=side,
            fontsize=5.5, color=INK,
        )  # fmt: skip


def _frame(axes: Axes, models: Sequence[str], found: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(0.8, min(found) * 0.85), max(2.1, max(found) * 1.1)
    axes.set_xlim(low, high)
    axes.set_ylim(-0.7, len(models) - 0.3)
    axes.xaxis.set_major_locator(FixedLocator(FINE_TICKS if high < 8 * low else WIDE_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(models)), models)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("times as fast as the faster of ONNX Runtime and OpenVINO", color=INK)

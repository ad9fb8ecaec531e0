"""The page that `gpu-engine tune` writes: one HTML file with its chart, which loads nothing.

The chart is a list of HTML buttons over an SVG of lines, laid out in per cent, so that it fits any width, its points
can be reached by keyboard and its colours follow the reader's light or dark scheme. plotly's script alone would be
4.8 MB and bokeh's 1.3 MB of a page that is about 30 kB so.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined

from gpu_engine.tools.axes import Axis, linear_axis, log_axis
from gpu_engine.tools.search import Measured, keeps
from gpu_engine.tools.tune import Tuned, configuration_text


@dataclass(frozen=True)
class Dot:
    """A measured point on the chart: its place in per cent from the lower left corner, and what it says."""

    measured: Measured
    left: float
    bottom: float
    kept: bool
    chosen: bool


@dataclass(frozen=True)
class Series:
    """The points of one number of streams and threads, in the order of their latency."""

    name: str
    dots: tuple[Dot, ...]

    @property
    def line(self) -> str:
        """The points of an SVG polyline in a box of 100 by 100."""
        return " ".join(f"{dot.left:.2f},{100 - dot.bottom:.2f}" for dot in self.dots)


@dataclass(frozen=True)
class Chart:
    """Series over a logarithmic axis of latency and a linear one of throughput; the bound's place in per cent."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bound: float | None


def chart(tuned: Tuned) -> Chart:
    """Where everything lies."""
    found, bound_ms = tuned.found, tuned.found.bound_ms
    x = log_axis([each.tail_ms for each in found.measured] + ([] if bound_ms is None else [bound_ms]))
    y = linear_axis([each.items_per_s for each in found.measured])

    def dot(each: Measured) -> Dot:
        place = x.place(each.tail_ms), y.place(each.items_per_s)
        return Dot(each, *place, keeps(each, bound_ms), each == found.chosen)

    lanes = groupby(sorted(found.measured, key=lambda each: each.point), key=lambda each: each.point.lane)
    series = [Series(_lane(lane), tuple(map(dot, points))) for lane, points in lanes]
    return Chart(x, y, tuple(series), None if bound_ms is None else x.place(bound_ms))


def _lane(lane: tuple[int, int | None]) -> str:
    streams, threads = lane
    name = f"{streams} stream{'s' * (streams != 1)}"
    return name if threads is None else f"{name}, {threads} thread{'s' * (threads != 1)} each"


def page(tuned: Tuned) -> str:
    """The whole HTML file."""
    environment = Environment(
        loader=PackageLoader("gpu_engine.tools", "report_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    template = environment.get_template("page.html.jinja")
    return template.render(tuned=tuned, found=tuned.found, chart=chart(tuned), configuration=configuration_text(tuned))


def short(value: float) -> str:
    """A number of three digits, more where they stand before the point; no needless zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

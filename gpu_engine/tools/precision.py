"""`gpu-engine precision`: how far a model's outputs move when a GPU multiplies in fewer bits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import gpu_engine
from gpu_engine.gpu.options import PRECISIONS
from gpu_engine.ir.dtypes import STRING
from gpu_engine.options import parse_device
from gpu_engine.tools.feeds import Feed, Request, feed_of
from gpu_engine.tools.files import named_outputs

Array = NDArray[Any]
REFERENCE = "fp32"
TITLES = ("output", "precision", "max abs error", "max rel error", "cosine", "SQNR dB", "not finite")


@dataclass(frozen=True)
class Distance:
    """How far an output is from the float32 result.

    `max_relative_error` is over elements that are not 0 there. `sqnr_db` is 10 log10 of the sum of the squares of the
    result over that of the differences: None where nothing differs. `not_finite` counts elements that are finite there
    and infinite or NaN here, or the other way round; the other numbers leave out all that are not finite in both.
    """

    output: str
    precision: str
    max_abs_error: float
    max_relative_error: float
    cosine_similarity: float
    sqnr_db: float | None
    not_finite: int


@dataclass(frozen=True)
class Report:
    """The distances of every output in every precision; `skipped` are outputs that hold no numbers."""

    model: str
    device: str
    distances: tuple[Distance, ...]
    skipped: tuple[str, ...]


def measure(model: Path, device: str, request: Request) -> Report:
    """Run a model once in every precision on the same inputs. ValueError for a device that has one precision only;
    raises what `feed_of` raises."""
    if parse_device(device).kind == "cpu":
        raise ValueError("the CPU always computes in float32: give --device cuda, or interpret where there is no GPU")
    feed: Feed = {}
    results: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        with gpu_engine.compile(model, device=device, precision=precision) as engine:
            feed = feed or feed_of(engine, request)
            results[precision] = named_outputs(engine.run(feed))
    wanted = results[REFERENCE]
    numbers = [name for name, value in wanted.items() if _is_numeric(value)]
    distances = tuple(
        distance(name, precision, np.asarray(wanted[name]), np.asarray(results[precision][name]))
        for name in numbers
        for precision in PRECISIONS[1:]
    )
    return Report(str(model), device, distances, tuple(name for name in wanted if name not in numbers))


def distance(name: str, precision: str, wanted: Array, found: Array) -> Distance:
    """Between two arrays of one shape. Where nothing is left to compare errors are 0 and the cosine is 1."""
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    odd = int((np.isfinite(a) != np.isfinite(b)).sum())
    a, b = a[finite], b[finite]
    error = np.abs(a - b)
    relative = error[a != 0] / np.abs(a[a != 0])
    noise, signal, other = float(error @ error), float(a @ a), float(b @ b)
    cosine = float(a @ b) / math.sqrt(signal * other) if signal * other else float(signal == other)
    ratio = None if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return Distance(name, precision, float(error.max(initial=0)), float(relative.max(initial=0)), cosine, ratio, odd)


def table(report: Report) -> Table:
    """A row for every output and precision."""
    grid = Table(title=f"{report.model} on {report.device}, beside {REFERENCE}")
    for title in TITLES:
        grid.add_column(title, overflow="fold")
    for row in report.distances:
        ratio = "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        grid.add_row(
            row.output, row.precision, f"{row.max_abs_error:.3g}", f"{row.max_relative_error:.3g}",
            f"{row.cosine_similarity:.8f}", ratio, str(row.not_finite),
        )  # fmt: skip
    return grid


def as_json(report: Report) -> str:
    rows = [
        {key: None if value == -math.inf else value for key, value in asdict(row).items()} for row in report.distances
    ]  # fmt: skip
    return json.dumps(
        {"model": report.model, "device": report.device, "reference": REFERENCE, "outputs": rows,
         "skipped": list(report.skipped)}, indent=2,
    )  # fmt: skip


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype != STRING and value.dtype.kind not in "UOc"

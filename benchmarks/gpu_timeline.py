"""What a device's timeline says: time in kernels, time between them, and copies that lie beside kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu_places import Activity

Spans = list[tuple[float, float]]


def profile_of(activities: Sequence[Activity], runs: int, whole_s: float) -> dict[str, Any]:
    """Of `runs` runs that take `whole_s` each: milliseconds of a run in kernels, the rest of it, kernels of a run, and
    the median pause between one kernel and the next. Nothing where no kernel was seen."""
    kernels = sorted((one for one in activities if not one.copy), key=lambda one: one.start_s)
    if not kernels:
        return {"run_ms": whole_s * 1e3}
    busy_s = sum(end - start for start, end in united(kernels)) / runs
    pauses = sorted(max(0.0, after.start_s - before.end_s) for before, after in pairwise(kernels))
    return {
        "run_ms": whole_s * 1e3,
        "kernels_ms": busy_s * 1e3,
        "gaps_ms": max(0.0, whole_s - busy_s) * 1e3,
        "kernels": len(kernels) / runs,
        "pause_us": pauses[len(pauses) // 2] * 1e6 if pauses else 0.0,
    }


def overlap_of(activities: Sequence[Activity]) -> dict[str, Any]:
    """Milliseconds of copies and of kernels, and the share of the copies during which a kernel ran; nothing where
    nothing was copied."""
    copies = united([one for one in activities if one.copy])
    kernels = united([one for one in activities if not one.copy])
    copied_s = sum(end - start for start, end in copies)
    if not copied_s:
        return {}
    return {
        "copies_ms": copied_s * 1e3,
        "computed_ms": sum(end - start for start, end in kernels) * 1e3,
        "copies_beside_kernels": common(copies, kernels) / copied_s,
    }


def united(activities: Sequence[Activity]) -> Spans:
    """The time in which any of them ran, as spans that do not touch, in order."""
    spans: Spans = []
    for start, end in sorted((one.start_s, one.end_s) for one in activities):
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans


def common(first: Spans, second: Spans) -> float:
    """How long both run; spans as `united` gives them."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total

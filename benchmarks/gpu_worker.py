"""A process of `benchmarks.gpu`: measures cells, and prints a line for each.

python -m benchmarks.gpu_worker '{"place": "host", "cells": [...], "ceilings": {...}, "skeletons": "folder"}'
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_checks, gpu_ours
from benchmarks.gpu_cells import (
    COMPILED,
    EAGER,
    KERNELS,
    NETWORK_CHECK,
    OURS,
    RATES,
    SIZES_CHECK,
    STREAMS,
    STREAMS_CHECK,
    TIMELINE,
    Cell,
    from_record,
)
from benchmarks.gpu_floor import rates_at
from benchmarks.gpu_jobs import line
from benchmarks.gpu_networks import Network, network
from benchmarks.gpu_places import Place, place
from gpu_engine.runtime.late import load

TORCH = "benchmarks.gpu_torch:measure"
CEILINGS, SHARES = "benchmarks.gpu_ceilings:rates", "benchmarks.gpu_ceilings:kernels"
"""PyTorch is imported with them, which processes that compile kernels, and so import this module, do without."""
FEW_ROWS, MANY_ROWS = (1, 3), (1, 5, 64)
"""Batches of a network that is checked."""


@dataclass
class Bench:
    """What the cells of a process share: networks stay lowered."""

    place: Place
    ceilings: dict[str, Any]
    skeletons: Path
    lowered: dict[tuple[str, str], gpu_ours.Subject] = field(default_factory=dict)

    def network(self, cell: Cell) -> Network:
        return network(cell.model, cell.precision, self.skeletons)

    def subject(self, cell: Cell) -> gpu_ours.Subject:
        key = cell.model, cell.precision
        if key not in self.lowered:
            self.lowered[key] = gpu_ours.subject(self.network(cell), self.place)
        return self.lowered[key]


def _ours(bench: Bench, cell: Cell) -> dict[str, Any]:
    rates = rates_at(bench.ceilings, cell.precision)
    return gpu_ours.measure(bench.subject(cell), bench.place, cell.batch, rates)


def _torch(bench: Bench, cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = load(TORCH)(bench.network(cell), bench.place, cell.batch, cell.kind == COMPILED)
    return found


def _check_network(bench: Bench, cell: Cell) -> dict[str, Any]:
    exact = network(cell.model, "fp32", bench.skeletons)
    rows = FEW_ROWS if bench.place.engine == "cpu" else MANY_ROWS
    return gpu_checks.network(exact, bench.subject(cell).network, bench.place, rows)


MEASURES: dict[str, Callable[[Bench, Cell], dict[str, Any]]] = {
    RATES: lambda bench, cell: load(CEILINGS)(bench.place),
    KERNELS: lambda bench, cell: load(SHARES)(bench.place, bench.ceilings),
    OURS: _ours,
    EAGER: _torch,
    COMPILED: _torch,
    STREAMS: lambda bench, cell: gpu_ours.streams(bench.subject(cell), bench.place, cell.batch),
    TIMELINE: lambda bench, cell: gpu_ours.timeline(bench.subject(cell), bench.place, cell.batch),
    NETWORK_CHECK: _check_network,
    SIZES_CHECK: lambda bench, cell: gpu_checks.sizes(bench.place),
    STREAMS_CHECK: lambda bench, cell: gpu_checks.streams(bench.place),
}


def measured(bench: Bench, cell: Cell) -> dict[str, Any] | str:
    """The values and the `seconds` that it took to find them, or the reason why there are none."""
    started_s = time.perf_counter()
    try:
        found = MEASURES[cell.kind](bench, cell)
        if cell.kind == RATES:
            bench.ceilings.update(found)
        return found | {"seconds": time.perf_counter() - started_s}
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' | '.join(str(error).splitlines()[:3])}"[:500]


def main(request: str) -> int:
    asked = json.loads(request)
    bench = Bench(place(asked["place"]), asked["ceilings"], Path(asked["skeletons"]))
    for cell in map(from_record, asked["cells"]):
        print(line(cell, measured(bench, cell)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""What `benchmarks.gpu` measures, most important first, and which of it shares a process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

RATES, KERNELS = "rates", "kernels"
OURS, EAGER, COMPILED = "ours", "eager", "compiled"
STREAMS, TIMELINE = "streams", "timeline"
NETWORK_CHECK, SIZES_CHECK, STREAMS_CHECK = "check network", "check sizes", "check streams"
BATCHES = (1, 4, 16, 64, 256)
PRECISIONS = ("fp16", "tf32", "bf16", "fp32")
FIRST_BATCHES = (1, 16)
STREAM_BATCHES = (1, 4)


@dataclass(frozen=True)
class Cell:
    """One measurement. `rates` are the machine's ceilings, `kernels` pointwise and norm kernels beside them; the others
    are a network at a precision and a batch: by `ours`, by PyTorch (`eager`, `compiled`), through the engine with
    several streams, and the timeline of what a GPU did. Checks are cells too, whose values say what was found."""

    kind: str
    model: str = ""
    precision: str = ""
    batch: int = 0

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.kind, self.model, self.precision, self.batch or "") if part)


@dataclass(frozen=True)
class Job:
    """Cells that one process measures in turn, because preparing is what they have in common."""

    cells: tuple[Cell, ...]


def as_record(cell: Cell) -> dict[str, Any]:
    return asdict(cell)


def from_record(record: dict[str, Any]) -> Cell:
    return Cell(**record)


def cells(models: Sequence[str], batches: Sequence[int], precisions: Sequence[str]) -> list[Cell]:
    """All cells. The precisions follow each other as they are given; of each come batches of 1 and 16 first, of these
    ours and PyTorch's eager mode before what compiles for minutes."""
    found = [Cell(RATES), Cell(KERNELS)]
    first = [batch for batch in batches if batch in FIRST_BATCHES]
    rest = sorted((batch for batch in batches if batch not in FIRST_BATCHES), reverse=True)
    for precision in precisions:
        for chosen in (first, rest):
            for kind in (OURS, EAGER, COMPILED):
                found += _networks(kind, models, precision, chosen)
            if chosen is first:
                found += _networks(TIMELINE, models, precision, first)
                small = [batch for batch in batches if batch in STREAM_BATCHES]
                found += _networks(STREAMS, models, precision, small)
    return found


def _networks(kind: str, models: Sequence[str], precision: str, batches: Sequence[int]) -> list[Cell]:
    return [Cell(kind, model, precision, batch) for model in models for batch in batches]


def check_cells(models: Sequence[str], precisions: Sequence[str]) -> list[Cell]:
    """What is checked in processes like those that measure."""
    networks = [Cell(NETWORK_CHECK, model, precision) for model in models for precision in precisions]
    return [Cell(SIZES_CHECK), Cell(STREAMS_CHECK), *networks]


def jobs(wanted: Iterable[Cell]) -> list[Job]:
    """The cells in their order, neighbours of one kind, network and precision together; checks of any precision."""
    return [Job(tuple(group)) for _, group in groupby(wanted, _shared)]


def _shared(cell: Cell) -> tuple[str, ...]:
    return (cell.kind, cell.model) if cell.kind == NETWORK_CHECK else (cell.kind, cell.model, cell.precision)

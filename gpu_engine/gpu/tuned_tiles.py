"""Tiles that `python -m benchmarks.gpu_tiles --measure` found fastest, one file for each architecture.

A file says which GPU was measured, when, and with which Triton; a GPU of another architecture does not read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"
NEAR = 1
"""Extents of a bucket and of its neighbours differ by a factor of at most 4."""
Bucket = tuple[int, int, int, int]
"""The binary logarithms, rounded up, of the extents of a batched product: batch, m, n, k."""


@dataclass(frozen=True)
class Record:
    """The fastest tile of a family for a bucket of products (`kind` "gemm") or convolutions ("conv") whose factors have
    `nbytes` an element; `tile` are the fields of a GemmTile, `splits` the parts of what is summed over, `median_s` the
    seconds that it took."""

    family: str
    kind: str
    nbytes: int
    bucket: Bucket
    tile: tuple[int, ...]
    splits: int
    median_s: float


@dataclass(frozen=True)
class Table:
    """What was measured on the GPU called `gpu`, at `date` (YYYY-MM-DD), with a version of Triton."""

    gpu: str
    arch: int
    date: str
    triton: str
    records: tuple[Record, ...]


def bucket(extents: Iterable[int]) -> Bucket:
    """Of batch, m, n and k."""
    batch, m, n, k = (max(0, extent - 1).bit_length() for extent in extents)
    return batch, m, n, k


def write_table(table: Table, folder: Path = FOLDER) -> Path:
    """The file of the table's architecture, replaced; a record is a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{table.arch}.json"
    head = {key: value for key, value in asdict(table).items() if key != "records"}
    lines = ",\n".join(f"    {json.dumps(asdict(record))}" for record in table.records)
    path.write_text(f'{json.dumps(head)[:-1]}, "records": [\n{lines}\n]}}\n')
    return path


def read_table(path: Path) -> Table:
    """What `write_table` wrote; ValueError for anything else."""
    try:
        found = json.loads(path.read_text())
        records = tuple(map(_record, found["records"]))
        return Table(found["gpu"], int(found["arch"]), found["date"], found["triton"], records)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from error


def _record(row: Mapping[str, Any]) -> Record:
    return Record(
        row["family"], row["kind"], row["nbytes"], tuple(row["bucket"]), tuple(row["tile"]), row["splits"],
        row["median_s"],
    )  # fmt: skip


@cache
def records(arch: int, folder: Path) -> tuple[Record, ...]:
    """Those of exactly this architecture; none where nothing was measured."""
    path = folder / f"sm_{arch}.json"
    if not path.exists():
        return ()
    table = read_table(path)
    return table.records if table.arch == arch else ()


def nearest(
    found: Sequence[Record], family: str, kind: str, nbytes: int, extents: Iterable[int]
) -> list[Record]:  # fmt: skip
    """The records that may stand for a product of these extents, the nearest first."""
    wanted = bucket(extents)

    def steps(record: Record) -> list[int]:
        return [abs(a - b) for a, b in zip(record.bucket, wanted, strict=True)]

    same = (one for one in found if (one.family, one.kind, one.nbytes) == (family, kind, nbytes))
    return sorted((one for one in same if max(steps(one)) <= NEAR), key=lambda one: sum(steps(one)))

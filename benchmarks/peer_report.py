"""What `benchmarks.peers` measured: rows of a CSV file, ratios from them, and the texts made of those."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.contest import geometric_mean

OURS = "gpu_engine"
CPU, THROUGHPUT = "cpu_ms", "per_s"
TITLES = {CPU: "CPU time on one thread", THROUGHPUT: "throughput on all cores"}
MARKS = ("<!-- peers -->\n", "<!-- end of peers -->\n")
CHART = "peers.svg"


@dataclass(frozen=True)
class Row:
    """One measurement: CPU milliseconds of an inference on one thread (`cpu_ms`) or inferences a second (`per_s`).

    `value` is None where the engine does not run the model, and `note` says why. `error` is the largest difference
    from ONNX Runtime's output without optimisations; `agrees` whether the catalogue's tolerance allows it. `gflops`
    are thousand million operations a second, `peak_gflops` those of multiply-adds on registers in the same minute.
    """

    date: str
    processor: str
    cores: int
    model: str
    shape: str
    measure: str
    engine: str
    version: str
    value: float | None
    error: float | None = None
    agrees: bool = True
    gflops: float | None = None
    peak_gflops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One model under one measure: every engine's row, ours first, and how many times as fast as the best peer we
    are; None if no peer runs the model, or we do not."""

    model: str
    measure: str
    rows: tuple[Row, ...]

    @property
    def ratio(self) -> float | None:
        ours, peers = self.rows[0].value, [row.value for row in self.rows[1:] if row.value]
        if not ours or not peers:
            return None
        return min(peers) / ours if self.measure == CPU else ours / max(peers)


def comparisons(rows: Sequence[Row], measure: str) -> list[Comparison]:
    """One for each model, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.measure == measure:
            found.setdefault(row.model, []).append(row)
    return [
        Comparison(model, measure, tuple(sorted(group, key=lambda row: row.engine != OURS)))
        for model, group in found.items()
    ]


def ratios(rows: Sequence[Row], measure: str) -> dict[str, float]:
    """{model: ratio} of those that we and a peer run."""
    return {found.model: found.ratio for found in comparisons(rows, measure) if found.ratio is not None}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows as CSV, with a title line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([_text(cell) for cell in asdict(row).values()] for row in rows)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with path.open(newline="") as file:
        return [_row(record) for record in csv.DictReader(file)]


def _text(cell: object) -> object:
    return "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell


def _row(record: dict[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(record[name]) if record[name] else None

    return Row(
        record["date"],
        record["processor"],
        int(record["cores"]),
        record["model"],
        record["shape"],
        record["measure"],
        record["engine"],
        record["version"],
        number("value"),
        number("error"),
        record["agrees"] == "True",
        number("gflops"),
        number("peak_gflops"),
        record["note"],
    )


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the figures do not say: models that an engine refuses, and outputs beyond the tolerance."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.value is None:
            found.setdefault(f"{row.engine} does not run", []).append(row.model)
        elif not row.agrees:
            found.setdefault(f"{row.engine} is outside the tolerance on", []).append(row.model)
    return [f"{what} {', '.join(dict.fromkeys(models))}." for what, models in found.items()]


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """[measure, models, geometric mean of the ratios, least ratio, models below 1.0] for each measure."""
    lines = []
    for measure, title in TITLES.items():
        found = ratios(rows, measure)
        if found:
            least = min(found, key=lambda model: found[model])
            below = sum(ratio < 1 for ratio in found.values())
            mean = geometric_mean(list(found.values()))
            lines.append([title, str(len(found)), f"{mean:.2f}", f"{found[least]:.2f} ({least})", str(below)])
    return lines


def markdown(rows: Sequence[Row], chart: str, table: str) -> str:
    """The README's section: the chart, the table of means, the machine and the date; `chart` and `table` are links."""
    first = rows[0]
    versions = sorted({f"{row.engine} {row.version}" for row in rows if row.engine != OURS})
    titles = ["best peer against gpu_engine", "models", "geometric mean", "least", "below 1.0"]
    lines = [
        f"![How many times as fast as the best peer, by model]({chart})",
        "",
        _line(titles),
        _line(["---", *["---:"] * (len(titles) - 1)]),
        *map(_line, summary(rows)),
        "",
        f"{first.processor}, {first.cores} cores, {first.date}; {' and '.join(versions)}, in float32 and exact int8. "
        f"Every measurement is a row of [{Path(table).name}]({table}).",
    ]
    return "\n".join([*lines, *(line for remark in remarks(rows) for line in ("", remark)), ""])


def update_between_marks(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Put `text` between two lines of a Markdown file; ValueError if they are not there."""
    before, found, rest = path.read_text().partition(marks[0])
    _, ended, after = rest.partition(marks[1])
    if not found or not ended:
        raise ValueError(f"{path} has no lines {marks[0].strip()} and {marks[1].strip()}")
    path.write_text(f"{before}{marks[0]}{text}{marks[1]}{after}")


def exact(error: float | None) -> str:
    """An error as a short text."""
    return "" if error is None else "nan" if math.isnan(error) else f"{error:.0e}"


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"

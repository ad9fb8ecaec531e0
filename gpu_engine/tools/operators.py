"""Which operators there are and how each is lowered: a table made from the registry and the specification."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu_engine.errors import InputError
from gpu_engine.frontend import operators
from gpu_engine.frontend.legacy import OLDEST_OPSET
from gpu_engine.frontend.reader import specified_operators
from gpu_engine.frontend.registry import REGISTRY, lookup
from gpu_engine.runtime.late import DEVICES

LOWERINGS = {
    "pointwise": "one scalar expression; fused",
    "composed": "made of engine operations",
    "array": "a function over arrays, on the device",
    "host": "a function over arrays, on the host of every device",
    "specification body": "the function body that the specification gives",
    "missing": "refused",
}
MARKS = ("<!-- operators -->\n", "<!-- end of operators -->\n")


@dataclass(frozen=True)
class OperatorRow:
    """An operator: the versions that run, those that do not, how the newest is lowered, and on which devices."""

    domain: str
    name: str
    versions: tuple[int, ...]
    missing: tuple[int, ...]
    lowering: str
    devices: tuple[str, ...]


def operator_rows() -> list[OperatorRow]:
    """Every operator of the specification, then every other one of the registry, by domain and name."""
    assert operators  # imported for its registrations
    specified = {(known.domain, known.name): known for known in specified_operators()}
    rows = []
    for domain, name in sorted({*specified, *(key for key, entries in REGISTRY.items() if entries)}):
        known = specified.get((domain, name))
        bodies = known.bodies if known else frozenset()
        versions = known.versions if known else tuple(entry.since for entry in REGISTRY[domain, name])
        found = {version: _lowering(domain, name, version, version in bodies) for version in versions}
        rows.append(
            OperatorRow(
                domain or "ai.onnx",
                name,
                tuple(version for version in versions if found[version] != "missing"),
                tuple(version for version in versions if found[version] == "missing"),
                found[versions[-1]],
                usable_devices(),
            )
        )
    return rows


def _lowering(domain: str, name: str, version: int, body: bool) -> str:
    entry = lookup(domain, name, version if domain else max(version, OLDEST_OPSET))
    if entry is None:
        return "specification body" if body else "missing"
    return entry.lowering


def usable_devices() -> tuple[str, ...]:
    """The kinds of device that this installation has code for."""
    packages = {kind: place.split(":")[0].rpartition(".")[0] for kind, place in DEVICES.items()}
    return tuple(kind for kind, package in packages.items() if find_spec(package) is not None)


def summary(rows: Sequence[OperatorRow]) -> str:
    """Counts by domain and lowering, as a Markdown table."""
    shown = [lowering for lowering in LOWERINGS if any(row.lowering == lowering for row in rows)]
    lines = [_line(["domain", "operators", "versions", *shown]), _line(["---", *["---:"] * (len(shown) + 2)])]
    for domain in dict.fromkeys(row.domain for row in rows):
        inside = [row for row in rows if row.domain == domain]
        counts = Counter(row.lowering for row in inside)
        versions = sum(len(row.versions) for row in inside)
        lines.append(_line([domain, len(inside), versions, *(counts[lowering] for lowering in shown)]))
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[OperatorRow]) -> str:
    """The whole table as Markdown."""
    lines = [_line(TITLES), _line(["---"] * len(TITLES))]
    return "\n".join([*lines, *(_line(cells(row)) for row in rows)])


TITLES = ("operator", "domain", "versions", "missing versions", "lowering", "devices")


def cells(row: OperatorRow) -> tuple[str, ...]:
    """The texts of a row, in the order of TITLES."""
    versions, missing = (", ".join(map(str, numbers)) for numbers in (row.versions, row.missing))
    return row.name, row.domain, versions, missing, row.lowering, ", ".join(row.devices)


def as_json(rows: Sequence[OperatorRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def update_summary(path: Path, rows: Sequence[OperatorRow]) -> None:
    """Rewrite the summary between MARKS in a Markdown file; InputError if they are not there."""
    text = path.read_text()
    before, found, rest = text.partition(MARKS[0])
    _, ended, after = rest.partition(MARKS[1])
    if not found or not ended:
        raise InputError(f"{path} has no lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    path.write_text(f"{before}{MARKS[0]}{summary(rows)}{MARKS[1]}{after}")


def _line(texts: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, texts))} |"

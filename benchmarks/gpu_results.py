"""The result file of `benchmarks.gpu`: JSON lines, each written as soon as it is known, so that a killed run keeps all.

A line is an environment (one for each run), a check, or a cell with its values or with the reason why it has none.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.fetch import ROOT
from benchmarks.gpu_cells import Cell, as_record, from_record

FOLDER, REHEARSALS = ROOT / "benchmarks" / "results", ROOT / ".cache" / "results"
PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy", "onnx", "onnxruntime")
SEEN = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "memory.total", "power.limit")
TOOL_LIMIT_S = 20
Values = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What was checked, whether it was right, how long that took, and what was found."""

    name: str
    passed: bool
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Results:
    """A file's lines. A cell measured again has its latest values; `failures` are cells without, with the reason."""

    environments: list[Values] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)
    values: dict[Cell, Values] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        return any(environment.get("rehearsal") for environment in self.environments)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write one line, and see to it that it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * bool(broken) + json.dumps(line) + "\n")


def add_environment(path: Path, environment: Values) -> None:
    append(path, {"environment": environment})


def add_check(path: Path, check: Check) -> None:
    append(path, {"check": asdict(check)})


def add_cell(path: Path, cell: Cell, outcome: Values | str) -> None:
    """Its values, or the reason why there are none."""
    append(path, {"cell": as_record(cell), "failed" if isinstance(outcome, str) else "values": outcome})


def read(path: Path) -> Results:
    """What was written; a line that was cut off counts as not written."""
    found = Results()
    for line in _lines(path):
        if "environment" in line:
            found.environments.append(line["environment"])
        elif "check" in line:
            check = Check(**line["check"])
            found.checks[check.name] = check
        else:
            cell = from_record(line["cell"])
            found.values.pop(cell, None)
            found.failures.pop(cell, None)
            if "failed" in line:
                found.failures[cell] = line["failed"]
            else:
                found.values[cell] = line["values"]
    return found


def _lines(path: Path) -> Iterator[Values]:
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def new_path(rehearsal: bool) -> Path:
    """A file of today that is not there."""
    folder = REHEARSALS if rehearsal else FOLDER
    stem = f"gpu{'-rehearsal' * rehearsal}-{date.today().isoformat()}"
    names = (f"{stem}{f'-{number}' if number > 1 else ''}.jsonl" for number in range(1, 1000))
    return next(path for name in names if not (path := folder / name).exists())


def environment(arguments: str, rehearsal: bool) -> Values:
    """This machine, its GPU and its software, the commit, and what was asked for."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": rehearsal,
        "arguments": arguments,
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "gpu": {} if rehearsal else gpu(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def gpu() -> Values:
    """Name, driver, clocks, memory and power limit as nvidia-smi reads them; nothing where it cannot be asked."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(SEEN)}", "--format=csv,noheader")
    if not said:
        return {}
    return dict(zip(SEEN, map(str.strip, said.splitlines()[0].split(",")), strict=False))


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""The committed list of conformance cases that are expected to fail, each under its reason."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from tests.conformance_cases import SUITES, Case

PATH = Path(__file__).with_name("conformance_manifest.toml")
HEADER = """\
# Conformance cases that are expected to fail, grouped by reason. A name may hold *; no case belongs to two groups.
# A case listed here that passes fails the run, as does one that fails and is not listed. Where `varies` is true the
# outcome is not determined, by chance or by the processor, and neither is a surprise.
# `python -m tests.conformance --update` drops what passes and adds what fails under the error's own words.
"""


@dataclass(frozen=True)
class Group:
    """Cases, as "suite/name" or globs of it, that fail for one reason; that may pass as well if it `varies`."""

    reason: str
    labels: tuple[str, ...]
    varies: bool = False

    def holds(self, label: str) -> bool:
        return any(fnmatchcase(label, known) for known in self.labels)


def read(path: Path = PATH) -> tuple[Group, ...]:
    entries = tomllib.loads(path.read_text())["exclude"] if path.exists() else []
    return tuple(
        Group(
            entry["reason"],
            tuple(f"{suite}/{name}" for suite in SUITES for name in entry.get(suite, [])),
            entry.get("varies", False),
        )
        for entry in entries
    )


def group_of(groups: Sequence[Group], case: Case) -> Group | None:
    """The group that the case belongs to."""
    return next((group for group in groups if group.holds(case.label)), None)


def update(groups: Sequence[Group], verdicts: Mapping[str, str]) -> tuple[Group, ...]:
    """The groups after a run: {label: error, empty if passed}. Labels that did not run stay as they are."""
    result = []
    for group in groups:
        kept = [kept for label in group.labels for kept in _still_failing(label, verdicts)]
        result.append(group if group.varies else replace(group, labels=tuple(kept)))
    fresh: dict[str, list[str]] = {}
    for label, error in verdicts.items():
        if error and not any(group.holds(label) for group in groups):
            fresh.setdefault(summary(error), []).append(label)
    result += [Group(reason, tuple(labels)) for reason, labels in fresh.items()]
    return tuple(group for group in result if group.labels)


def _still_failing(label: str, verdicts: Mapping[str, str]) -> list[str]:
    """The label as it is if nothing that it fits passed, else those that failed by name."""
    hits = [known for known in verdicts if fnmatchcase(known, label)]
    failed = [hit for hit in hits if verdicts[hit]]
    return [label] if len(failed) == len(hits) else failed


def summary(error: str) -> str:
    """An error without what varies from case to case: places, node names, numbers."""
    first = re.sub(r" \([\w.]+:\d+\)$", "", error.split(" | ")[0])
    return re.sub(r"(?<![A-Za-z0-9])\d[\d.e+-]*", "N", first)[:160]


def write(groups: Sequence[Group], path: Path = PATH) -> None:
    """Write the groups as TOML, in a stable order."""
    blocks = [HEADER]
    for group in sorted(groups, key=lambda group: group.reason):
        lines = ["[[exclude]]", f"reason = {json.dumps(group.reason, ensure_ascii=False)}"]
        lines += ["varies = true"] * group.varies
        for suite in SUITES:
            names = sorted(label.split("/", 1)[1] for label in group.labels if label.startswith(f"{suite}/"))
            if names:
                lines += [f"{suite} = [", *_wrapped(names), "]"]
        blocks.append("\n".join(lines) + "\n")
    path.write_text("\n".join(blocks))


def _wrapped(names: Sequence[str]) -> list[str]:
    lines = ["   "]
    for name in names:
        item = f' "{name}",'
        if len(lines[-1]) + len(item) > 120 and lines[-1].strip():
            lines.append("   ")
        lines[-1] += item
    return lines

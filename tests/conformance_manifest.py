"""The committed list of conformance cases that are expected to fail, each under its reason."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tests.conformance_cases import SUITES, Case

PATH = Path(__file__).with_name("conformance_manifest.toml")
HEADER = """\
# Conformance cases that are expected to fail, grouped by reason. A name may hold *; the groups of one case must not
# overlap. A case listed here that passes fails the run, as does one that fails and is not listed.
# `python -m tests.conformance --update` drops what passes and adds what fails under the error's own words.
"""

Groups = Mapping[str, Sequence[str]]


def read(path: Path = PATH) -> dict[str, list[str]]:
    """{reason: ["suite/name or glob", ...]}"""
    groups: dict[str, list[str]] = {}
    for group in tomllib.loads(path.read_text())["exclude"] if path.exists() else []:
        labels = [f"{suite}/{name}" for suite in SUITES for name in group.get(suite, [])]
        groups.setdefault(group["reason"], []).extend(labels)
    return groups


def reason(groups: Groups, case: Case) -> str:
    """Why the case is excluded; empty if it is not."""
    found = (text for text, labels in groups.items() if any(fnmatchcase(case.label, label) for label in labels))
    return next(found, "")


def update(groups: Groups, verdicts: Mapping[str, str]) -> dict[str, list[str]]:
    """The groups after a run: {label: error, empty if passed}. Labels that did not run stay as they are."""
    passed = {label for label, error in verdicts.items() if not error}
    failed = {label: error for label, error in verdicts.items() if error}
    result: dict[str, list[str]] = {}
    for text, labels in groups.items():
        for label in labels:
            hits = [known for known in verdicts if fnmatchcase(known, label)]
            kept = [label] if not passed.intersection(hits) else [hit for hit in hits if hit in failed]
            result.setdefault(text, []).extend(kept)
            for hit in hits:
                failed.pop(hit, None)
    for label, error in failed.items():
        result.setdefault(summary(error), []).append(label)
    return {text: sorted(labels) for text, labels in result.items() if labels}


def summary(error: str) -> str:
    """An error without what varies from case to case: places, node names, numbers."""
    first = re.sub(r" \([\w.]+:\d+\)$", "", error.split(" | ")[0])
    return re.sub(r"(?<![A-Za-z0-9])\d[\d.e+-]*", "N", first)[:160]


def write(groups: Groups, path: Path = PATH) -> None:
    """Write the groups as TOML, in a stable order."""
    blocks = [HEADER]
    for text, labels in sorted(groups.items()):
        lines = ["[[exclude]]", f"reason = {json.dumps(text, ensure_ascii=False)}"]
        for suite in SUITES:
            names = sorted(label.split("/", 1)[1] for label in labels if label.startswith(f"{suite}/"))
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

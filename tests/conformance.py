"""Run the onnx wheel's own test suites through the engine: `python -m tests.conformance --device cpu`.

The last lines say `SUITE passed / total` per suite. The exit code is 0 if exactly the cases of the committed manifest
fail.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from tests import conformance_manifest as manifest
from tests.conformance_cases import SUITES, Case, collect, matches
from tests.conformance_pool import Verdict, run_cases


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = [case for case in collect(options.suite or SUITES) if not options.only or matches(case, options.only)]
    verdicts = _run(few_of_each(cases, options.each), options)
    groups = manifest.read()
    if options.failures:
        _print_failures(verdicts)
    if options.slowest:
        _print_slowest(verdicts, options.slowest)
    if options.update:
        groups = manifest.update(groups, {verdict.case.label: verdict.error for verdict in verdicts})
        manifest.write(groups)
    surprises = [text for verdict in verdicts if (text := surprise(groups, verdict))]
    print(*surprises, sep="\n", end="\n" if surprises else "")
    _print_totals(verdicts)
    return 1 if surprises or not verdicts else 0


def few_of_each(cases: Sequence[Case], count: int) -> list[Case]:
    """The first cases of every operator, its function bodies left out; all cases for a `count` of 0."""
    if not count:
        return list(cases)
    seen: Counter[str] = Counter()
    chosen = []
    for case in cases:
        seen[case.operator] += 1
        if seen[case.operator] <= count and not case.operator.endswith("(function body)"):
            chosen.append(case)
    return chosen


def surprise(groups: Sequence[manifest.Group], verdict: Verdict) -> str:
    """A line if the verdict is not what the manifest says, else empty."""
    group = manifest.group_of(groups, verdict.case)
    if verdict.error and group is None:
        return f"UNEXPECTED FAILURE {verdict.case.label}: {verdict.error}"
    if group is not None and not verdict.error and not group.varies:
        return f"UNEXPECTED PASS {verdict.case.label}: the manifest says: {group.reason}"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this suite; may be repeated")
    parser.add_argument("--only", metavar="PATTERN", help="a glob over suite/name, a part of it, or an operator's name")
    parser.add_argument("--each", type=int, default=0, metavar="N", help="only the first N cases of every operator")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="time limit of one case")
    parser.add_argument("--failures", action="store_true", help="list every failure by operator, with its error")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="list the N slowest cases")
    parser.add_argument("--update", action="store_true", help="rewrite the manifest to what this run found")
    return parser


def _run(cases: Sequence[Case], options: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("conformance", total=len(cases))
        for verdict in run_cases(cases, options.device, options.jobs, options.limit):
            verdicts.append(verdict)
            progress.advance(task)
    return sorted(verdicts, key=lambda verdict: (SUITES.index(verdict.case.suite), verdict.case.name))


def _print_failures(verdicts: Sequence[Verdict]) -> None:
    by_operator = defaultdict(list)
    for verdict in verdicts:
        if verdict.error:
            by_operator[verdict.case.operator].append(verdict)
    for operator, failed in sorted(by_operator.items()):
        print(f"{operator}: {len(failed)}")
        for verdict in failed:
            print(f"    {verdict.case.label}: {verdict.error}")


def _print_slowest(verdicts: Sequence[Verdict], count: int) -> None:
    for verdict in sorted(verdicts, key=lambda verdict: -verdict.seconds)[:count]:
        print(f"{verdict.seconds:7.2f} s  {verdict.case.label}")


def _print_totals(verdicts: Sequence[Verdict]) -> None:
    for suite in SUITES:
        results = [not verdict.error for verdict in verdicts if verdict.case.suite == suite]
        if results:
            print(f"{suite} {sum(results)} / {len(results)}")


if __name__ == "__main__":
    sys.exit(main())

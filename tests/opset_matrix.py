"""Whole models at every opset: `python -m tests.opset_matrix`.

Every model of the onnx wheel's suites of networks and PyTorch exports is converted by onnx.version_converter to each
opset from 7 to the newest that the converter accepts it for, and must give the outputs that the suite expects. The
exit code is 0 if all do.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import onnx
from rich.console import Console
from rich.progress import Progress

from tests.conformance_cases import Case, collect, matches
from tests.conformance_pool import Verdict, run_cases

SUITES = ("light", "pytorch-converted", "pytorch-operator")
OLDEST, NEWEST = 7, onnx.defs.onnx_opset_version()
EXCLUDED = {
    "test_PReLU_?d_multiparam@*": "the converter leaves the slope [C] of opset 6 as it is, which opset 7 and later do "
    "not broadcast over axis 1; ONNX Runtime refuses the models too",
}
"""Converted models, by a glob over `name@opset`, that are wrong, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = [case for case in collect(options.suite or SUITES) if not options.only or matches(case, options.only)]
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        found = [made for case in progress.track(cases, description="convert") for made in conversions(case)]
        results = run_cases(found, options.device, options.jobs, options.limit)
        verdicts = list(progress.track(results, total=len(found), description="run"))
    surprises = [text for verdict in verdicts if (text := surprise(verdict))]
    print(*surprises, sep="\n", end="\n" if surprises else "")
    _report(verdicts)
    return 1 if surprises or not verdicts else 0


def surprise(verdict: Verdict) -> str:
    """A line if the verdict is not what EXCLUDED says, else empty."""
    reason = excluded(verdict.case.name)
    if verdict.error and not reason:
        return f"FAILURE {verdict.case.label}: {verdict.error}"
    return f"UNEXPECTED PASS {verdict.case.label}: {reason}" if reason and not verdict.error else ""


def conversions(case: Case, opsets: Sequence[int] = range(OLDEST, NEWEST + 1)) -> Iterator[Case]:
    """The case at each of `opsets` for which the converter takes its model, named `name@opset`."""
    model = onnx.load_model_from_string(case.model)
    for opset in opsets:
        try:
            converted = onnx.version_converter.convert_version(model, opset)
        except (onnx.version_converter.ConvertError, RuntimeError):
            continue
        yield dataclasses.replace(case, name=f"{case.name}@{opset}", model=converted.SerializeToString())


def excluded(name: str) -> str:
    """Why the model `name@opset` is excluded, empty if it is not."""
    return next((why for pattern, why in EXCLUDED.items() if fnmatchcase(name, pattern)), "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.opset_matrix", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this suite; may be repeated")
    parser.add_argument("--only", metavar="PATTERN", help="a glob over suite/name, or a part of it")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="time limit of one model")
    return parser


def _report(verdicts: Sequence[Verdict]) -> None:
    """Passed / total by opset."""
    total, passed = Counter[int](), Counter[int]()
    for verdict in verdicts:
        opset = opset_of(verdict.case)
        total[opset] += 1
        passed[opset] += not verdict.error
    for opset in sorted(total):
        print(f"opset {opset:2d}  {passed[opset]} / {total[opset]}")
    print(f"all       {sum(passed.values())} / {sum(total.values())}")


def opset_of(case: Case) -> int:
    found = re.search(r"@(\d+)$", case.name)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())

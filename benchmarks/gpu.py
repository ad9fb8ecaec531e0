"""Checks, then measures, on a machine with a GPU, beside PyTorch and the hardware's floor: `python -m benchmarks.gpu`.

The checks come first, and one that fails ends it, unless told to keep going: conformance, networks in four precisions,
sizes that hit tails, streams under load, and the tests that need a GPU. Then cells, most important first, for as long
as `--minutes` says, each in a process that may hang or die, each written to the result file as soon as it is known:
`--resume FILE` goes on where that file ends. The exit code is 1 if a check failed, 2 where there is no usable GPU.

Weights are random: `python -m benchmarks.skeletons` writes the networks without them, a few MB that are carried to the
machine with the GPU, into `.cache/skeletons`. `--rehearse` goes through all of it anywhere, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import gpu_report as report
from benchmarks import gpu_results as results
from benchmarks.gpu_cells import BATCHES, COMPILED, PRECISIONS, RATES, Cell, as_record, cells, check_cells, jobs
from benchmarks.gpu_commands import checked, programs
from benchmarks.gpu_jobs import Budget, run_jobs, run_lanes
from benchmarks.gpu_networks import NETWORKS, TINY
from benchmarks.gpu_places import opened
from benchmarks.gpu_results import Check, Results
from benchmarks.peer_report import update_between_marks
from benchmarks.skeletons import FOLDER
from gpu_engine.errors import DeviceError

LANES = max(1, (os.cpu_count() or 1) // 4)
"""Checks at the same time: each takes a few processors."""
CACHES = FOLDER.parent / "gpu"
REHEARSED_BATCHES, REHEARSED_PRECISIONS = (1, 3), ("fp16", "fp32")
CONSOLE = Console(width=190)
Lines = Iterator[tuple[Cell, dict[str, Any] | str]]


@dataclass(frozen=True)
class Settings:
    """What is to be done, and with what."""

    rehearsal: bool
    models: tuple[str, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    skeletons: Path
    caches: Path
    limit_s: float
    check_limit_s: float
    path: Path

    @property
    def place(self) -> str:
        return "host" if self.rehearsal else "cuda"

    def wanted(self) -> list[Cell]:
        return cells(self.models, self.batches, self.precisions)

    def environment(self) -> dict[str, str]:
        """Of the processes that measure: compiled kernels stay in a folder that can be kept."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
            "TRITON_CACHE_DIR": str(self.caches / "triton"),
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, some: Sequence[Cell]) -> list[str]:
        """A process that measures, with the ceilings that are known by then."""
        ceilings = results.read(self.path).values.get(Cell(RATES), {}) if self.path.exists() else {}
        request = {
            "place": self.place, "ceilings": ceilings, "skeletons": str(self.skeletons),
            "cells": list(map(as_record, some)),
        }  # fmt: skip
        return [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(request)]


def check(settings: Settings, end_s: float) -> Iterator[Check]:
    """All checks as they end; each was written to the result file."""
    for one in _checks(settings, end_s):
        results.add_check(settings.path, one)
        yield one


def _checks(settings: Settings, end_s: float) -> Iterator[Check]:
    wanted = check_cells(settings.models, settings.precisions)
    known = set()
    for cell, outcome in _lines(settings, wanted, Budget(end_s, settings.check_limit_s), LANES):
        known.add(cell)
        failed = isinstance(outcome, str)
        yield Check(str(cell), not failed, 0.0 if failed else outcome["seconds"], outcome if failed else _text(outcome))
    for cell in wanted:
        if cell not in known:
            yield Check(str(cell), False, 0.0, "no time was left for it")
    for program in programs(settings.rehearsal):
        limit_s = min(settings.check_limit_s, end_s - time.monotonic())
        yield checked(program, limit_s) if limit_s > 0 else Check(program.name, False, 0.0, "no time was left for it")


def measure(settings: Settings, end_s: float) -> Lines:
    """What the result file lacks, as it comes; each was written to it. What failed before is tried again at the end."""
    found = results.read(settings.path)
    missing = [cell for cell in settings.wanted() if cell not in found.values]
    missing.sort(key=lambda cell: cell in found.failures)
    for cell, outcome in _lines(settings, missing, Budget(end_s, settings.limit_s)):
        results.add_cell(settings.path, cell, outcome)
        yield cell, outcome


def _lines(settings: Settings, some: Sequence[Cell], budget: Budget, lanes: int = 1) -> Lines:
    """With one lane a process is started once all outcomes before it were taken, so that it knows the ceilings."""
    settings.caches.mkdir(parents=True, exist_ok=True)
    with (settings.caches / "workers.log").open("a") as log:
        how = jobs(some), settings.command, budget, settings.environment(), log
        yield from run_jobs(*how) if lanes == 1 else run_lanes(*how, lanes)


def _text(outcome: dict[str, Any]) -> str:
    numbers = {name: value for name, value in outcome.items() if isinstance(value, int | float) and name != "seconds"}
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def show(found: Results) -> None:
    """The table of networks, what could not be measured, and the verdicts."""
    grid = Table(title="the device alone; milliseconds", title_justify="left")
    for title in report.ROW_TITLES:
        grid.add_column(title, justify="left" if title in report.ROW_TITLES[:2] else "right", no_wrap=True)
    for row in report.rows(found):
        grid.add_row(*row)
    CONSOLE.print(grid)
    for name, share in report.copy_shares(found).items():
        CONSOLE.print(f"{name}: {share:.0%} of the copy rate")
    for cell, gain in report.stream_gains(found).items():
        CONSOLE.print(f"{cell}: two streams of two slots give {gain:.2f} x one slot")
    for text in report.failures(found):
        CONSOLE.print(text, soft_wrap=True, markup=False)
    for one in report.verdicts(found):
        CONSOLE.print(f"{one.outcome.upper():13} {one.target}. {one.figures}", soft_wrap=True, markup=False)
    if found.rehearsal:
        CONSOLE.print("This was a rehearsal: none of these figures says anything of a GPU.")


def refuse(settings: Settings, error: DeviceError) -> int:
    """Say why nothing can be done here, and what would have been."""
    wanted = settings.wanted()
    compiled = sum(cell.kind == COMPILED for cell in wanted)
    names = [str(cell) for cell in check_cells(settings.models, settings.precisions)]
    print(f"nothing was checked or measured: {error}", file=sys.stderr)
    print(
        f"It would have made {len(names) + len(programs(settings.rehearsal))} checks (conformance, tests on a GPU, "
        f"{', '.join(names[:3])}, ...) and measured {len(wanted)} cells, {compiled} of them through torch.compile:\n"
        f"{', '.join(settings.models)} at batch {', '.join(map(str, settings.batches))} "
        f"in {', '.join(settings.precisions)}.\n--rehearse goes through all of it without a GPU.",
        file=sys.stderr,
    )
    return 2


def settings_of(options: argparse.Namespace) -> Settings:
    rehearsal: bool = options.rehearse
    models, batches, precisions = (TINY, REHEARSED_BATCHES, REHEARSED_PRECISIONS) if rehearsal else (
        NETWORKS, BATCHES, PRECISIONS)  # fmt: skip
    return Settings(
        rehearsal, tuple(options.models or models), tuple(options.batches or batches),
        tuple(options.precisions or precisions), options.skeletons, options.caches, options.cell_seconds,
        options.check_seconds, options.resume or options.output or results.new_path(rehearsal),
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--measure-only", action="store_true", help="check nothing; checks that a resumed file has count"
    )
    parser.add_argument("--keep-going", action="store_true", help="measure even if a check fails")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; 9 fits a call of at most 10")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with a result file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here, not to a file of today's date")
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=(*NETWORKS, *TINY), help=", ".join(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, metavar="N")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="in the order of their importance")
    parser.add_argument("--cell-seconds", type=float, default=150.0, help="that a cell may take, compiling included")
    parser.add_argument("--check-seconds", type=float, default=180.0, help="that a check may take")
    parser.add_argument("--skeletons", type=Path, default=FOLDER, help="the folder of networks without weights")
    parser.add_argument("--caches", type=Path, default=CACHES, help="the folder of compiled kernels, worth keeping")
    parser.add_argument("--rehearse", action="store_true", help="everything at tiny sizes, without a GPU")
    parser.add_argument("--show", type=Path, metavar="FILE", help="check and measure nothing: show a result file")
    parser.add_argument("--update", type=Path, metavar="README.md", help="rewrite the figures in this Markdown file")
    return parser


def finish(path: Path, update: Path | None) -> None:
    """Show a result file; with `update` write its figures to a Markdown file, ValueError for those of a rehearsal."""
    found = results.read(path)
    show(found)
    if update is not None:
        update_between_marks(update, report.markdown(found, os.path.relpath(path, update.parent)), report.MARKS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rehearse and options.update:
        parser.error("a rehearsal's figures do not go into a README")
    if options.show:
        finish(options.show, options.update)
        return 0
    settings = settings_of(options)
    if options.resume and options.resume.exists() and results.read(options.resume).rehearsal != settings.rehearsal:
        parser.error(f"{options.resume} holds a rehearsal, or this is one: they do not mix")
    if not settings.rehearsal:
        try:
            opened("cuda", "fp32")
        except DeviceError as error:
            return refuse(settings, error)
    return run(settings, options, " ".join(sys.argv[1:] if arguments is None else arguments))


def run(settings: Settings, options: argparse.Namespace, said: str) -> int:
    """Check and measure as the options say; the exit code."""
    end_s = time.monotonic() + 60 * options.minutes
    results.add_environment(settings.path, results.environment(said, settings.rehearsal))
    print(f"results go to {settings.path}", flush=True)
    for one in () if options.measure_only else check(settings, end_s):
        print(f"{'ok' if one.passed else 'FAILED':6} {one.name}, {one.seconds:.1f} s: {one.detail}", flush=True)
    failed = sum(not one.passed for one in results.read(settings.path).checks.values())
    if not options.check_only and (not failed or options.keep_going):
        for cell, outcome in measure(settings, end_s):
            text = f"not measured: {outcome}" if isinstance(outcome, str) else summary(outcome)
            print(f"{cell}: {text}", flush=True)
    finish(settings.path, options.update)
    if failed:
        print(f"{failed} checks failed", file=sys.stderr)
    return 1 if failed else 0


def summary(outcome: dict[str, Any]) -> str:
    """A cell's values in a line."""
    if "device" in outcome:
        compiled = f", compiled in {outcome['compile_s']:.0f} s" if outcome["compile_s"] else ""
        return f"{outcome['device']['median_ms']:.4g} ms, {outcome['host']['median_ms']:.4g} ms with copies{compiled}"
    return _text(outcome) or json.dumps(outcome)


if __name__ == "__main__":
    sys.exit(main())

"""The checks of `benchmarks.gpu` that are programs of their own: conformance and the tests that need a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fetch import ROOT
from benchmarks.gpu_results import Check

MARKER = "pytest.mark.gpu"
LIMIT_S = 60
"""Of one conformance case."""
LAST_LINES = 4


@dataclass(frozen=True)
class Program:
    """A check that passes if its command ends with 0 and says `sign`."""

    name: str
    command: tuple[str, ...]
    sign: str = ""


def programs(rehearsal: bool) -> list[Program]:
    """One conformance case of every operator, each in a process that may crash, and the marked tests."""
    python, device = sys.executable, "interpret" if rehearsal else "cuda"
    chosen = ("--only", "Relu") if rehearsal else ("--each", "1")
    jobs = "1" if rehearsal else str(os.cpu_count() or 1)
    conformance = (python, "-m", "tests.conformance", "--device", device, "--suite", "node", *chosen, "--jobs", jobs)
    tests = (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", *marked_tests())
    return [
        Program("conformance", (*conformance, "--limit", str(LIMIT_S)), "node "),
        Program("tests on a GPU", tests, " skipped" if rehearsal else " passed"),
    ]


def marked_tests(folder: Path = ROOT / "tests") -> list[str]:
    """Files with tests that need a GPU."""
    return [str(path) for path in sorted(folder.glob("test_*.py")) if MARKER in path.read_text()]


def checked(program: Program, limit_s: float) -> Check:
    """Run it for so long at most; it is gone afterwards, with all that it started."""
    started_s = time.monotonic()
    with subprocess.Popen(
        program.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said = process.communicate(timeout=limit_s)[0]
            passed = process.returncode == 0 and program.sign in said
            detail = last(said) if passed else f"ended with {process.returncode}: {last(said, LAST_LINES)}"
        except subprocess.TimeoutExpired:
            passed, detail = False, f"took more than {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Check(program.name, passed, time.monotonic() - started_s, detail)


def last(text: str, lines: int = 1) -> str:
    """The last lines that say something."""
    found: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(found[-lines:])[-400:]

"""Cells in processes of their own, which may hang or die: every cell gets values or a reason, within its time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from benchmarks.gpu_cells import Cell, Job, as_record, from_record

MARK = "@cell "
"""What a worker's lines begin with; whatever else it prints is not looked at."""
LEAST_S = 5.0
"""With less time than this nothing is begun."""
LAST_LINES = 3
Outcome = tuple[Cell, dict[str, Any] | str]
Command = Callable[[Sequence[Cell]], Sequence[str]]
"""command(cells) is the command line of a process that prints a line for each of them, in order."""


@dataclass(frozen=True)
class Budget:
    """Time that ends at `end_s` of `clock`; every cell may take `limit_s` of it."""

    end_s: float
    limit_s: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left_s(self) -> float:
        return self.end_s - self.clock()

    @property
    def spent(self) -> bool:
        return self.left_s < LEAST_S


def run_jobs(
    jobs: Sequence[Job], command: Command, budget: Budget, environment: Mapping[str, str], log: IO[str]
) -> Iterator[Outcome]:
    """Outcomes as they come, until the time is over; a cell that it ended in is not among them."""
    for job in jobs:
        if budget.spent:
            return
        yield from _run_job(job, command, budget, environment, log)


def run_lanes(
    jobs: Sequence[Job], command: Command, budget: Budget, environment: Mapping[str, str], log: IO[str], lanes: int
) -> Iterator[Outcome]:
    """As `run_jobs`, so many processes at a time; for what nobody times."""
    found: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()

    def lane(share: Sequence[Job]) -> None:
        try:
            for outcome in run_jobs(share, command, budget, environment, log):
                found.put(outcome)
        finally:
            found.put(None)

    with ThreadPoolExecutor(lanes) as threads:
        running = [threads.submit(lane, jobs[first::lanes]) for first in range(lanes)]
        for _ in range(len(running)):
            while (outcome := found.get()) is not None:
                yield outcome
        for one in running:
            one.result()


def line(cell: Cell, outcome: dict[str, Any] | str) -> str:
    """What a worker prints for a cell."""
    key = "failed" if isinstance(outcome, str) else "values"
    return MARK + json.dumps({"cell": as_record(cell), key: outcome})


def _run_job(
    job: Job, command: Command, budget: Budget, environment: Mapping[str, str], log: IO[str]
) -> Iterator[Outcome]:
    """A process that a cell ended is followed by another for the cells behind it."""
    waiting = list(job.cells)
    while waiting and not budget.spent:
        worker = _Worker(command(waiting), environment, log)
        try:
            while waiting and not budget.spent:
                limit_s = min(budget.limit_s, budget.left_s)
                found = worker.next(limit_s)
                if found is None and budget.left_s <= 0:
                    return
                cell = waiting.pop(0)
                if isinstance(found, tuple):
                    assert found[0] == cell, f"{found[0]} where {cell} was asked for"
                    yield found
                else:
                    yield cell, found or f"took more than {limit_s:.0f} s"
                    break
        finally:
            worker.end()


class _Worker:
    """A process and the lines that it prints."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> None:
        self._process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last: list[str] = []
        self._log = log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for text in output:
                self._lines.put(text)
        self._lines.put(None)

    def next(self, limit_s: float) -> Outcome | str | None:
        """The next outcome; why there will be none; None where time is up."""
        end_s = time.monotonic() + limit_s
        while True:
            try:
                text = self._lines.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                return None
            if text is None:
                code = self._process.wait()
                return f"its process ended with {code}: {' | '.join(self._last[-LAST_LINES:]) or 'it said nothing'}"
            if text.startswith(MARK):
                record, self._last = json.loads(text.removeprefix(MARK)), []
                return from_record(record["cell"]), record.get("failed", record.get("values"))
            self._log.write(text)
            self._log.flush()
            self._last = [*self._last, text.strip()][-LAST_LINES:]

    def end(self) -> None:
        """The process is gone, and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

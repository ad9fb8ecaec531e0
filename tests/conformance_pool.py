"""Worker processes that may crash or hang: every case gets a verdict all the same."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from tests.conformance_cases import Case
from tests.conformance_check import check

START_LIMIT_S = 60.0


@dataclass(frozen=True)
class Verdict:
    """The outcome of one case: `error` is empty if it passed."""

    case: Case
    error: str
    seconds: float


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    case: Case
    since: float
    fresh: bool = True

    def overdue(self, now: float, limit_s: float) -> bool:
        return now - self.since > limit_s + START_LIMIT_S * self.fresh


def run_cases(cases: Sequence[Case], device: str, jobs: int, limit_s: float) -> Iterator[Verdict]:
    """One verdict per case, as they come; a case that ends its process or takes over `limit_s` fails, no more."""
    waiting = list(reversed(cases))
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                worker = _start(waiting.pop(), device)
                workers[worker.connection] = worker
            yield from _collect(workers, waiting, limit_s)
    finally:
        for worker in workers.values():
            _stop(worker)


def _collect(workers: dict[Connection, _Worker], waiting: list[Case], limit_s: float) -> Iterator[Verdict]:
    ready = wait(list(workers), timeout=1.0)
    for worker in list(workers.values()):
        now = time.monotonic()
        if worker.connection in ready:
            error = _receive(worker)
        elif worker.overdue(now, limit_s):
            error = f"took more than {limit_s:g} s"
        else:
            continue
        yield Verdict(worker.case, error or "", now - worker.since)
        alive = worker.connection in ready and worker.process.is_alive()
        if alive and waiting:
            worker.case, worker.since, worker.fresh = waiting.pop(), time.monotonic(), False
            worker.connection.send(worker.case)
        else:
            del workers[worker.connection]
            _stop(worker)


def _receive(worker: _Worker) -> str:
    try:
        error: str = worker.connection.recv()
        return error
    except (EOFError, ConnectionResetError):
        worker.process.join(10)
        return f"ended its process with code {worker.process.exitcode}"


def _start(case: Case, device: str) -> _Worker:
    process_context = multiprocessing.get_context("spawn")
    ours, theirs = process_context.Pipe()
    process = process_context.Process(target=_serve, args=(theirs, device), daemon=True)
    process.start()
    theirs.close()
    ours.send(case)
    return _Worker(process, ours, case, time.monotonic())


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, device: str) -> None:
    warnings.simplefilter("ignore")
    while True:
        try:
            connection.send(_verdict(connection.recv(), device))
        except (EOFError, OSError):
            return


def _verdict(case: Case, device: str) -> str:
    try:
        return check(case, device)
    except Exception as problem:
        return _text(problem)


def _text(problem: Exception) -> str:
    """The exception's kind and first lines, those of its cause, and the last place in our packages."""
    parts = [f"{type(error).__name__}: {_first_lines(error)}" for error in (problem, problem.__cause__) if error]
    trace = traceback.extract_tb((problem.__cause__ or problem).__traceback__)
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in trace if _ours(frame.filename)]
    return " <- ".join(parts) + (f" ({places[-1]})" if places else "")


def _first_lines(error: BaseException) -> str:
    return " | ".join(str(error).splitlines()[:6])[:400]


def _ours(filename: str) -> bool:
    return "/gpu_engine/" in filename or "/cpu_fallback/" in filename

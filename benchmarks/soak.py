"""Many clients, several engines, everything at once, for minutes: `python -m benchmarks.soak --minutes 5`.

64 threads send requests of mixed shapes to four engines: most of them ordinary, some larger than a batch, one in a
hundred poisoned (it fails when it runs, in a batch with others), misshapen, cancelled, or given next to no time. Every
answer is compared with ONNX Runtime's, which was computed before; an error may come only to whom it belongs.

The exit code is 1 if any answer is wrong, any request ends otherwise than it may, the engines' statistics count other
than the clients, a client makes no progress for STALL_S (then all stacks are printed), or memory or threads grow after
the warm-up, which is a minute at most.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.soak_cases import Case, Subject, open_subjects
from benchmarks.soak_watch import GROWTH_NBYTES, Latencies, Progress, Resources, growth
from gpu_engine.errors import ExecutionError, InputError, QueueFull, RequestTimeout

WARM_UP_S = 60.0
STALL_S = 30.0
KINDS = ("run", "submit", "burst", "map", "run_many", "large", "poisoned", "misshapen", "cancelled", "hurried")
WEIGHTS = (35, 19, 15, 5, 5, 13, 2, 2, 2, 2)
"""Of a hundred things that a client does, by kind. Bursts are eight requests: of all requests 1 % is poisoned."""
MOST_VIOLATIONS = 20


@dataclass
class Client:
    """One thread's share: what ended how, and what was wrong."""

    number: int
    progress: Progress
    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    latencies: dict[str, Latencies] = field(default_factory=dict)

    def note(self, subject: Subject, kind: str, outcome: str, seconds: float | None = None) -> None:
        self.progress.beat(self.number)
        self.outcomes[subject.name, kind, outcome] += 1
        if seconds is not None:
            self.latencies.setdefault(subject.name, Latencies()).add(seconds)

    def check(self, subject: Subject, kind: str, case: Case, answer: Any, seconds: float | None = None) -> None:
        wrong = case.wrong(answer)
        if wrong:
            self.violations.append(f"{subject.name}, {kind}: {wrong}")
        self.note(subject, kind, "wrong" if wrong else "right", seconds)


def serve(client: Client, subjects: Sequence[Subject], seed: int, stop: threading.Event) -> None:
    """Send requests until told to stop; whatever is raised that may not be is a violation."""
    choose = random.Random(1000 * seed + client.number)
    while not stop.is_set():
        subject, kind = choose.choice(subjects), choose.choices(KINDS, WEIGHTS)[0]
        try:
            ACTIONS[kind](client, subject, choose)
        except QueueFull:
            client.note(subject, kind, "rejected")
        except Exception:
            client.note(subject, kind, "raised")
            client.violations.append(f"{subject.name}, {kind}: {traceback.format_exc(limit=-3)}")
        if len(client.violations) >= MOST_VIOLATIONS:
            return


def run(client: Client, subject: Subject, choose: random.Random) -> None:
    case = choose.choice(subject.small)
    started = time.monotonic()
    answer = subject.engine.run(case.inputs)
    client.check(subject, "run", case, answer, time.monotonic() - started)


def submit(client: Client, subject: Subject, choose: random.Random) -> None:
    case = choose.choice(subject.small)
    started = time.monotonic()
    answer = subject.engine.submit(case.inputs, block=True).result(4 * STALL_S)
    client.check(subject, "submit", case, answer, time.monotonic() - started)


def burst(client: Client, subject: Subject, choose: random.Random) -> None:
    """Several at once, of all shapes; answers belong to their own requests."""
    cases = [choose.choice(subject.small) for _ in range(8)]
    futures = []
    for case in cases:
        futures.append(subject.engine.submit(case.inputs, block=True))
        client.progress.beat(client.number)
    for case, future in zip(cases, futures, strict=True):
        client.check(subject, "burst", case, future.result(4 * STALL_S))


def map_(client: Client, subject: Subject, choose: random.Random) -> None:
    """Answers come in the order of the inputs, and a poisoned one raises at its place."""
    cases = [choose.choice(subject.small) for _ in range(5)]
    inputs = [case.inputs for case in cases]
    inputs[4] = cases[4].poisoned()
    answers = subject.engine.map(inputs)
    for case in cases[:4]:
        client.check(subject, "map", case, next(answers))
    try:
        next(answers)
    except ExecutionError:
        client.note(subject, "map", "own error")
    else:
        client.violations.append(f"{subject.name}, map: a poisoned item did not fail")


def run_many(client: Client, subject: Subject, choose: random.Random) -> None:
    case = choose.choice(subject.large)
    client.check(subject, "run_many", case, subject.engine.run_many(case.inputs))


def large(client: Client, subject: Subject, choose: random.Random) -> None:
    case = choose.choice(subject.large)
    client.check(subject, "large", case, subject.engine.submit(case.inputs, block=True).result(4 * STALL_S))


def poisoned(client: Client, subject: Subject, choose: random.Random) -> None:
    case = choose.choice(subject.small if choose.random() < 0.8 else subject.large)
    try:
        subject.engine.submit(case.poisoned(), block=True).result(4 * STALL_S)
    except ExecutionError:
        client.note(subject, "poisoned", "own error")
    else:
        client.violations.append(f"{subject.name}, poisoned: it did not fail")


def misshapen(client: Client, subject: Subject, choose: random.Random) -> None:
    try:
        subject.engine.submit(choose.choice(subject.small).misshapen())
    except InputError:
        client.note(subject, "misshapen", "own error")
    else:
        client.violations.append(f"{subject.name}, misshapen: it was queued")


def cancelled(client: Client, subject: Subject, choose: random.Random) -> None:
    """Cancelled at once or a moment later: either it never runs or its answer is right."""
    case = choose.choice(subject.small if choose.random() < 0.8 else subject.large)
    future = subject.engine.submit(case.inputs, block=True)
    time.sleep(choose.choice([0.0, 0.0, 0.001]))
    gone = future.cancel()
    try:
        answer = future.result(4 * STALL_S)
    except CancelledError:
        client.note(subject, "cancelled", "cancelled")
        if not gone:
            client.violations.append(f"{subject.name}, cancelled: it is, although cancel() said no")
        return
    client.check(subject, "cancelled", case, answer)
    if gone:
        client.violations.append(f"{subject.name}, cancelled: it ran, although cancel() said yes")


def hurried(client: Client, subject: Subject, choose: random.Random) -> None:
    """Next to no time in the queue: it expires there or its answer is right."""
    case = choose.choice(subject.small)
    future = subject.engine.submit(case.inputs, timeout=choose.choice([1e-6, 1e-4, 1e-3]))
    try:
        answer = future.result(4 * STALL_S)
    except RequestTimeout:
        client.note(subject, "hurried", "expired")
        return
    client.check(subject, "hurried", case, answer)


ACTIONS: dict[str, Callable[[Client, Subject, random.Random], None]] = {
    "run": run, "submit": submit, "burst": burst, "map": map_, "run_many": run_many, "large": large,
    "poisoned": poisoned, "misshapen": misshapen, "cancelled": cancelled, "hurried": hurried,
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a soak found."""

    seconds: float
    clients: list[Client]
    samples: list[Resources]
    warm_up_s: float
    violations: list[str]

    @property
    def outcomes(self) -> Counter[tuple[str, str, str]]:
        return sum((client.outcomes for client in self.clients), Counter[tuple[str, str, str]]())


def soak(seconds: float, count: int, seed: int, subjects: Sequence[Subject], stall_s: float = STALL_S) -> Report:
    """So many clients for so many seconds on engines that stay open; a hang ends the process."""
    warm_up_s = min(WARM_UP_S, seconds / 3)
    period_s, stop = min(0.25, seconds / 50), threading.Event()
    progress = Progress(count, period_s)
    clients = [Client(number, progress) for number in range(count)]
    threads = [
        threading.Thread(target=serve, args=(client, subjects, seed, stop), name=f"client {client.number}")
        for client in clients
    ]
    process, samples, began = psutil.Process(), [], time.monotonic()
    for thread in threads:
        thread.start()
    while (passed := time.monotonic() - began) < seconds and all(thread.is_alive() for thread in threads):
        samples.append(Resources.now(process, passed))
        _end_if_stalled(progress, threads, subjects, stall_s)
        time.sleep(period_s)
    stop.set()
    for thread in threads:
        while thread.is_alive():
            thread.join(period_s)
            _end_if_stalled(progress, threads, subjects, stall_s)
    violations = [text for client in clients for text in client.violations]
    violations += growth(samples, warm_up_s) + _miscounted(clients, subjects)
    return Report(time.monotonic() - began, clients, samples, warm_up_s, violations)


def _end_if_stalled(
    progress: Progress, threads: Sequence[threading.Thread], subjects: Sequence[Subject], stall_s: float
) -> None:
    """Print every stack and leave: threads that hang cannot be ended otherwise."""
    progress.tick()
    late = [number for number in progress.stalled(stall_s) if threads[number].is_alive()]
    if late:
        print(f"HANG: clients {late} made no progress for {stall_s:g} s", flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        faulthandler.dump_traceback_later(10, exit=True, file=sys.__stderr__)
        for subject in subjects:
            counts = subject.engine.statistics()
            print(f"  {subject.name}: {counts.waiting} waiting, {counts.execution_count:,} executions", flush=True)
        faulthandler.cancel_dump_traceback_later()
        os._exit(1)


def _miscounted(clients: Sequence[Client], subjects: Sequence[Subject]) -> list[str]:
    """Where an engine counted other than its clients did."""
    outcomes = sum((client.outcomes for client in clients), Counter[tuple[str, str, str]]())
    found = []
    for subject in subjects:
        statistics = subject.engine.statistics()
        seen = Counter[str]()
        for (name, _, outcome), count in outcomes.items():
            seen[outcome] += count * (name == subject.name)
        for what, counted, expected in (
            ("waiting", statistics.waiting, 0),
            ("expired", statistics.expired, seen["expired"]),
            ("rejected", statistics.rejected, seen["rejected"]),
            ("cancelled", statistics.cancelled, seen["cancelled"]),
        ):
            if counted != expected:
                found.append(f"{subject.name}: {counted} {what}, its clients saw {expected}")
    return found


def print_report(report: Report, subjects: Sequence[Subject]) -> None:
    outcomes = report.outcomes
    total = sum(outcomes.values())
    print(f"{total:,} requests in {report.seconds:.1f} s by {len(report.clients)} clients")
    for kind in KINDS:
        ended = Counter[str]()
        for (_, which, outcome), count in outcomes.items():
            ended[outcome] += count * (which == kind)
        print(f"  {kind:10} " + ", ".join(f"{count:,} {name}" for name, count in ended.items() if count))
    for subject in subjects:
        merged = Latencies.merged(
            client.latencies[subject.name] for client in report.clients if subject.name in client.latencies
        )
        statistics = subject.engine.statistics()
        percentiles = ", ".join(f"p{p:g} {merged.percentile(p) * 1e3:.2f}" for p in (50, 90, 99, 99.9))
        print(
            f"  {subject.name:10} run and submit: {percentiles} ms\n"
            f"             {statistics.execution_count:,} executions of {statistics.mean_batch:.2f} rows, "
            f"closed by {dict(statistics.close_reasons)}, {statistics.retried} retried"
        )
    first, last = report.samples[0], report.samples[-1]
    print(
        f"  memory {first.nbytes >> 20} MiB at the start, {last.nbytes >> 20} MiB at the end; threads "
        f"{first.threads} and {last.threads}; may grow by {GROWTH_NBYTES >> 20} MiB after {report.warm_up_s:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    before = threading.active_count()
    subjects = open_subjects(options.seed)
    report = soak(60 * options.minutes, options.clients, options.seed, subjects)
    print_report(report, subjects)
    for subject in subjects:
        subject.engine.close()
    violations = list(report.violations)
    if threading.active_count() > before:
        violations.append(f"{threading.active_count() - before} threads are left after closing the engines")
    for text in violations[:MOST_VIOLATIONS]:
        print(f"VIOLATION {text}")
    print(f"{len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

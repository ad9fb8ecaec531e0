"""A few seconds of the soak, and that it notices what it is there to notice."""

from __future__ import annotations

import dataclasses
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from benchmarks import soak as soaking
from benchmarks.soak import KINDS, Client, print_report, soak
from benchmarks.soak_cases import Subject, open_subjects
from benchmarks.soak_watch import GROWTH_NBYTES, Latencies, Progress, Resources, growth


@pytest.fixture
def subjects() -> Iterator[list[Subject]]:
    opened = open_subjects(seed=1)
    yield opened
    for subject in opened:
        subject.engine.close()


def test_seconds_of_soak_find_nothing(subjects: Sequence[Subject], capsys: pytest.CaptureFixture[str]) -> None:
    report = soak(2.5, 16, 3, subjects)
    assert report.violations == []
    ended = {(kind, outcome) for _, kind, outcome in report.outcomes}
    assert {("run", "right"), ("burst", "right"), ("large", "right"), ("poisoned", "own error")} <= ended
    assert {outcome for _, outcome in ended} <= {"right", "own error", "cancelled", "expired", "rejected"}
    print_report(report, subjects)
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in KINDS) and "memory" in shown and "p99.9" in shown


def test_a_wrong_answer_is_found(subjects: Sequence[Subject]) -> None:
    subject = subjects[0]
    small = tuple(dataclasses.replace(case, outputs=(case.outputs[0] + np.float32(0.01),)) for case in subject.small)
    client = Client(0, Progress(1, 0.1))
    soaking.run(client, dataclasses.replace(subject, small=small), random.Random(0))
    (text,) = client.violations
    assert text.startswith("mlp, run: y: off by 0.01") and client.outcomes["mlp", "run", "wrong"] == 1
    soaking.run(client, subject, random.Random(0))
    assert len(client.violations) == 1


def test_another_ones_error_is_found(subjects: Sequence[Subject]) -> None:
    poison = tuple(dataclasses.replace(case, inputs=case.poisoned()) for case in subjects[1].small)
    stop, client = threading.Event(), Client(0, Progress(1, 0.1))
    hurt = dataclasses.replace(subjects[1], small=poison, large=poison)
    thread = threading.Thread(target=soaking.serve, args=(client, [hurt], 0, stop))
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and len(client.violations) >= soaking.MOST_VIOLATIONS
    assert "ExecutionError" in client.violations[0]


def test_miscounts_are_found(subjects: Sequence[Subject]) -> None:
    client = Client(0, Progress(1, 0.1))
    client.note(subjects[0], "hurried", "expired")
    (text,) = soaking._miscounted([client], subjects)
    assert text == "mlp: 0 expired, its clients saw 1"


def test_a_hang_ends_the_process(
    subjects: Sequence[Subject], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Ended(Exception):
        pass

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("os._exit", leave)
    held = threading.Event()
    threads = [threading.Thread(target=held.wait, args=(60,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    progress = Progress(2, 0.05)
    time.sleep(0.4)
    soaking._end_if_stalled(progress, threads, subjects, 0.2)
    time.sleep(0.06)
    progress.tick()
    progress.beat(1)
    with pytest.raises(Ended, match="1"):
        soaking._end_if_stalled(progress, threads, subjects, 0.05)
    held.set()
    for thread in threads:
        thread.join()
    soaking._end_if_stalled(progress, threads, subjects, 0.05)
    shown = capfd.readouterr()
    assert "HANG: clients [0] made" in shown.out and "mlp: 0 waiting" in shown.out
    assert "soak.py" in shown.err


def test_growth_is_measured_after_the_warm_up() -> None:
    def held(mib: Sequence[float], threads: Sequence[int]) -> list[Resources]:
        return [
            Resources(at, int(size * 2**20), count) for at, (size, count) in enumerate(zip(mib, threads, strict=True))
        ]

    steady = [100.0] * 10 + [150.0] * 40
    assert growth(held(steady, [9] * 10 + [70] * 40), 10) == []
    assert growth(held(steady[:-8] + [190.0] * 8, [70] * 50), 10) == ["memory grew by 40.0 MiB after the warm-up"]
    assert growth(held(steady, [70] * 49 + [71]), 10) == ["1 threads more than after the warm-up"]
    assert GROWTH_NBYTES < 40 << 20


def test_latencies_are_within_a_bucket() -> None:
    halves = Latencies(), Latencies()
    for number in range(1, 1001):
        halves[number % 2].add(number * 1e-4)
    merged = Latencies.merged(halves)
    for p, expected in ((50, 0.05), (99, 0.099), (100, 0.1), (0.1, 1e-4)):
        assert expected <= merged.percentile(p) * (1 + 1e-9) <= expected * 1.021
    assert math.isnan(Latencies().percentile(50))
    halves[0].add(1e9)
    halves[0].add(0.0)

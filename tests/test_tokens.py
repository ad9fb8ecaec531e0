"""What threads sleep on."""

from __future__ import annotations

import threading
import time

import pytest

from gpu_engine.runtime.tokens import Tokens
from tests.recording_device import MakeEngine, RecordingDevice, double, rows


def test_many_tokens_are_one() -> None:
    tokens = Tokens()
    assert not tokens.get(0) and not tokens.get(1e-3)
    for _ in range(3):
        tokens.put()
    assert tokens.get() and not tokens.get(0)


def test_a_sleeper_wakes() -> None:
    tokens, times = Tokens(), []
    thread = threading.Thread(target=lambda: times.append((tokens.get(30), time.monotonic())))
    thread.start()
    time.sleep(0.02)
    put_at = time.monotonic()
    tokens.put()
    thread.join(30)
    ((taken, at),) = times
    assert taken and 0 <= at - put_at < 5


def test_a_long_timeout_is_possible() -> None:
    tokens = Tokens()
    tokens.put()
    assert tokens.get(1e300)
    with pytest.raises(ValueError, match="timeout"):
        tokens.get(-2.0)


def test_the_shortest_timeouts_end() -> None:
    """`SimpleQueue.get` does not come back from a few thousand of these."""
    tokens, ended = Tokens(), []

    def sleep() -> None:
        for i in range(20_000):
            tokens.put()
            tokens.get()
            ended.append(tokens.get((i % 8) * 1e-6))

    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and ended == [False] * 20_000


def test_with_the_shortest_batch_timeout_every_request_is_answered(make_engine: MakeEngine) -> None:
    """The thread that keeps the time of a last batch is called by nobody: it has to wake by itself."""
    engine = make_engine(RecordingDevice(double), streams=2, batch=64, batch_timeout_ms=0.03)
    wrong: list[int] = []

    def client(first: int) -> None:
        for i in range(first, first + 1000):
            if engine.submit(rows(i)).result(10)[0, 0] != 2 * i + 1:
                wrong.append(i)

    threads = [threading.Thread(target=client, args=(1000 * k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counts = engine.statistics()
    assert not wrong and counts.inference_count == 3000 and counts.close_reasons["timeout"] > 100

"""Section 3.15 of the specification: statistics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpu_engine.errors import ExecutionError, QueueFull, RequestTimeout
from gpu_engine.runtime.statistics import Statistics
from tests.recording_device import MakeEngine, RecordingDevice, double, occupy, poisoned, rows

NAMES = set(
    """
    inference_count execution_count mean_batch batch_sizes queue_ns copy_in_ns compute_ns copy_out_ns
    padded_rows close_reasons rejected cancelled expired failed retried busy max_in_flight
    """.split()  # noqa: SIM905
)


def test_3_15_names() -> None:
    fields = {field.name for field in dataclasses.fields(Statistics)} | {"mean_batch"}
    assert fields >= NAMES
    assert all(name in (Statistics.__doc__ or "") or name == "mean_batch" for name in fields)


def test_3_15_every_count(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(poisoned(double))
    engine = make_engine(recorder, streams=1, batch=4, max_queue_size=7)
    (first,) = occupy(engine, recorder, rows(0))
    late = engine.submit(rows(1), timeout=1e-9)
    gone = engine.submit(rows(2))
    good = [engine.submit(rows(3)), engine.submit(rows(4, 5))]
    bad = engine.submit(rows(np.nan))
    last = [engine.submit(rows(6)), engine.submit(rows(7))]
    with pytest.raises(QueueFull):
        engine.submit(rows(8))
    gone.cancel()
    recorder.release()
    assert [future.result(30)[0, 0] for future in (first, *good, *last)] == [1, 7, 9, 13, 15]
    for future, error in ((late, RequestTimeout), (bad, ExecutionError)):
        assert isinstance(future.exception(30), error)
    engine.close()
    counts = engine.statistics()
    assert (counts.rejected, counts.cancelled, counts.expired, counts.delayed) == (1, 1, 1, 0)
    assert counts.failed == 2, "expired and poisoned"
    assert counts.inference_count == 6 and counts.waiting == 0
    assert counts.execution_count == sum(counts.batch_sizes.values())
    assert counts.mean_batch == 6 / counts.execution_count
    assert counts.retried >= 1 and counts.padded_rows == 0
    assert counts.queue_ns > 0 and counts.copy_in_ns > 0 and counts.compute_ns > 0 and counts.copy_out_ns > 0


def test_3_15_close_reasons(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, streams=1, batch=2, batch_timeout_ms=1)
    engine.submit(rows(1)).result(30)
    futures = [engine.submit(rows(i)) for i in range(2)]
    assert all(future.result(30) is not None for future in futures)
    engine.set_property("AUTO_BATCH_TIMEOUT", 60_000)
    future = engine.submit(rows(1))
    engine.flush()
    future.result(30)
    engine.set_property("AUTO_BATCH_TIMEOUT", 0)
    engine.submit(rows(1)).result(30)
    assert engine.statistics().close_reasons == {"timeout": 1, "full": 1, "flush": 1, "idle": 1}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_3_15_streams_are_busy_and_never_hold_more_than_two(make_engine: MakeEngine, asynchronous: bool) -> None:
    recorder = RecordingDevice(double, asynchronous=asynchronous)
    engine = make_engine(recorder, streams=3, batch=2)
    for result in engine.map(rows(i) for i in range(300)):
        assert result.shape == (1, 4)
    counts = engine.statistics()
    assert len(counts.busy) == len(counts.max_in_flight) == 3
    assert all(0 <= busy <= 1 for busy in counts.busy) and max(counts.busy) > 0
    assert 1 <= max(counts.max_in_flight) <= (2 if asynchronous else 1)

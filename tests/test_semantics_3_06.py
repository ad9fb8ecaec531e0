"""Section 3.6 of the specification: the scheduler enum, as DeepSparse has it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from gpu_engine.options import Scheduler
from tests.recording_device import MakeEngine, RecordingDevice, double, rows


@pytest.mark.parametrize(
    ("text", "member"),
    [(text, Scheduler.single_stream) for text in ("sync", "single", "single_stream", "default", "", None, "SYNC")]
    + [(text, Scheduler.multi_stream) for text in ("async", "multi", "multi_stream")]
    + [("elastic", Scheduler.elastic), (Scheduler.elastic, Scheduler.elastic)],
)
def test_3_06_schedulers(text: Any, member: Scheduler) -> None:
    assert Scheduler.of(text) is member


def test_3_06_schedulers_equal_their_strings() -> None:
    assert Scheduler.default is Scheduler.single_stream
    assert Scheduler.multi_stream == "multi_stream" and "multi_stream" == Scheduler.multi_stream  # noqa: SIM300
    assert {"elastic": 1}[Scheduler.elastic] == 1 and "elastic" in {Scheduler.elastic}


def test_3_06_bad_schedulers() -> None:
    for text in ("e", "last", "x"):
        with pytest.raises(ValueError, match=f"unsupported Scheduler: {text}"):
            Scheduler.of(text)
    with pytest.raises(ValueError, match="unsupported type for scheduler: int"):
        Scheduler.of(3)


def test_3_06_single_stream_runs_one_at_a_time_and_multi_stream_several(make_engine: MakeEngine) -> None:
    for scheduler, expected in (("single_stream", 1), ("multi_stream", 3), ("elastic", 3)):
        recorder = RecordingDevice(double)
        engine = make_engine(recorder, scheduler=scheduler, streams=3, batch=1)
        recorder.hold()
        threads = [threading.Thread(target=engine.run, args=(rows(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        recorder.wait_begun(expected)
        recorder.release()
        for thread in threads:
            thread.join(30)
        spans = [(launch.started_s, launch.ended_s) for launch in recorder.launches]
        most = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
        assert most == expected and len(spans) == 8

"""Section 3.6 of the specification: the scheduler enum, as DeepSparse has it."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
import pytest

import gpu_engine
from cpu_fallback import cores
from gpu_engine.options import Scheduler
from gpu_engine.runtime.engine import Engine
from tests.recording_device import MakeEngine, RecordingDevice, double, rows
from tests.test_semantics_3_03 import product_model


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


@pytest.mark.parametrize(
    ("scheduler", "callers", "expected"),
    [("single_stream", 8, 1), ("multi_stream", 8, 3), ("multi_stream", 2, 2), ("elastic", 8, 3)],
)
def test_3_06_single_stream_runs_one_at_a_time_and_multi_stream_several(
    make_engine: MakeEngine, scheduler: str, callers: int, expected: int
) -> None:
    """Callers block, and each gets its own result; min(streams, callers) run at once."""
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, scheduler=scheduler, streams=3, batch=1)
    recorder.hold()
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: engine.run(rows(i))[0, 0]})) for i in range(callers)
    ]
    for thread in threads:
        thread.start()
    recorder.wait_begun(expected)
    assert not found
    recorder.release()
    for thread in threads:
        thread.join(30)
    assert found == {i: 2 * i + 1 for i in range(callers)}
    spans = [(launch.started_s, launch.ended_s) for launch in recorder.launches]
    most = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
    assert most == expected and len(spans) == callers


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({"scheduler": "elastic", "streams": 4}, [2, 1, 2, 1]),
        ({"streams": "numa"}, [3, 3]),
        ({"scheduler": "multi_stream", "streams": 4}, [2, 2, 1, 1]),
    ],
)
def test_3_06_elastic_streams_keep_to_a_numa_node(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], threads: list[int]
) -> None:
    """On a machine of two nodes with three cores each."""
    monkeypatch.setattr(cores, "usable_cores", lambda: cores.Cores(tuple(range(6)), 6, None, own=False))
    monkeypatch.setattr(cores, "node", lambda number, folder=None: number // 3)
    monkeypatch.setattr("gpu_engine.runtime.tuning.numa_nodes", lambda: 2)
    with gpu_engine.compile(product_model(), device="cpu", batch=1, warmup=False, **options) as engine:
        assert isinstance(engine, Engine)
        assert [lane.stream.threads for lane in engine._pool._lanes] == threads
        assert engine.run(np.ones((1, 3, 40), np.float32)).shape == (1, 3, 40)


def test_3_06_options_of_compile_are_named() -> None:
    parameters = list(inspect.signature(gpu_engine.compile).parameters.values())
    assert [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY] == ["model"]
    with pytest.raises(ValueError, match="unsupported Scheduler: x"):
        gpu_engine.compile(product_model(), device="cpu", scheduler="x")

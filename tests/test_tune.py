"""`gpu-engine tune` on the demo's network, and the targets that measurements send to."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_engine
from cpu_fallback.cores import usable_cores
from gpu_engine.tools.cli import main
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.load import Course, closed_loop
from gpu_engine.tools.search import Point
from gpu_engine.tools.targets import Awaited, Called, Notified, Submitted
from gpu_engine.tools.tune import Tuning, tune

MODEL = FOLDER / "digits.onnx"


def tuning(**changes: Any) -> Tuning:
    return Tuning(**{"model": MODEL, "options": {"device": "cpu"}, "seconds": 0.02, "most_batch": 2} | changes)


def test_it_measures_points_of_the_space_and_keeps_other_options() -> None:
    told: list[tuple[Point, int, int]] = []
    options = {"device": "cpu", "config": {"batch": 7, "batch_timeout_ms": 0.5, "device": "cuda"}}
    tuned = tune(tuning(options=options), lambda *news: told.append(news))
    assert len(told) == tuned.found.measurements and {most for _, _, most in told} == {len(tuned.space.points)}
    assert {each.point for each in tuned.found.measured} <= {*tuned.space.points}
    point = tuned.found.chosen.point
    assert tuned.options == {
        "device": "cpu", "batch_timeout_ms": 0.5, "streams": point.streams, "threads": point.threads,
        "batch": point.batch, "requests": point.in_flight,
    }  # fmt: skip
    assert all(each.items_per_s > 0 and each.tail_ms >= each.median_ms > 0 for each in tuned.found.measured)
    cores = len(usable_cores().numbers)
    assert all(streams * (threads or 0) <= cores for streams, threads in tuned.space.lanes)


def test_an_exhaustive_search_measures_every_point() -> None:
    tuned = tune(tuning(exhaustive=True), lambda *_: None)
    assert [each.point for each in tuned.found.measured] == tuned.space.points


def test_a_model_that_cannot_be_batched_has_only_batch_1(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [3, 4])
    share = helper.make_tensor_value_info("share", TensorProto.FLOAT, [3, 4])
    graph = helper.make_graph([helper.make_node("Softmax", ["rows"], ["share"], axis=0)], "shares", [rows], [share])
    path = tmp_path / "shares.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    tuned = tune(tuning(model=path, request=Request()), lambda *_: None)
    assert tuned.space.batches == (1,) and tuned.found.chosen.point.batch == 1


def test_requests_of_several_rows_count_their_rows() -> None:
    wanted = tuning(most_batch=4, request=Request(shapes=["images:2x1x8x8"]))
    tuned = tune(wanted, lambda *_: None)
    assert any(each.mean_batch >= 2 for each in tuned.found.measured)


def test_the_command_writes_a_configuration_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["tune", str(MODEL), "-d", "cpu", "--latency-ms", "1000", "--max-batch", "1", "-t", "0.02"]
    monkeypatch.setattr(sys, "argv", ["gpu-engine", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "chosen" in text and "measurements" in text and "digits.toml" in text
    assert "digits.onnx" in (tmp_path / "digits.html").read_text()
    with gpu_engine.compile(MODEL, config="digits.toml") as engine:
        assert engine.batch == 1
        np.save("x.npy", np.zeros((1, 1, 8, 8), np.float32))
    monkeypatch.setattr(sys, "argv", ["gpu-engine", "run", str(MODEL), "--config", "digits.toml", "-i", "x.npy"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code and "float32[1, 10]" in capsys.readouterr().out


class Echo:
    """An engine that answers on another thread, and fails request number `failing`."""

    def __init__(self, failing: int = -1) -> None:
        self.count, self.failing = 0, failing

    def submit(self, inputs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        number, self.count = self.count, self.count + 1
        if number == self.failing:
            threading.Timer(0.001, future.set_exception, [RuntimeError("broken")]).start()
        else:
            threading.Timer(0.001, future.set_result, [inputs]).start()
        return future


@pytest.mark.parametrize("kind", [Submitted, Awaited])
def test_futures_give_times_and_errors(kind: type[Submitted] | type[Awaited]) -> None:
    target = kind(Echo().submit, "feed")
    taken = closed_loop(target, 3, Course(1.0, queries=9))
    assert len(taken.finished_s) == 9 and min(taken.latencies_s) >= 0.001 and len(target.sending_s) == 11
    with pytest.raises(RuntimeError, match="broken"):
        closed_loop(kind(Echo(failing=4).submit, "feed"), 3, Course(1.0, queries=9))


@pytest.mark.parametrize("threads", [0, 2])
def test_functions_are_called_on_threads_of_their_own_or_on_none(threads: int) -> None:
    seen: set[int] = set()
    target = Called(lambda: seen.add(threading.get_ident()), threads)
    assert len(closed_loop(target, 4, Course(1.0, queries=8)).finished_s) == 8
    target.close()
    assert (threading.get_ident() in seen) is (threads == 0)


def test_an_error_of_a_function_is_the_loads(recwarn: pytest.WarningsRecorder) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    for threads in (0, 2):
        target = Called(fail, threads)
        with pytest.raises(RuntimeError, match="broken"):
            closed_loop(target, 2, Course(1.0, queries=2))
        target.close()
    assert not recwarn.list


def test_nothing_comes_before_its_time() -> None:
    target = Notified(lambda number, finished: finished(number))
    assert target.receive(target.now() + 0.01) is None
    target.send(5)
    assert target.receive(target.now() + 1)[0] == 5  # type: ignore[index]

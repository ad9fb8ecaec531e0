"""`gpu-engine bench` on the demo's network: every scenario, files, peers and what is doubtful."""

from __future__ import annotations

import csv
import gc
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gpu_engine.errors import DeviceError, InputError
from gpu_engine.tools import peers
from gpu_engine.tools.bench import Bench, difference, keeps, measure_all, options_for
from gpu_engine.tools.bench_output import tables
from gpu_engine.tools.cli import main
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.environment import environment
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.heap import frozen_heap
from gpu_engine.tools.load import Course, Taken
from gpu_engine.tools.results import Result, Work, result, windows_of
from gpu_engine.tools.scenarios import SCENARIOS
from gpu_engine.tools.subject import OURS

MODEL = FOLDER / "digits.onnx"
QUICK = Course(0.1, 0.02)


def bench(*names: str, **changes: object) -> list[Result]:
    wanted = Bench(**{"model": MODEL, "options": {"device": "cpu"}, "course": QUICK} | changes)  # type: ignore[arg-type]
    return list(measure_all(wanted, [SCENARIOS[name] for name in names], lambda _: None))


def test_closed_and_open_loop_are_reported_together() -> None:
    closed, opened = bench("closed", "open")
    assert closed.in_flight == closed.settings.in_flight == 4 * 8 * closed.settings.streams // 2  # type: ignore[union-attr]
    assert closed.queries % closed.in_flight == 0 and closed.items_per_s == pytest.approx(closed.items / closed.seconds)
    assert opened.rate == pytest.approx(0.7 * closed.queries_per_s)
    assert opened.in_flight is None and opened.windows == () and opened.latency.max_ms > 0
    assert closed.work is not None and closed.work.rows >= closed.items
    assert closed.latency.min_ms <= closed.latency.at(50.0) <= closed.latency.at(99.0) <= closed.latency.max_ms


def test_the_four_scenarios_of_mlperf() -> None:
    single, multi, offline = bench("SingleStream", "MultiStream", "Offline")
    assert single.figure == single.latency.at(90.0) and single.unit == "ms"
    assert single.settings is not None and single.settings.batch == 1
    assert multi.items == 8 * multi.queries and multi.figure == multi.latency.at(99.0)
    assert offline.metric == "throughput" and offline.figure == offline.items_per_s
    assert all("minimum is 10 s" in " ".join(each.violations) for each in (single, multi, offline))


def test_the_server_scenario_searches_its_rate() -> None:
    (server,) = bench("Server", bound_ms=2000.0, course=Course(0.08, 0.0))
    assert server.rate is not None and server.figure == server.rate > 0 and server.unit == "queries/s"
    assert server.latency.at(99.0) <= 2000.0


def test_a_given_rate_is_kept() -> None:
    (opened,) = bench("open", rate=200.0)
    assert opened.rate == 200.0 and opened.queries == pytest.approx(20, abs=15)


def test_rows_are_items_and_queries_are_a_multiple_of_what_is_in_flight() -> None:
    (closed,) = bench(
        "closed", request=Request(shapes=["images:4x1x8x8"]), in_flight=3, course=Course(1.0, 0.0, queries=7)
    )
    assert closed.queries == 9 and closed.items == 36 and closed.settings is not None and closed.settings.rows == 4


def test_a_configuration_says_what_is_in_flight() -> None:
    (closed,) = bench("closed", options={"config": {"device": "cpu", "streams": 1, "batch": 2, "requests": 3}})
    assert closed.in_flight == 3 and closed.settings is not None and closed.settings.batch == 2


def test_inputs_come_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    (single,) = bench("SingleStream", request=Request(inputs=[str(tmp_path / "x.npy")]))
    assert single.items == 2 * single.queries
    with pytest.raises(InputError, match="given 2 files"):
        bench("SingleStream", request=Request(inputs=[str(tmp_path / "x.npy")] * 2))


@pytest.mark.parametrize(
    ("options", "in_flight", "expected"),
    [
        ({}, None, {"hint": "THROUGHPUT"}),
        ({}, 16, {"requests": 16}),
        ({"batch": 4, "threads": None}, None, {"batch": 4}),
        ({"config": {"streams": 2}}, None, {"config": {"streams": 2}}),
        ({"config": {"device": "cpu"}}, None, {"config": {"device": "cpu"}, "hint": "THROUGHPUT"}),
    ],
)
def test_several_requests_ask_for_throughput_unless_told_otherwise(
    options: dict[str, object], in_flight: int | None, expected: dict[str, object]
) -> None:
    assert options_for(Bench(MODEL, options, in_flight=in_flight), alone=False) == expected
    assert "hint" not in options_for(Bench(MODEL, options, in_flight=in_flight), alone=True)


def test_peers_take_turns_with_us() -> None:
    results = bench("closed", "SingleStream", peers=["onnxruntime"], course=Course(0.15, 0.01))
    assert [each.engine for each in results] == [OURS, "onnxruntime"] * 2
    assert all(each.difference is not None and each.difference < 1e-4 for each in results)
    assert results[1].settings is None and results[1].work is None
    written = io.StringIO()
    Console(width=80, file=written).print(tables(results, environment(["onnxruntime"])))
    text = written.getvalue()
    assert "onnxruntime 1." in text and "times as good" in text and "latencies include copying" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_peer_that_is_not_installed_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(place: str) -> None:
        raise ImportError(place)

    monkeypatch.setattr(peers, "load", absent)
    with pytest.raises(DeviceError, match="python -m pip install openvino"):
        bench("closed", peers=["openvino"])
    with pytest.raises(ValueError, match="unknown peer 'tensorrt'; there are onnxruntime, openvino"):
        bench("closed", peers=["tensorrt"])


def taken(rates: list[int], lag_s: float = 0.0, unfinished: int = 0, overloaded: bool = False) -> Taken:
    """Windows of a second with so many queries of 10 ms each."""
    finished = np.concatenate([i + np.linspace(0.001, 0.999, rate) for i, rate in enumerate(rates)])
    lags = np.full(len(finished), lag_s)
    return Taken(0.0, float(len(rates)), finished, np.full(len(finished), 0.01), lags, unfinished, overloaded)


def judged(load: str, seen: Taken, work: Work | None = None, rate: float | None = None) -> Result:
    return result(
        scenario=SCENARIOS[load], engine=OURS, taken=seen, rows=1, in_flight=1, rate=rate, percentiles=[50.0, 99.0],
        bound_ms=None, work=work, copies="", difference=None, settings=None,
    )  # fmt: skip


def warned(found: Result) -> str:
    return "; ".join(found.warnings)


def test_unsteady_results_are_doubted() -> None:
    steady = judged("closed", taken([100] * 10))
    assert steady.steady and steady.warnings == ()
    assert "coefficient of variance" in warned(judged("closed", taken([100, 92] * 5)))
    falling = judged("closed", taken([100] * 9 + [60]))
    assert falling.steady is False and "not steady" in warned(falling)
    short = judged("closed", taken([20]))
    assert short.steady is None and "measure longer" in warned(short) and "percentile 99" in warned(short)
    assert windows_of(taken([100] * 10), 50) == []


def test_an_enqueue_bound_engine_is_told() -> None:
    def work(submit_s: float) -> Work:
        return Work(1.0, 1.0, 1000, 1000, 0, 0, int(1000 * 100e-6 * 1e9), 0, submit_s, 2)

    assert "enqueue bound: submit() takes 45.0 us" in warned(judged("closed", taken([100] * 10), work(45e-6)))
    assert judged("closed", taken([100] * 10), work(35e-6)).warnings == ()


def test_an_open_loop_that_is_behind_is_told() -> None:
    assert judged("open", taken([100] * 10), rate=100.0).warnings == ()
    text = warned(judged("open", taken([100] * 10, 0.005, 7, True), rate=100.0))
    assert "sent late" in text and "7 queries were given up" in text and "overloaded" in text
    behind = taken([100] * 10)
    late = Taken(0.0, 8.0, behind.finished_s, behind.latencies_s, behind.lag_s)
    assert "did not keep up" in warned(judged("open", late, rate=125.0))


def test_a_bound_is_kept_only_if_everything_was_served() -> None:
    assert keeps(taken([100]), 99.0, 10.1) and not keeps(taken([100]), 99.0, 9.9)
    assert not keeps(taken([100], unfinished=1), 99.0, 10.1) and not keeps(taken([100], overloaded=True), 99.0, 10.1)


def test_differences_are_shares_of_the_largest_number() -> None:
    assert difference([np.array([1.0, 10.0])], [np.array([2.0, 10.0])]) == pytest.approx(0.1)
    assert difference([np.array(["a"])], [np.array(["a"])]) is None
    assert difference([np.zeros(0)], [np.zeros(0)]) == 0


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `gpu-engine bench ...` for the demo's network."""
    monkeypatch.setattr(sys, "argv", ["gpu-engine", "bench", str(MODEL), "-d", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out.json", tmp_path / "rows.csv"
    code = command(
        monkeypatch, "-t", 0.1, "--warmup", 0, "-nstreams", 1, "-nireq", 8, "-latency_percentile", 75,
        "--json", out, "--csv", rows,
    )  # fmt: skip
    text = capsys.readouterr().out
    assert (
        code == 0 and "closed, 8 in flight" in text and "p75" in text and "bound by: requests" in " ".join(text.split())
    )
    written = json.loads(out.read_text())
    assert written["environment"]["versions"]["gpu-engine"] and written["environment"]["cores"] >= 1
    closed, opened = written["results"]
    assert closed["settings"]["batch"] == 4 and closed["settings"]["streams"] == 1 and "p75_ms" in closed["latency"]
    assert opened["scenario"] == "open" and closed["work"]["mean_batch"] > 0
    lines = list(csv.DictReader(rows.read_text().splitlines()))
    assert [line["scenario"] for line in lines] == ["closed", "open"]
    assert float(lines[0]["latency.p75_ms"]) == pytest.approx(closed["latency"]["p75_ms"])


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--percentile", 101), 1, "between 1 and 100"),
        (("--scenario", "nonsense"), 1, "unknown scenario"),
        (("--shape", "pictures:1x1x8x8"), 1, "names none of the inputs images"),
        (("stray",), 2, "unexpected argument"),
    ],
)
def test_a_wrong_option_is_a_message(
    arguments: tuple[object, ...],
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "-t", 0.05, "--warmup", 0, *arguments) == code
    assert word in " ".join(capsys.readouterr().err.split())


def test_latencies_are_measured_with_the_heap_left_alone() -> None:
    before = gc.get_freeze_count()
    with frozen_heap():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0

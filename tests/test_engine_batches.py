"""Which requests run together, over a recording device with real threads."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import numpy as np
import pytest

from tests.recording_device import (
    F32,
    MakeEngine,
    RecordingDevice,
    double,
    occupy,
    plain,
    plan_of,
    rows,
    until,
)

MIXED = plan_of(
    {"x": (F32, ("N", "w")), "add": (np.int64, ("N",))}, {"y": (F32, ("N", "w")), "sum": (np.float64, ("N",))}
)


def mixed_model(x: Any, add: Any) -> list[Any]:
    return [x + add[:, None].astype(F32), (x.astype(np.float64) + add[:, None]).sum(1)]


def test_sixteen_requests_on_two_streams_form_batches_of_four(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double, asynchronous=True)
    engine = make_engine(recorder, streams=2, requests=16)
    assert (engine.batch, engine.optimal_requests, recorder.opened) == (4, 16, (2, 2, None))
    recorder.hold()
    results = engine.map(rows(i) for i in range(16))
    thread = threading.Thread(target=lambda: found.extend(results))
    found: list[Any] = []
    thread.start()
    until(lambda: recorder.most_in_flight == {0: 2, 1: 2})
    recorder.release()
    thread.join(30)
    assert [launch.rows for launch in recorder.launches] == [4] * 4
    assert sorted((launch.stream, launch.slot) for launch in recorder.launches) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert recorder.most_in_flight == {0: 2, 1: 2} and engine.statistics().max_in_flight == (2, 2)
    np.testing.assert_array_equal(np.concatenate(found), rows(*range(16)) * 2 + 1)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_never_more_than_two_in_flight_per_stream(make_engine: MakeEngine, streams: int) -> None:
    recorder = RecordingDevice(double, asynchronous=True)
    engine = make_engine(recorder, streams=streams, batch=2)
    futures = [engine.submit(rows(i)) for i in range(200)]
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert all(most <= 2 for most in recorder.most_in_flight.values())
    assert engine.statistics().max_in_flight == tuple(recorder.most_in_flight.get(i, 0) for i in range(streams))


def test_while_a_slot_is_busy_the_next_batch_collects(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, streams=1, batch=8)
    recorder.hold()
    futures = [engine.submit(rows(0))]
    recorder.wait_begun()
    futures += [engine.submit(rows(i)) for i in range(1, 12)]
    recorder.release()
    concurrent.futures.wait(futures, 30)
    assert [launch.rows for launch in recorder.launches] == [1, 8, 3]
    assert engine.statistics().close_reasons == {"idle": 2, "full": 1}
    assert engine.statistics().batch_sizes == {1: 1, 3: 1, 8: 1}


def test_the_second_slot_of_a_stream_is_filled_while_the_first_computes(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double, asynchronous=True)
    engine = make_engine(recorder, streams=1, batch=2)
    recorder.hold()
    first = engine.submit(rows(1))
    recorder.wait_begun()
    second = engine.submit(rows(2))
    until(lambda: recorder.most_in_flight == {0: 2})
    third = [engine.submit(rows(i)) for i in (3, 4)]
    recorder.release()
    for i, future in enumerate([first, second, *third], 1):
        np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert [launch.rows for launch in recorder.launches] == [1, 1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_32_threads_of_200_requests_each_get_their_own_results(make_engine: MakeEngine, asynchronous: bool) -> None:
    engine = make_engine(RecordingDevice(mixed_model, asynchronous=asynchronous), MIXED, streams=2, requests=32)
    wrong: list[Any] = []

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        pending = []
        for i in range(200):
            shape = (int(random.integers(0, 12)), int(random.integers(1, 4)))
            x, add = random.standard_normal(shape, F32), random.integers(-9, 9, shape[:1])
            expected = mixed_model(x, add)
            result = engine.submit([x, add]) if i % 2 else engine.run([x, add])
            pending.append((result, expected))
        for result, expected in pending:
            found = result if isinstance(result, list) else result.result(60)
            if not all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)):
                wrong.append((found, expected))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert engine.statistics().waiting == 0


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 61])
@pytest.mark.parametrize("call", ["run", "submit", "run_many"])
def test_large_requests_are_cut_and_joined(
    recorder: RecordingDevice, make_engine: MakeEngine, count: int, call: str
) -> None:
    plan = plan_of({"x": (F32, ("N", 4)), "heads": (F32, ("3*N",))}, {"y": (F32, ("N", 4)), "z": (F32, ("6*N",))})
    recorder.model = lambda x, heads: [x * 2 + 1, np.repeat(heads, 2)]
    engine = make_engine(recorder, plan, streams=2, batch=4)
    inputs = {"x": rows(*range(count)), "heads": np.arange(3 * count, dtype=F32)}
    result = getattr(engine, call)(inputs)
    result = result.result(30) if call == "submit" else result
    np.testing.assert_array_equal(result["y"], inputs["x"] * 2 + 1)
    np.testing.assert_array_equal(result["z"], np.repeat(inputs["heads"], 2))
    assert max(launch.rows for launch in recorder.launches) <= 4
    assert sum(launch.rows for launch in recorder.launches) == count


@pytest.mark.parametrize("options", [{"streams": 1, "batch": 4}, {"hint": "latency"}])
def test_no_rows_need_no_launch(recorder: RecordingDevice, make_engine: MakeEngine, options: dict[str, Any]) -> None:
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (np.float16, ("N", "2*w", 3)), "z": (np.int64, ("N",))})
    engine = make_engine(recorder, plan, **options)
    for result in (engine.run([np.zeros((0, 5), F32)]), engine.submit([np.zeros((0, 5), F32)]).result(0)):
        assert [(array.shape, array.dtype) for array in result] == [((0, 10, 3), np.float16), ((0,), np.int64)]
    assert not recorder.launches


def test_without_proven_batching_requests_run_as_they_are(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, plain(refused="Softmax 's' normalizes over axis 0"), streams=2, batch=4)
    for count in (0, 1, 9):
        np.testing.assert_array_equal(engine.run_many(rows(*range(count))), rows(*range(count)) * 2 + 1)
    assert [launch.rows for launch in recorder.launches] == [0, 1, 9]
    plan = engine.explain_batching()
    assert (plan.batch, plan.limiting_factor) == (1, "graph") and "Softmax" in plan.reason


def test_the_latency_hint_neither_batches_nor_cuts(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, hint="latency")
    recorder.hold()
    futures = [engine.submit(rows(i)) for i in range(5)]
    futures.append(engine.submit(rows(*range(9))))
    recorder.wait_begun()
    recorder.release()
    concurrent.futures.wait(futures, 30)
    assert [launch.rows for launch in recorder.launches] == [1] * 5 + [9]
    assert recorder.opened == (1, 1, None)


def test_inputs_without_rows_are_shared_only_if_identical(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    plan = plan_of(
        {"x": (F32, ("N", 4)), "scale": (F32, ()), "table": (F32, (100,))},
        {"y": (F32, ("N", 4)), "total": (F32, ())},
    )
    recorder.model = lambda x, scale, table: [x * scale + table.sum(), table.sum()]
    engine = make_engine(recorder, plan, streams=1, batch=8)
    table, other = np.full(100, 1, F32), np.full(100, 2, F32)
    occupy(engine, recorder, [rows(0), F32(0), other])
    cases = [(2, table), (2, table), (3, table), (2, other), (2, table), (3, table)]
    futures = [engine.submit([rows(i), np.array(scale, F32), t]) for i, (scale, t) in enumerate(cases)]
    recorder.release()
    for i, (future, (scale, t)) in enumerate(zip(futures, cases, strict=True)):
        y, total = future.result(30)
        np.testing.assert_array_equal(y, rows(i) * scale + t.sum())
        assert total == t.sum() and total.flags.owndata
    assert sorted(launch.rows for launch in recorder.launches) == [1] * (2 + recorder.asynchronous) + [2, 3]


def test_cut_requests_keep_outputs_without_rows(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    plan = plan_of({"x": (F32, ("N", 4)), "b": (F32, (2,))}, {"y": (F32, ("N", 4)), "twice": (F32, (2,))})
    recorder.model = lambda x, b: [x + b[0], b * 2]
    y, twice = make_engine(recorder, plan, streams=2, batch=2).run([rows(*range(9)), np.array([1, 2], F32)])
    np.testing.assert_array_equal(y, rows(*range(1, 10)))
    assert list(twice) == [2, 4]


@pytest.mark.parametrize("milliseconds", [1, 60_000])
def test_a_batch_timeout(recorder: RecordingDevice, make_engine: MakeEngine, milliseconds: float) -> None:
    engine = make_engine(recorder, streams=2, batch=4, batch_timeout_ms=milliseconds)
    futures = [engine.submit(rows(i)) for i in range(4)]
    assert [future.result(30)[0, 0] for future in futures] == [1, 3, 5, 7]
    if milliseconds == 1:
        assert engine.run(rows(1))[0, 0] == 3
        return
    assert engine.statistics().close_reasons == {"full": 1}
    full = engine.run(rows(0, 1, 2, 3))
    assert full.shape == (4, 4) and engine.statistics().served_by_callers == 1
    future = engine.submit(rows(5))
    assert not future.done()
    engine.flush()
    assert future.result(30)[0, 0] == 11 and engine.statistics().close_reasons["flush"] == 1
    assert [result[0, 0] for result in engine.map(rows(i) for i in range(3))] == [1, 3, 5]
    assert engine.run_many(rows(*range(6))).shape == (6, 4)
    last = engine.submit(rows(6))
    engine.close()
    assert last.result(0)[0, 0] == 13

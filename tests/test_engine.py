"""The engine over a recording device, with real threads: results, batches, errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import EngineClosed, ExecutionError, InputError, OutOfMemory, QueueFull, RequestTimeout
from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import RecordingDevice, plan_of, poisoned

F32 = np.float32
MakeEngine = Callable[..., Engine]


def double(x: Any) -> list[Any]:
    return [x * 2 + 1]


def plain(**rest: Any) -> Any:
    return plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}, **rest)


def rows(*values: float) -> Any:
    return np.repeat(np.array(values, F32)[:, None], 4, axis=1)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.0005)


def occupy(engine: Engine, device: RecordingDevice, inputs: Any) -> list[Any]:
    """Hold the device and fill the slots of its only stream, one request each."""
    device.hold()
    futures = []
    for _ in range(2 if device.asynchronous else 1):
        futures.append(engine.submit(inputs))
        until(lambda: engine.statistics().waiting == 0)
    return futures


@pytest.fixture(params=["synchronous", "asynchronous"])
def device(request: pytest.FixtureRequest) -> RecordingDevice:
    return RecordingDevice(double, asynchronous=request.param == "asynchronous")


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    made: list[tuple[Engine, RecordingDevice]] = []

    def engine(device: RecordingDevice, plan: Any = None, **options: Any) -> Engine:
        made.append((Engine(plan or plain(), device, validated(**options)), device))
        return made[-1][0]

    yield engine
    for one, used in made:
        used.release()
        one.close(timeout_s=30)


def test_the_same_kind_comes_back(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device)
    x = rows(1, 2)
    for result in (engine.run(x), engine.run([x])[0], engine.run((x,))[0], engine.run({"x": x})["y"]):
        np.testing.assert_array_equal(result, x * 2 + 1)
    assert type(engine.run((x,))) is list and type(engine.run({"x": x})) is dict
    np.testing.assert_array_equal(engine.run([[[1, 2, 3, 4]]])[0], [[3, 5, 7, 9]])


@pytest.mark.parametrize("call", ["run", "submit", "batched", "run_many", "map"])
def test_outputs_belong_to_the_caller(device: RecordingDevice, make: MakeEngine, call: str) -> None:
    device.model = lambda x: [np.asfortranarray(x * 2 + 1)]
    engine = make(device, streams=1, batch=4)
    x = rows(1, 2, 3)[:, ::-1]
    results = {
        "run": lambda: [engine.run(x)],
        "submit": lambda: [engine.submit(x).result()],
        "batched": lambda: [future.result() for future in [engine.submit(row[None]) for row in x]],
        "run_many": lambda: [engine.run_many(np.repeat(x, 5, axis=0))],
        "map": lambda: list(engine.map([x, x])),
    }[call]()
    engine.run(rows(9, 9, 9, 9))
    for result in results:
        assert result.flags.owndata and result.flags.writeable and result.flags.c_contiguous
        assert set(result.ravel()) <= {3.0, 5.0, 7.0}


def test_the_input_is_read_but_not_changed(device: RecordingDevice, make: MakeEngine) -> None:
    x = rows(1, 2, 3, 4)[::2, ::-1]
    x.setflags(write=False)
    np.testing.assert_array_equal(make(device).run(x), x * 2 + 1)


def test_a_caller_serves_itself_when_a_slot_is_idle(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, requests=16)
    for _ in range(10):
        engine.run(rows(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-engine")]
    counts = engine.statistics()
    assert counts.served_by_callers == counts.execution_count == counts.inference_count == 10
    assert counts.close_reasons == {"idle": 10}


def test_sixteen_requests_on_two_streams_form_batches_of_four(make: MakeEngine) -> None:
    device = RecordingDevice(double, asynchronous=True)
    engine = make(device, streams=2, requests=16)
    assert (engine.batch, engine.optimal_requests, device.opened) == (4, 16, (2, 2, None))
    device.hold()
    results = engine.map(rows(i) for i in range(16))
    thread = threading.Thread(target=lambda: found.extend(results))
    found: list[Any] = []
    thread.start()
    device.wait_begun(2)
    device.release()
    thread.join(30)
    assert [launch.rows for launch in device.launches] == [4] * 4
    assert sorted((launch.stream, launch.slot) for launch in device.launches) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert device.most_in_flight == {0: 2, 1: 2} and engine.statistics().max_in_flight == (2, 2)
    np.testing.assert_array_equal(np.concatenate(found), rows(*range(16)) * 2 + 1)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_never_more_than_two_in_flight_per_stream(make: MakeEngine, streams: int) -> None:
    device = RecordingDevice(double, asynchronous=True)
    engine = make(device, streams=streams, batch=2)
    futures = [engine.submit(rows(i)) for i in range(200)]
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert all(most <= 2 for most in device.most_in_flight.values())
    assert engine.statistics().max_in_flight == tuple(device.most_in_flight.get(i, 0) for i in range(streams))


def test_while_a_slot_is_busy_the_next_batch_collects(make: MakeEngine) -> None:
    device = RecordingDevice(double)
    engine = make(device, streams=1, batch=8)
    device.hold()
    futures = [engine.submit(rows(0))]
    device.wait_begun()
    futures += [engine.submit(rows(i)) for i in range(1, 12)]
    device.release()
    concurrent.futures.wait(futures, 30)
    assert [launch.rows for launch in device.launches] == [1, 8, 3]
    assert engine.statistics().close_reasons == {"idle": 2, "full": 1}
    assert engine.statistics().batch_sizes == {1: 1, 3: 1, 8: 1}


def test_the_second_slot_of_a_stream_is_filled_while_the_first_computes(make: MakeEngine) -> None:
    device = RecordingDevice(double, asynchronous=True)
    engine = make(device, streams=1, batch=2)
    device.hold()
    first = engine.submit(rows(1))
    device.wait_begun()
    second = engine.submit(rows(2))
    until(lambda: device.most_in_flight == {0: 2})
    third = [engine.submit(rows(i)) for i in (3, 4)]
    device.release()
    for i, future in enumerate([first, second, *third], 1):
        np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert [launch.rows for launch in device.launches] == [1, 1, 2]


MIXED = plan_of(
    {"x": (F32, ("N", "w")), "add": (np.int64, ("N",))}, {"y": (F32, ("N", "w")), "sum": (np.float64, ("N",))}
)


def mixed_model(x: Any, add: Any) -> list[Any]:
    return [x + add[:, None].astype(F32), (x.astype(np.float64) + add[:, None]).sum(1)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_32_threads_of_200_requests_each_get_their_own_results(make: MakeEngine, asynchronous: bool) -> None:
    engine = make(RecordingDevice(mixed_model, asynchronous=asynchronous), MIXED, streams=2, requests=32)
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


def test_a_poisoned_request_fails_alone(device: RecordingDevice, make: MakeEngine) -> None:
    device.model = poisoned(double)
    engine = make(device, streams=1, batch=8)
    first = occupy(engine, device, rows(0))
    futures = [engine.submit(rows(np.nan if i == 5 else i)) for i in range(8)]
    device.release()
    for i, future in enumerate(futures):
        if i == 5:
            with pytest.raises(ExecutionError, match="a NaN came in"):
                future.result(30)
        else:
            np.testing.assert_array_equal(future.result(30), rows(i) * 2 + 1)
    assert max(launch.rows for launch in device.launches) == 8
    counts = engine.statistics()
    assert (counts.failed, counts.retried) == (1, 3) and counts.inference_count == 7 + len(first)
    np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)


def test_an_error_on_the_callers_thread_leaves_the_engine_serving(device: RecordingDevice, make: MakeEngine) -> None:
    device.model = poisoned(double)
    engine = make(device)
    for _ in range(3):
        with pytest.raises(ExecutionError):
            engine.run(rows(np.nan))
        np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)
    assert engine.statistics().failed == 3


def test_a_failing_part_fails_the_whole_request_once(device: RecordingDevice, make: MakeEngine) -> None:
    device.model = poisoned(double)
    engine = make(device, streams=2, batch=2)
    x = rows(*range(40))
    x[7] = np.nan
    future, other = engine.submit(x), engine.submit(rows(3))
    with pytest.raises(ExecutionError):
        future.result(30)
    np.testing.assert_array_equal(other.result(30), rows(3) * 2 + 1)
    assert engine.statistics().failed == 1


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 61])
@pytest.mark.parametrize("call", ["run", "submit", "run_many"])
def test_large_requests_are_cut_and_joined(device: RecordingDevice, make: MakeEngine, count: int, call: str) -> None:
    plan = plan_of({"x": (F32, ("N", 4)), "heads": (F32, ("3*N",))}, {"y": (F32, ("N", 4)), "z": (F32, ("6*N",))})
    device.model = lambda x, heads: [x * 2 + 1, np.repeat(heads, 2)]
    engine = make(device, plan, streams=2, batch=4)
    inputs = {"x": rows(*range(count)), "heads": np.arange(3 * count, dtype=F32)}
    result = getattr(engine, call)(inputs)
    result = result.result(30) if call == "submit" else result
    np.testing.assert_array_equal(result["y"], inputs["x"] * 2 + 1)
    np.testing.assert_array_equal(result["z"], np.repeat(inputs["heads"], 2))
    assert max(launch.rows for launch in device.launches) <= 4
    assert sum(launch.rows for launch in device.launches) == count


@pytest.mark.parametrize("options", [{"streams": 1, "batch": 4}, {"hint": "latency"}])
def test_no_rows_need_no_launch(device: RecordingDevice, make: MakeEngine, options: dict[str, Any]) -> None:
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (np.float16, ("N", "2*w", 3)), "z": (np.int64, ("N",))})
    engine = make(device, plan, **options)
    for result in (engine.run([np.zeros((0, 5), F32)]), engine.submit([np.zeros((0, 5), F32)]).result(0)):
        assert [(array.shape, array.dtype) for array in result] == [((0, 10, 3), np.float16), ((0,), np.int64)]
    assert not device.launches


def test_without_proven_batching_requests_run_as_they_are(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, plain(refused="Softmax 's' normalizes over axis 0"), streams=2, batch=4)
    for count in (0, 1, 9):
        np.testing.assert_array_equal(engine.run_many(rows(*range(count))), rows(*range(count)) * 2 + 1)
    assert [launch.rows for launch in device.launches] == [0, 1, 9]
    plan = engine.explain_batching()
    assert (plan.batch, plan.limiting_factor) == (1, "graph") and "Softmax" in plan.reason


def test_the_latency_hint_neither_batches_nor_cuts(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, hint="latency")
    device.hold()
    futures = [engine.submit(rows(i)) for i in range(5)]
    futures.append(engine.submit(rows(*range(9))))
    device.wait_begun()
    device.release()
    concurrent.futures.wait(futures, 30)
    assert [launch.rows for launch in device.launches] == [1] * 5 + [9]
    assert device.opened == (1, 1, None)


def test_inputs_without_rows_are_shared_only_if_identical(device: RecordingDevice, make: MakeEngine) -> None:
    plan = plan_of(
        {"x": (F32, ("N", 4)), "scale": (F32, ()), "table": (F32, (100,))},
        {"y": (F32, ("N", 4)), "total": (F32, ())},
    )
    device.model = lambda x, scale, table: [x * scale + table.sum(), table.sum()]
    engine = make(device, plan, streams=1, batch=8)
    table, other = np.full(100, 1, F32), np.full(100, 2, F32)
    occupy(engine, device, [rows(0), F32(0), other])
    cases = [(2, table), (2, table), (3, table), (2, other), (2, table), (3, table)]
    futures = [engine.submit([rows(i), np.array(scale, F32), t]) for i, (scale, t) in enumerate(cases)]
    device.release()
    for i, (future, (scale, t)) in enumerate(zip(futures, cases, strict=True)):
        y, total = future.result(30)
        np.testing.assert_array_equal(y, rows(i) * scale + t.sum())
        assert total == t.sum() and total.flags.owndata
    assert sorted(launch.rows for launch in device.launches) == [1] * (2 + device.asynchronous) + [2, 3]


def test_cut_requests_keep_outputs_without_rows(device: RecordingDevice, make: MakeEngine) -> None:
    plan = plan_of({"x": (F32, ("N", 4)), "b": (F32, (2,))}, {"y": (F32, ("N", 4)), "twice": (F32, (2,))})
    device.model = lambda x, b: [x + b[0], b * 2]
    y, twice = make(device, plan, streams=2, batch=2).run([rows(*range(9)), np.array([1, 2], F32)])
    np.testing.assert_array_equal(y, rows(*range(1, 10)))
    assert list(twice) == [2, 4]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((1, 4)), "float64"),
        (np.zeros((1, 5), F32), "axis 1"),
        (np.zeros(4, F32), "rank 1"),
        ({"X": rows(1)}, "did you mean 'x'"),
        ([], "list of 0"),
        ("text", "is a str"),
        (None, "NoneType"),
    ],
)
def test_bad_inputs_are_refused_before_admission(
    device: RecordingDevice, make: MakeEngine, inputs: Any, message: str
) -> None:
    engine = make(device, streams=2, requests=16)
    for call in (engine.run, engine.submit, engine.run_many, lambda x: list(engine.map([x]))):
        with pytest.raises(InputError, match=message):
            call(inputs)
    assert not device.launches
    np.testing.assert_array_equal(engine.run(rows(1)), rows(1) * 2 + 1)


def test_a_request_beyond_the_memory_is_refused_before_allocating(device: RecordingDevice, make: MakeEngine) -> None:
    device.row_nbytes, device.free_nbytes = 1 << 30, 64 << 30
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make(device, plan, streams=1)
    with pytest.raises(OutOfMemory, match=r"an execution at N = 1, w = 100 needs 107,374,182,400 bytes"):
        engine.run(np.zeros((1, 100), F32))
    assert engine.run(np.zeros((1, 9), F32)).shape == (1, 9)
    unbatched = make(device, hint="latency")
    with pytest.raises(OutOfMemory):
        unbatched.submit(rows(*range(100)))


def test_memory_limits_the_rows_of_each_shape(device: RecordingDevice, make: MakeEngine) -> None:
    device.row_nbytes, device.free_nbytes = 1 << 20, 64 << 20
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make(device, plan, streams=2, batch=8, memory_fraction=1)
    slots = 4 if device.asynchronous else 2
    assert engine.run(np.zeros((40, 8), F32)).shape == (40, 8)
    assert max(launch.rows for launch in device.launches) == 64 // (8 * slots)


def test_the_batch_is_limited_by_memory_at_compile_time(device: RecordingDevice, make: MakeEngine) -> None:
    device.row_nbytes, device.free_nbytes = 1000, 13_000
    engine = make(
        device, plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}), streams=1, batch=100, memory_fraction=1
    )
    slots = 2 if device.asynchronous else 1
    plan, memory = engine.explain_batching(), engine.memory_plan()
    assert (plan.batch, plan.limiting_factor) == (12 // slots, "memory")
    assert (memory.weights, memory.activations, memory.slots) == (1000, plan.batch * 1000, slots)
    assert memory.total == 13_000


def test_memory_running_out_halves_the_batch(device: RecordingDevice, make: MakeEngine) -> None:
    def model(x: Any) -> list[Any]:
        if len(x) > 2:
            raise OutOfMemory("no room for more than 2 rows")
        return double(x)

    device.model = model
    engine = make(device, streams=1, batch=8)
    results = list(engine.map(rows(i) for i in range(8)))
    np.testing.assert_array_equal(np.concatenate(results), rows(*range(8)) * 2 + 1)


def test_map_keeps_the_order_and_reads_ahead_a_little(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, batch=2)
    read: list[int] = []

    def source() -> Iterator[Any]:
        for i in range(100):
            read.append(i)
            yield rows(i)

    ahead = 0
    for i, result in enumerate(engine.map(source())):
        np.testing.assert_array_equal(result, rows(i) * 2 + 1)
        ahead = max(ahead, len(read) - i)
    assert len(read) == 100 and ahead <= 2 * engine.optimal_requests


def test_map_raises_at_the_place_of_the_error(device: RecordingDevice, make: MakeEngine) -> None:
    device.model = poisoned(double)
    engine = make(device, streams=2, batch=2)
    for bad, error in ((rows(np.nan), ExecutionError), (np.zeros(3, F32), InputError)):
        results = engine.map([rows(1), rows(2), bad, rows(3)])
        assert [next(results)[0, 0], next(results)[0, 0]] == [3, 5]
        with pytest.raises(error):
            next(results)
        assert list(results) == []
    assert list(engine.map([])) == []


def test_a_full_queue_refuses_or_blocks(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=1, batch=1, max_queue_size=2)
    futures = occupy(engine, device, rows(7))
    futures += [engine.submit(rows(7)) for _ in range(2)]
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        engine.submit(rows(9))
    with pytest.raises(RequestTimeout, match="while the queue was full"):
        engine.submit(rows(9), block=True, timeout=0.01)
    assert engine.statistics().rejected == 1
    thread = threading.Thread(target=lambda: futures.append(engine.submit(rows(7), block=True)))
    thread.start()
    device.release()
    thread.join(30)
    assert len(futures) == (5 if device.asynchronous else 4)
    assert all(future.result(30)[0, 0] == 15 for future in futures)


def test_map_and_a_bounded_queue(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, batch=4, max_queue_size=3)
    assert [result[0, 0] for result in engine.map(rows(i) for i in range(50))] == [i * 2 + 1 for i in range(50)]


def test_requests_expire_in_the_queue(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=1, batch=1)
    first = occupy(engine, device, rows(0))
    late, patient = engine.submit(rows(8), timeout=1e-9), engine.submit(rows(9), timeout=60)
    device.release()
    with pytest.raises(RequestTimeout, match="Request timeout expired"):
        late.result(30)
    assert patient.result(30)[0, 0] == 19 and all(future.result(30) is not None for future in first)
    assert engine.statistics().expired == 1
    with pytest.raises(ValueError, match="timeout"):
        engine.submit(rows(1), timeout=-1)


def test_cancel_before_dispatch_and_after(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=1, batch=4)
    running = occupy(engine, device, rows(0))
    waiting = [engine.submit(rows(i)) for i in range(4)]
    assert waiting[1].cancel() and waiting[1].cancelled() and not running[0].cancel()
    device.release()
    assert [waiting[i].result(30)[0, 0] for i in (0, 2, 3)] == [1, 5, 7]
    assert running[0].result(30)[0, 0] == 1
    assert concurrent.futures.wait(waiting, 30).not_done == set()
    assert engine.statistics().cancelled == 1 and device.launches[-1].rows == 3


@pytest.mark.parametrize("milliseconds", [1, 60_000])
def test_a_batch_timeout(device: RecordingDevice, make: MakeEngine, milliseconds: float) -> None:
    engine = make(device, streams=2, batch=4, batch_timeout_ms=milliseconds)
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


def test_await(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, batch=4)

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(asyncio.wrap_future(engine.submit(rows(i))) for i in range(20))))

    async def direct() -> Any:
        return await engine.submit(rows(3))

    assert [result[0, 0] for result in asyncio.run(main())] == [i * 2 + 1 for i in range(20)]
    assert asyncio.run(direct())[0, 0] == 7


def test_callbacks_may_use_the_engine(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=1, batch=4)
    found: list[Any] = []
    done = threading.Event()

    def again(future: Any) -> None:
        found.append(engine.run(future.result())[0, 0])
        found.append(engine.run_many(rows(*range(9)))[8, 0])
        engine.submit(rows(5)).add_done_callback(lambda f: (found.append(f.result()[0, 0]), done.set()))

    device.hold()
    futures = [engine.submit(rows(1))]
    device.wait_begun()
    futures[0].add_done_callback(again)
    futures += [engine.submit(rows(i)) for i in range(6)]
    device.release()
    assert done.wait(30)
    assert found == [7, 17, 11]
    concurrent.futures.wait(futures, 30)


def test_single_stream_runs_one_at_a_time_and_multi_stream_several(make: MakeEngine) -> None:
    for scheduler, expected in (("single_stream", 1), ("multi_stream", 3)):
        device = RecordingDevice(double)
        engine = make(device, scheduler=scheduler, streams=3, batch=1)
        device.hold()
        threads = [threading.Thread(target=engine.run, args=(rows(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        device.wait_begun(expected)
        device.release()
        for thread in threads:
            thread.join(30)
        spans = [(launch.started_s, launch.ended_s) for launch in device.launches]
        most = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
        assert most == expected and len(spans) == 8


def test_a_thread_serves_each_slot_and_enters_its_stream(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, batch=2, threads=3)
    engine.submit(rows(1)).result(30)
    slots = 4 if device.asynchronous else 2
    assert device.opened == (2, slots // 2, 3)
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("gpu-engine")}
    engine.close()
    assert len(names) == slots and set(device.entered) == names


def test_facts(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=2, requests=16)
    assert engine.device == "recording (a test)" and engine.input_names == ("x",) and engine.output_names == ("y",)
    assert [str(port) for port in (*engine.inputs, *engine.outputs)] == ["x: float32[N, 4]", "y: float32[N, 4]"]
    assert repr(engine) == "<Engine on recording: 2 streams, batch 4>"
    for _ in range(3):
        engine.run(rows(1, 2))
    counts = engine.statistics()
    assert (counts.inference_count, counts.execution_count, counts.mean_batch) == (6, 3, 2)
    assert counts.copy_in_ns > 0 and counts.compute_ns > 0 and counts.copy_out_ns > 0
    assert 0 < sum(counts.busy) <= 2 and engine.streams == 2


def test_nothing_runs_after_close(device: RecordingDevice, make: MakeEngine) -> None:
    engine = make(device, streams=1, batch=2)
    engine.close()
    for call in (engine.run, engine.submit, engine.run_many):
        with pytest.raises(EngineClosed):
            call(rows(1))

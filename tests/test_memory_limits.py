"""What an engine does where memory is short: smaller batches, fewer streams, parts of a request, a typed error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import gpu_engine
from gpu_engine.compiler import open_device
from gpu_engine.errors import InputError, OutOfMemory
from gpu_engine.options import parse_device, validated
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.memory import Budget
from gpu_engine.tools.stages import read_named, stages_of
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, occupy, plain, plan_of, rows
from tests.test_gpu_cuda import network


def small_room(rows_at_once: int) -> Any:
    """`double` on a device whose memory runs out above so many rows."""

    def model(x: Any) -> list[Any]:
        if len(x) > rows_at_once:
            raise OutOfMemory(f"no room for {len(x)} rows")
        return double(x)

    return model


@pytest.mark.parametrize(
    ("budget", "loaded", "room", "most", "bound"),
    [
        (Budget(0.5), False, 400, 900, "free memory"),
        (Budget(0.5), True, 500, 1000, "free memory"),
        (Budget(0.5, 300), False, 200, 200, "memory_limit=300"),
        (Budget(0.5, 300), True, 200, 200, "memory_limit=300"),
        (Budget(0.5, 700), True, 500, 600, "free memory"),
        (Budget(0.5, 50), True, -50, -50, "memory_limit=50"),
    ],
)
def test_a_budget_is_a_share_of_what_is_free_and_a_limit_on_all(
    budget: Budget, loaded: bool, room: int, most: int, bound: str
) -> None:
    assert budget.room(1000, 100, loaded) == room
    assert budget.whole.room(1000, 100, loaded) == most
    assert budget.bound(1000, 100, loaded) == bound


def test_the_batch_gives_way_first_and_then_the_streams(
    recorder: RecordingDevice, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.row_nbytes, slots = 1000, 2 if recorder.asynchronous else 1
    fits = make_engine(recorder, streams=4, batch=8, memory_limit=1000 + 4 * slots * 8000)
    assert (fits.streams, fits.batch, fits.explain_batching().limiting_factor) == (4, 8, "user") and not caplog.text

    limit = 1000 + 4 * slots * 3000
    smaller = make_engine(recorder, streams=4, batch=8, memory_limit=limit)
    plan = smaller.explain_batching()
    assert (smaller.streams, plan.batch, plan.limiting_factor) == (4, 3, "memory")
    assert f"batch=8 was given, limited to 3 by memory_limit={limit:,}" in plan.reason and plan.reason in caplog.text
    assert smaller.memory_plan().total == limit

    fewer = make_engine(recorder, streams=4, batch=8, memory_limit=1000 + 3 * slots * 1000 - 1)
    plan = fewer.explain_batching()
    assert (fewer.streams, plan.batch, plan.limiting_factor) == (2, 1, "memory")
    assert "2 of 4 streams fit the memory" in plan.reason and plan.reason in caplog.text
    assert fewer.optimal_requests == 2 * 2 and recorder.opened == (2, slots, None)
    np.testing.assert_array_equal(fewer.run(rows(1, 2, 3)), rows(1, 2, 3) * 2 + 1)


def test_fixed_shapes_give_up_streams_too(make_engine: MakeEngine) -> None:
    device = RecordingDevice(double, row_nbytes=1000, free_nbytes=4000)
    fixed = plan_of({"x": (F32, (3, 4))}, {"y": (F32, (3, 4))}, batch=None)
    engine = make_engine(device, fixed, streams=8, memory_fraction=1)
    assert engine.streams == 3 and "3 of 8 streams fit" in engine.explain_batching().reason


def test_one_row_that_does_not_fit_is_refused_with_the_numbers(recorder: RecordingDevice) -> None:
    recorder.row_nbytes, recorder.free_nbytes = 5000, 5500
    message = r"1,000 bytes of weights and 5,000 of activations, and of recording 4,500 are left .* by free memory"
    with pytest.raises(OutOfMemory, match=message):
        Engine(plain(), recorder, validated(streams=2, batch=8))
    recorder.own_memory = False
    Engine(plain(), recorder, validated(streams=2, batch=8, warmup=False)).close()
    with pytest.raises(OutOfMemory, match=r"4,999 are left for activations by memory_limit=5,999 \(5,500 bytes are"):
        Engine(plain(), recorder, validated(memory_limit=5999))
    assert recorder.opened == (1, 2 if recorder.asynchronous else 1, None)


def test_what_is_captured_counts(make_engine: MakeEngine) -> None:
    """16 rows in buckets of 1, 2, 4, 8 and 16 have five captures for each of four slots."""
    device = RecordingDevice(double, asynchronous=True, bucketed=True, row_nbytes=100, captured=50)
    engine = make_engine(device, streams=2, batch=16)
    plan = engine.memory_plan()
    assert plan.buckets == {1: 100, 2: 200, 4: 400, 8: 800, 16: 1600}
    assert (plan.activations, plan.graphs, plan.slots, plan.total) == (
        4 * 1600,
        4 * 250,
        4,
        1000 + 4 * 1850,
    )
    assert plan.staging == 4 * 16 * 7
    short = make_engine(device, streams=2, batch=16, memory_limit=1000 + 4 * 1000)
    assert short.batch == 8 and short.memory_plan().total == 1000 + 4 * (800 + 200)


def test_requests_are_held_to_the_limit(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.row_nbytes = 1000
    plan = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    engine = make_engine(recorder, plan, streams=1, memory_limit=9000)
    assert engine.run(np.zeros((2, 8), F32)).shape == (2, 8)
    with pytest.raises(OutOfMemory, match=r"needs 9,000 bytes, .* and memory_limit leaves 8,000"):
        engine.submit(np.zeros((1, 9), F32))


def test_a_request_is_cut_where_memory_runs_out(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = small_room(2)
    engine = make_engine(recorder, streams=1, batch=8)
    x = rows(*range(8))
    for call in (engine.run, engine.run_many, lambda x: engine.submit(x).result(30)):
        np.testing.assert_array_equal(call(x), x * 2 + 1)
    counts = engine.statistics()
    assert counts.failed == 0 and counts.retried > 0 and engine.healthy


def test_batches_are_smaller_once_memory_ran_out(
    recorder: RecordingDevice, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.model = small_room(3)
    engine = make_engine(recorder, streams=1, batch=8)
    occupied = occupy(engine, recorder, rows(1))
    futures = [engine.submit(rows(value)) for value in range(16)]
    recorder.release()
    for future in (*occupied, *futures):
        future.result(30)
    assert "from now on at most 2 share an execution" in caplog.text
    before = len(recorder.launches)
    list(engine.map(rows(value) for value in range(32)))
    assert max(launch.rows for launch in recorder.launches[before:]) <= 2


def test_one_row_for_which_memory_runs_out_fails_alone(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    def model(x: Any) -> list[Any]:
        if (x == 5).any():
            raise OutOfMemory("no room for fives")
        return double(x)

    recorder.model = model
    engine = make_engine(recorder, streams=1, batch=4)
    futures = [engine.submit(rows(value)) for value in range(8)]
    large = engine.submit(rows(1, 2, 5, 3))
    for value, future in enumerate(futures):
        if value != 5:
            np.testing.assert_array_equal(future.result(30), rows(value) * 2 + 1)
    for future in (futures[5], large):
        with pytest.raises(OutOfMemory, match="no room for fives"):
            future.result(30)
    with pytest.raises(OutOfMemory):
        engine.run(rows(5))
    np.testing.assert_array_equal(engine.run(rows(1)), rows(3))
    assert engine.statistics().failed == 3


@pytest.mark.parametrize("name", ["cpu", "interpret"])
def test_every_device_keeps_to_the_limit(name: str) -> None:
    device, _ = open_device(parse_device(name))
    lowered = stages_of(read_named(network()), device.lower).plan
    options = {"streams": 1, "batch": 8, "warmup": False}
    with Engine(lowered, device, validated(**options)) as engine:
        plan = engine.memory_plan()
        assert plan.staging == 0 if name == "cpu" else plan.staging >= 8 * (6 * 4 + 6 * 2 + 4)
    limit = plan.total - 1
    with Engine(lowered, device, validated(**options, memory_limit=limit, memory_fraction=1)) as engine:
        assert engine.batch < 8 and engine.memory_plan().total <= limit
        x = np.ones((20, 6), F32)
        assert engine.run([x])[0].shape == (20, 6)
    with pytest.raises(OutOfMemory, match="one stream of one row needs"):
        Engine(lowered, device, validated(**options, memory_limit=plan.weights + 1))


def test_open_extents_are_left_to_the_requests() -> None:
    """No image of one pixel goes through a kernel of 3 x 3 without padding: nobody asks what it would take."""
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, "h", "w"]) for name in ("x", "y")]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    graph = helper.make_graph([conv], "conv", kinds[:1], [helper.make_tensor_value_info("y", 1, None)], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with gpu_engine.compile(model, device="cpu", streams=1, batch=2, memory_limit=1 << 30) as engine:
        assert engine.run(np.ones((1, 1, 3, 3), F32)).shape == (1, 1, 1, 1)


def test_an_engine_describes_itself_before_anything_is_known() -> None:
    """Of two parts that are joined one has 2 rows for each of the other's: 1 and 1 do not go together."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["half", "z"], ["y"], axis=1),
    ]
    shapes = {"x": ["n", 1, "h", 8], "z": ["n", 1, 4, 4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "joined", inputs, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with gpu_engine.compile(model, device="cpu", streams=1, batch=2) as engine:
        assert engine.describe().memory is None and engine.describe().state == "ready"
        with pytest.raises(InputError):
            engine.memory_plan()
        engine.run({"x": np.ones((1, 1, 8, 8), F32), "z": np.ones((1, 1, 4, 4), F32)})
        assert engine.describe().memory == engine.memory_plan()


def test_the_limit_is_a_number_of_bytes() -> None:
    assert validated(memory_limit=0).memory_limit is None and validated(memory_limit=5).memory_limit == 5
    for wrong in ("1GB", 1.5, True):
        with pytest.raises(TypeError, match="memory_limit must be an integer"):
            validated(memory_limit=wrong)
    with pytest.raises(ValueError, match="memory_limit must not be negative"):
        validated(memory_limit=-1)

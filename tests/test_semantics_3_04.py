"""Section 3.4 of the specification: what may share an execution, beside the proofs in tests/test_batchability.py.

Models without a batch of their own, and models that mix the rows of theirs, run several requests apart from each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import gpu_engine
from gpu_engine.errors import ExecutionError
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Graph, TensorType, verify
from gpu_engine.ir.ops.array import Array
from gpu_engine.passes.grouping import Ungroupable, grouped
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Batching
from gpu_engine.runtime import tuning
from gpu_engine.runtime.engine import Engine
from tests.recording_device import F32, MakeEngine, RecordingDevice, occupy, plan_of, rows
from tests.reference import graph_of, random_inputs, run_graph
from tests.test_batchability import PORTS, PROVEN, REFUSED, sorted_array
from tests.test_control import model_of

CASES = {**PROVEN, **{name: case[:2] for name, case in (*REFUSED.items(), *PORTS.items())}}
APART = {
    "product with an epilogue",
    "quantised recurrence",
    "an unknown operation",
    "filters from the batch",
    "rows by rows",
    "resized rows",
    "no axis",
    "output without",
}
"""What has no form for several requests, or whose outputs do not depend on the inputs."""


def assert_requests_apart(graph: Graph, groups: Graph, **extents: int) -> None:
    """Three requests at once get what each gets alone."""
    alone = [random_inputs(graph, seed, **extents) for seed in range(3)]
    lone = {name: value for name, value in alone[0].items() if not value.ndim}
    alone = [{**inputs, **lone} for inputs in alone]
    expected = [run_graph(graph, inputs, **extents) for inputs in alone]
    together = {name: np.concatenate([inputs[name] for inputs in alone]) for name in alone[0] if name not in lone}
    for name, found in run_graph(groups, {**together, **lone}, requests=3, **extents).items():
        wanted = np.concatenate([outputs[name] for outputs in expected])
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_requests_are_kept_apart_where_rows_are_not(name: str) -> None:
    graph = graph_of(*CASES[name])
    try:
        groups, batching = grouped(graph)
    except Ungroupable as error:
        assert name in APART, str(error)
        return
    assert name not in APART
    assert batching == Batching(
        "requests", tuple(value.rank > 0 for value in graph.inputs), (True,) * len(graph.outputs)
    )
    symbols = {"N": 4, "S": 4, "M": 4}
    assert_requests_apart(graph, verify(groups, "grouping"), **symbols)
    assert_requests_apart(graph, optimize(groups), **symbols)


def test_a_symbol_of_the_same_name_is_left_alone() -> None:
    graph = graph_of({"x": (dims.symbol("requests"), 4)}, lambda b, x: b.emit(ops.Softmax(0), x))
    assert grouped(graph)[1].symbol == "requests_"


def test_the_node_that_cannot_is_named() -> None:
    graph = graph_of({"x": (1, 4)}, lambda b, x: b.emit(Array(sorted_array, (TensorType(FLOAT32, (1, 4)),)), x))
    with pytest.raises(Ungroupable, match=r"Test 'node' has no form that keeps several requests apart \(Array\)"):
        grouped(graph)


@pytest.mark.parametrize("extent", [2, 4])
def test_a_fixed_batch_other_than_one_runs_as_it_is(extent: int) -> None:
    with pytest.raises(Ungroupable, match="a fixed batch other than 1 runs as it is"):
        grouped(graph_of({"x": (extent, 4)}, lambda b, x: b.emit(ops.Softmax(1), x)))


def model(extent: int | str, mixes: bool = False) -> onnx.ModelProto:
    """x [extent, 6] -> flattened and back, with or without the maximum of everything taken off -> y."""
    nodes = [helper.make_node("Softmax", ["x"], ["p"], axis=1)]
    if mixes:
        nodes.append(helper.make_node("ReduceMax", ["p"], ["most"], keepdims=0))
        nodes.append(helper.make_node("Sub", ["p", "most"], ["y"]))
    else:
        nodes.append(helper.make_node("Reshape", ["p", "shape"], ["y"]))
    constants = [] if mixes else [helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [1, 2, 3])]
    ports = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [extent, 6]),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [extent, 6] if mixes else [1, 2, 3]),
    ]
    graph = helper.make_graph(nodes, "fixed", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def compiled(source: onnx.ModelProto, **options: Any) -> Engine:
    engine = gpu_engine.compile(source, device="cpu", **options)
    assert isinstance(engine, Engine)
    return engine


def test_a_model_of_batch_one_shares_executions() -> None:
    """Its reshape to a leading 1 moves no row, so any number of rows may stand there."""
    inputs = [np.random.default_rng(i).standard_normal((1, 6), F32) for i in range(8)]
    with compiled(model(1)) as alone, compiled(model(1), streams=1, batch=4, batch_timeout_ms=1000) as engine:
        assert alone.inputs[0].shape == (1, 6), "latency: the model as it is"
        futures = [engine.submit(x) for x in inputs]
        for x, future in zip(inputs, futures, strict=True):
            np.testing.assert_allclose(future.result(30), alone.run(x), rtol=1e-6)
        assert engine.statistics().batch_sizes == {4: 2}
        np.testing.assert_allclose(engine.run(np.concatenate(inputs)), np.concatenate([*map(alone.run, inputs)]))


def test_requests_whose_rows_are_mixed_share_executions_if_they_have_as_many() -> None:
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((count, 6)).astype(F32) for count in (1, 3, 1, 3, 1, 1)]
    with compiled(model("N", mixes=True)) as alone:
        assert "folds the rows of the batch into one" in alone.explain_batching().reason
        expected = [alone.run(x) for x in inputs]
    with compiled(model("N", mixes=True), streams=1, batch=4, batch_timeout_ms=10_000) as engine:
        futures = [engine.submit(x) for x in inputs]
        engine.flush()
        for future, wanted in zip(futures, expected, strict=True):
            np.testing.assert_array_equal(future.result(30), wanted)
        assert engine.statistics().batch_sizes == {2: 1, 4: 1}


def test_a_static_batch_of_two_is_refused_with_the_reason() -> None:
    with compiled(model(2, mixes=True), streams=1, batch=4) as engine:
        plan = engine.explain_batching()
        assert (plan.batch, plan.limiting_factor) == (1, "graph")
        assert plan.reason.endswith("has the fixed extent 2; and a fixed batch other than 1 runs as it is")
        assert engine.run(np.ones((2, 6), F32)).shape == (2, 6)


def test_warmup_names_rows_that_differ(make_engine: MakeEngine) -> None:
    """The check that no reference makes: k random rows together and singly; then batching is off, with the reason."""
    device = RecordingDevice(lambda x: [np.flip(x, axis=0)])
    engine = make_engine(device, plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}), batch=3, warmup=True)
    plan = engine.explain_batching()
    assert (plan.batch, plan.limiting_factor) == (1, "graph") and "8 of 12 elements" in plan.reason
    np.testing.assert_array_equal(engine.run(rows(5)), rows(5))


def test_a_slow_model_is_not_warmed_up_while_compiling(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first batch is compared with the same rows alone, once, and its sixteenth measured."""
    monkeypatch.setattr(tuning, "QUICK_S", 0.0)
    recorder = RecordingDevice(lambda x: [2 * x], batch_limit=8)
    engine = make_engine(recorder, streams=1, requests=8, warmup=True)
    assert [launch.rows for launch in recorder.launches] == [1]
    recorder.launches.clear()
    for n in range(15):
        occupied = occupy(engine, recorder, rows(9))
        futures = [engine.submit(rows(i)) for i in range(3)]
        recorder.release()
        occupied[0].result(30)
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30), 2 * rows(i))
        assert ("measured" in engine.explain_batching().reason) == (2 * n + 2 >= tuning.FREQUENT)
    assert [launch.rows for launch in recorder.launches[:6]] == [1, 1, 1, 1, 3, 3]


@pytest.mark.parametrize("cut", [False, True])
def test_the_first_batch_that_would_mix_rows_is_run_apart(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    monkeypatch.setattr(tuning, "QUICK_S", 0.0)
    recorder = RecordingDevice(lambda x: [x - x.mean(axis=0, keepdims=True)])
    engine = make_engine(recorder, plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}), batch=3, warmup=True)
    assert engine.batch == 3
    random = np.random.default_rng()
    if cut:
        x = random.standard_normal((8, 4)).astype(F32)
        np.testing.assert_array_equal(engine.run_many(x), x - x.mean(axis=0, keepdims=True))
    else:
        occupied = occupy(engine, recorder, rows(9))
        futures = [engine.submit(random.standard_normal((1, 4)).astype(F32)) for _ in range(7)]
        recorder.release()
        for future in [*occupied, *futures]:
            np.testing.assert_array_equal(future.result(30), np.zeros((1, 4), F32))
    assert engine.explain_batching().limiting_factor == "graph" and engine.batch == 1


def test_rows_that_cannot_be_compared_run_apart(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_two(x: Any) -> list[Any]:
        if len(x) == 2:
            raise ExecutionError("two rows")
        return [x]

    monkeypatch.setattr(tuning, "QUICK_S", 0.0)
    recorder = RecordingDevice(fails_on_two)
    engine = make_engine(recorder, streams=1, batch=3, warmup=True)
    for _ in range(tuning.TRIES + 2):
        occupied = occupy(engine, recorder, rows(9))
        futures = [engine.submit(rows(i)) for i in range(2)]
        recorder.release()
        occupied[0].result(30)
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30), rows(i))
    assert [launch.rows for launch in recorder.launches].count(2) == tuning.TRIES


def test_an_input_without_rows_is_no_mismatch(make_engine: MakeEngine) -> None:
    """Warm-up gives the rows that it compares the same of it."""
    device = RecordingDevice(lambda x, scale: [x * scale])
    plan = plan_of({"x": (F32, ("N", 4)), "scale": (F32, (4,))}, {"y": (F32, ("N", 4))})
    engine = make_engine(device, plan, batch=4, warmup=True)
    assert engine.batch == 4 and engine.explain_batching().refused_inputs == ("scale",)


def test_a_rounding_that_falls_the_other_way_is_no_mismatch(make_engine: MakeEngine) -> None:
    def almost(x: Any) -> list[Any]:
        return [x * (1 + 1e-7 * len(x))]

    assert make_engine(RecordingDevice(almost), batch=4, warmup=True).batch == 4


def anchored() -> onnx.ModelProto:
    """x [N, 6] -> y [N, 6], and anchors [2] that no input touches."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1), helper.make_node("Exp", ["a"], ["anchors"])]
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", 6]), ("y", ["N", 6]), ("anchors", [2]))
    ]
    constants = [helper.make_tensor("a", onnx.TensorProto.FLOAT, [2], [0.0, 1.0])]
    graph = helper.make_graph(nodes, "anchored", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_an_output_without_the_batch_is_shared_where_a_batch_is_given() -> None:
    inputs = [np.random.default_rng(i).standard_normal((1 + i % 3, 6), F32) for i in range(6)]
    with compiled(anchored(), streams=1, requests=16) as implicit, compiled(anchored()) as alone:
        plan = implicit.explain_batching()
        assert (plan.batch, plan.limiting_factor) == (1, "graph")
        assert "output 'anchors' does not depend on the batch" in plan.reason
        expected = [alone.run(x) for x in inputs]
    with compiled(anchored(), streams=1, batch=4, batch_timeout_ms=10_000) as engine:
        assert engine.explain_batching().limiting_factor == "user"
        futures = [engine.submit(x) for x in inputs]
        engine.flush()
        for future, (y, anchors) in zip(futures, expected, strict=True):
            found = future.result(30)
            np.testing.assert_allclose(found[0], y, rtol=1e-6)
            np.testing.assert_array_equal(found[1], anchors)
        assert max(engine.statistics().batch_sizes) == 4
        y, anchors = engine.run(np.concatenate(inputs))
        np.testing.assert_allclose(y, np.concatenate([each[0] for each in expected]), rtol=1e-6)
        np.testing.assert_array_equal(anchors, expected[0][1])
        y, anchors = engine.run(np.zeros((0, 6), F32))
        assert y.shape == (0, 6) and anchors.tolist() == expected[0][1].tolist()


NOT_PROVABLE = {
    "Reshape": ("y = Reshape (x, one) s = Softmax <axis = 1> (y) z = Reshape (s, back)", "Softmax"),
    "reduction": ("m = ReduceMean (x, zero) z = Sub (x, m)", "folds the rows of the batch into one"),
    "Softmax": ("z = Softmax <axis = 0> (x)", "Softmax"),
    "Transpose": ("z = Transpose <perm = [1, 0]> (x)", "output 'z' has the rows of the batch along axis 1"),
    "Concat": ("z = Concat <axis = 0> (x, x)", "Concat"),
    "training": (
        "z, mean, var = BatchNormalization <training_mode = 1> (x, ones, zeros, zeros, ones)",
        "BatchNormalization",
    ),
    "random": ("n = RandomNormalLike (x) z = Add (x, n)", "RandomNormalLike"),
    "NonMaxSuppression": ("b = Reshape (x, boxes) s = Reshape (x, scores) z = NonMaxSuppression (b, s)", "NonMax"),
    "If": (
        """z = If (yes) <then_branch = t () => (float[N, 4] u) { u = Neg (x) },
                         else_branch = e () => (float[N, 4] v) { v = Abs (x) }>""",
        "If",
    ),
    "Loop": (
        """z = Loop (n, yes, x) <body = b (int64 k, bool c, float[N, 4] p) => (bool d, float[N, 4] q)
           { d = Identity (c) q = Neg (p) }>""",
        "Loop",
    ),
    "LSTM": ("t = Reshape (x, steps) z, h, k = LSTM <hidden_size = 1> (t, w, r)", "LSTM"),
}


@pytest.mark.parametrize("name", NOT_PROVABLE)
def test_what_cannot_be_proven_is_refused_and_the_node_named(name: str) -> None:
    nodes, reason = NOT_PROVABLE[name]
    kind = "int64" if name == "NonMaxSuppression" else "float"
    constants = """int64[2] one = {1, -1}, int64[2] back = {-1, 4}, float[4] ones = {1, 1, 1, 1}, int64[1] zero = {0},
        float[4] zeros = {0, 0, 0, 0}, int64[3] boxes = {1, -1, 4}, int64[3] scores = {1, 4, -1},
        int64[3] steps = {-1, 1, 4}, float[1, 4, 4] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
        float[1, 4, 1] r = {1, 1, 1, 1}"""
    text = f"g (float[N, 4] x, bool yes, int64 n) => ({kind} z) <{constants}> {{ {nodes} }}"
    with compiled(model_of(text.replace(", int64 n", "") if "n =" in nodes else text)) as engine:
        assert reason in engine.plan.batching.refused
        assert engine.batch == 1


def test_requests_of_other_extents_never_share_an_execution() -> None:
    """They share streams only: all extents but the batch must be equal."""
    text = "g (float[N, W] x) => (float[N, W] y) { y = Softmax <axis = 1> (x) }"
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((1, width), F32) for width in (3, 5, 3, 7, 5, 3, 3)]
    with compiled(model_of(text), streams=1, batch=4, batch_timeout_ms=10_000, warmup=False) as engine:
        futures = [engine.submit(x) for x in inputs]
        engine.flush()
        for x, future in zip(inputs, futures, strict=True):
            np.testing.assert_allclose(future.result(30), np.exp(x) / np.exp(x).sum(), rtol=1e-5)
        counts = engine.statistics()
        assert counts.batch_sizes[1] >= 1 and counts.close_reasons["shape"] >= 1
        widths = [x.shape[1] for x in inputs]
        assert counts.execution_count >= len(set(widths)) and max(counts.batch_sizes) <= 4


@pytest.mark.parametrize("extents", [(None,), ("batch",), (None, None), ("batch", "batch_size")])
def test_a_batch_needs_no_name_and_not_one_name(extents: tuple[int | str | None, ...]) -> None:
    """Inputs whose batches are not known to be equal are kept apart by request, and share executions all the same."""
    names = ["x", "y"][: len(extents)]
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [extent, 6])
        for name, extent in zip((*names, "z"), (*extents, None), strict=True)
    ]
    graph = helper.make_graph([helper.make_node("Sum", names, ["z"])], "unnamed", ports[:-1], ports[-1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with compiled(made, streams=1, batch=4, batch_timeout_ms=10_000) as engine:
        futures = [engine.submit([np.full((1, 6), i, F32)] * len(names)) for i in range(4)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30)[0], np.full((1, 6), i * len(names), F32))
        assert engine.statistics().batch_sizes == {4: 1}

"""If and Loop as jumps among native steps: against ONNX Runtime, and what their checks say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

import gpu_engine
from cpu_fallback.calls import Native
from cpu_fallback.checks import is_verdict
from gpu_engine import ExecutionError, InputError
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BOOL, FLOAT16, FLOAT32, INT64
from gpu_engine.ir.ops import Gather, Pad
from tests.cpu_execution import lowered, op_graph, run_graph
from tests.one_node import onnxruntime_of
from tests.test_control import floats, model_of

N, M = dims.symbol("N"), dims.symbol("M")
Reference = Callable[[onnx.ModelProto, Any], Sequence[Any]]


def evaluated(model: onnx.ModelProto, inputs: Any) -> Sequence[Any]:
    """By onnx's reference evaluator: ONNX Runtime counts on in an iteration's number that is carried as it is."""
    return list(ReferenceEvaluator(model).run(None, inputs))


def agree(
    model: onnx.ModelProto, *many: Mapping[str, Any], native: bool = True, reference: Reference = onnxruntime_of
) -> None:
    """One engine, whose plan is native but for checks if `native`, gives what the reference gives for each input."""
    with gpu_engine.compile(model, device="cpu") as engine:
        steps = engine.plan.steps
        assert native == all(isinstance(step.kernel, Native) or is_verdict(step) for step in steps)
        for inputs in many:
            arrays = {name: np.asarray(array) for name, array in inputs.items()}
            expected = reference(model, arrays)
            for port, wanted in zip(model.graph.output, expected, strict=True):
                np.testing.assert_allclose(engine.run(arrays)[port.name], wanted, 1e-6, err_msg=port.name)


SWAPPED = """
g (int64 n, bool go, float[N, 3] a, float[N, 3] b) => (float[N, 3] x, float[N, 3] y, bool z, float[N, 3] w, int64 k) {
  x, y, z, w, k = Loop (n, go, a, b, go, a, n) <body = step (
      int64 i, bool before, float[N, 3] p, float[N, 3] q, bool r, float[N, 3] same, int64 j
    ) => (bool r, float[N, 3] q, float[N, 3] sum, bool after, float[N, 3] same, int64 i) {
      sum = Add (p, a)
      three = Constant <value = int64 {3}> ()
      after = Less (i, three)
  }>
}"""


def test_carried_values_that_change_places() -> None:
    """Values, the condition and the iteration's number change hands at once."""
    feeds = [
        {"n": np.int64(n), "go": np.bool_(go), "a": floats(rows, 3), "b": floats(rows, 3, seed=1)}
        for n in (0, 1, 2, 9) for go in (False, True) for rows in (1, 4)
    ]  # fmt: skip
    agree(model_of(SWAPPED), *feeds, reference=evaluated)


STACKED = """
g (float[N, 2] x, bool[3] c) => (float[N, 2] last, float[T, N, 2] before, float[T, N, 2] after, bool[T, 3] always) {
  n = Constant <value = int64 {4}> ()
  last, before, after, always = Loop (n, , x) <body = step (int64 i, bool go, float[N, 2] s)
    => (bool on, float[N, 2] next, float[N, 2] seen, float[N, 2] again, bool[3] same) {
      on = Constant <value = bool {1}> ()
      seen = Identity (s)
      next = Add (s, x)
      again = Identity (next)
      same = Not (c)
  }>
}"""


def test_slices_are_stacked_at_their_places() -> None:
    agree(model_of(STACKED), *({"x": floats(n, 2), "c": np.array([n > 2, True, False])} for n in (1, 3, 8)))


SCANNED = """
g (float[T, N, 2] x, float[N, 2] start) => (float[N, 2] last, float[T, N, 2] first, float[T, N, 2] second) {
  last, before, after = Scan <num_scan_inputs = 1, body = step (float[N, 2] s, float[N, 2] row)
    => (float[N, 2] next, float[N, 2] seen, float[N, 2] more) {
      seen = Mul (s, row)
      next = Add (s, row)
      half = Mul (next, next)
      more = Sub (half, row)
  }> (start, x)
  first = Neg (before)
  second = Add (after, before)
}"""


def test_stacked_slices_keep_their_memory() -> None:
    """What the iterations fill together is theirs from the first one on, although nothing writes it before."""
    agree(
        model_of(SCANNED), *({"x": floats(t, n, 2), "start": floats(n, 2, seed=1)} for t in (1, 5, 2) for n in (1, 3))
    )


NESTED = """
g (int64 n, bool c, float[N, 2] x) => (float[N, 2] y) {
  y = Loop (n, , x) <body = step (int64 i, bool go, float[N, 2] s) => (bool go, float[N, 2] next) {
      two = Constant <value = int64 {2}> ()
      left = Mod (i, two)
      odd = Cast <to = 9> (left)
      next = If (odd) <
        then_branch = yes () => (float[N, 2] a) {
          a = If (c) <
            then_branch = first () => (float[N, 2] d) { e = Add (s, x)  d = Neg (e) },
            else_branch = second () => (float[N, 2] f) { f = Identity (s) } > },
        else_branch = no () => (float[N, 2] b) {
          b = Loop (n, , s) <body = inner (int64 k, bool on, float[N, 2] t) => (bool on, float[N, 2] u) {
            u = Sub (t, x) }> } >
  }>
}"""


def test_nests_of_both() -> None:
    feeds = [{"n": np.int64(n), "c": np.bool_(c), "x": floats(r, 2)} for n in (0, 1, 5) for c in (0, 1) for r in (1, 6)]
    agree(model_of(NESTED), *feeds)


@pytest.mark.parametrize("rows", (1, 40_000))
def test_bodies_large_enough_for_all_cores(rows: int) -> None:
    model = model_of(NESTED)
    with gpu_engine.compile(model, device="cpu", hint="LATENCY") as engine:
        for n, c in ((0, 0), (5, 0), (3, 1), (5, 1)):
            feed = {"n": np.int64(n), "c": np.bool_(c), "x": floats(rows, 2)}
            (expected,) = onnxruntime_of(model, {name: np.asarray(array) for name, array in feed.items()})
            np.testing.assert_allclose(engine.run(feed)["y"], expected, 1e-5, 1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5))
def test_random_bodies(data: st.DataObject, rows: int) -> None:
    """Random nests over one pool of values: what one branch overwrites the other one, or a later step, must not see."""
    counter = iter(range(1000))

    def value_of(nodes: list[onnx.NodeProto], known: list[str], depth: int) -> str:
        name = f"v{next(counter)}"
        kind = data.draw(st.sampled_from(("Add", "Mul", "Relu", "Neg", "If", "Loop") if depth else ("Add", "Neg")))
        picked = [data.draw(st.sampled_from(known)) for _ in range(2)]
        if kind == "If":
            branches = {key: body_of(known, depth - 1, ()) for key in ("then_branch", "else_branch")}
            nodes.append(helper.make_node("If", [data.draw(st.sampled_from(("c", "d")))], [name], **branches))
        elif kind == "Loop":
            own = (f"i{name}", f"g{name}", f"s{name}")
            stacks = data.draw(st.booleans())
            body = body_of([*known, own[2]], depth - 1, own, stacks)
            every = [f"t{name}"] if stacks else []
            carried = f"c{name}" if stacks else name
            nodes.append(
                helper.make_node("Loop", ["three" if stacks else "n", "", picked[0]], [carried, *every], body=body)
            )
            if stacks:
                nodes.append(helper.make_node("ReduceSum", [*every, "zeroth"], [f"u{name}"], keepdims=0))
                nodes.append(helper.make_node("Add", [carried, f"u{name}"], [name]))
        else:
            nodes.append(helper.make_node(kind, picked if kind in ("Add", "Mul") else picked[:1], [name]))
        return name

    def body_of(known: list[str], depth: int, own: tuple[str, ...], stacks: bool = False) -> onnx.GraphProto:
        nodes: list[onnx.NodeProto] = []
        inside = list(known)
        for _ in range(data.draw(st.integers(0, 3))):
            inside.append(value_of(nodes, inside, depth))
        out = f"o{next(counter)}"
        nodes.append(helper.make_node("Tanh", [data.draw(st.sampled_from(inside))], [out]))
        kinds = [(onnx.TensorProto.INT64, []), (onnx.TensorProto.BOOL, []), (onnx.TensorProto.FLOAT, ["N", 2])]
        inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in zip(own, kinds, strict=False)]
        outputs = [helper.make_tensor_value_info(out, *kinds[2])]
        if own:
            outputs.insert(0, helper.make_tensor_value_info(f"on{out}" if stacks else own[1], *kinds[1]))
        if stacks:
            nodes.append(
                helper.make_node("Constant", [], [f"on{out}"], value=onnx.numpy_helper.from_array(np.ones((), bool)))
            )
            nodes.append(helper.make_node("Sigmoid", [data.draw(st.sampled_from(inside))], [f"e{out}"]))
            outputs.append(helper.make_tensor_value_info(f"e{out}", *kinds[2]))
        return helper.make_graph(nodes, f"body{out}", inputs, outputs)

    body = body_of(["x", "w"], 3, ())
    ports = {"n": (onnx.TensorProto.INT64, []), "c": (onnx.TensorProto.BOOL, []), "d": (onnx.TensorProto.BOOL, [])}
    ports |= dict.fromkeys(("x", "w"), (onnx.TensorProto.FLOAT, ["N", 2]))
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in ports.items()]
    known = {"three": np.int64(3), "zeroth": np.zeros(1, np.int64)}
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in known.items()]
    graph = helper.make_graph(body.node, "g", inputs, body.output, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": floats(rows, 2, seed=rows), "w": floats(rows, 2, seed=rows + 9)}
    every = [
        {**feed, "n": np.int64(n), "c": np.bool_(c), "d": np.bool_(d)} for n in (0, 2) for c in (0, 1) for d in (0, 1)
    ]
    agree(model, *every)


DEMANDING = """
g (bool c, float[N, 2] x, float[M, 2] w) => (float[N, 2] y) {
  y = If (c) <
    then_branch = yes () => (float[N, 2] a) { a = Add (x, w) },
    else_branch = no () => (float[N, 2] b) { b = Neg (x) }>
}"""


def test_only_the_branch_that_runs_demands_what_it_needs() -> None:
    model = model_of(DEMANDING)
    x, w = floats(3, 2), floats(4, 2)
    with gpu_engine.compile(model, device="cpu") as engine:
        for _ in range(2):
            np.testing.assert_array_equal(engine.run({"c": np.bool_(0), "x": x, "w": w})["y"], -x)
            np.testing.assert_array_equal(engine.run({"c": np.bool_(1), "x": x, "w": w[:3]})["y"], x + w[:3])
            with pytest.raises((InputError, ExecutionError), match="4"):
                engine.run({"c": np.bool_(1), "x": x, "w": w})


SQUEEZED = """
g (bool c, float[N, M] x) => (float[N] y) {
  y = If (c) <
    then_branch = yes () => (float[N] a) { axes = Constant <value = int64[1] {1}> ()  a = Squeeze (x, axes) },
    else_branch = no () => (float[N] b) {
      axes = Constant <value = int64[1] {1}> ()
      b = ReduceSum <keepdims = 0> (x, axes) }>
}"""


def test_large_branches_with_checks() -> None:
    """What one branch demands ends a run that several threads share."""
    model = model_of(DEMANDING)
    x, w = floats(60_000, 2), floats(60_001, 2, seed=1)
    with gpu_engine.compile(model, device="cpu", hint="LATENCY") as engine:
        for _ in range(3):
            np.testing.assert_array_equal(engine.run({"c": np.bool_(0), "x": x, "w": w})["y"], -x)
            with pytest.raises((InputError, ExecutionError), match="60001"):
                engine.run({"c": np.bool_(1), "x": x, "w": w})
            np.testing.assert_array_equal(engine.run({"c": np.bool_(1), "x": x, "w": w[1:]})["y"], x + w[1:])


def test_a_check_inside_a_branch_speaks_only_there() -> None:
    with gpu_engine.compile(model_of(SQUEEZED), device="cpu") as engine:
        assert all(isinstance(step.kernel, Native) or is_verdict(step) for step in engine.plan.steps)
        x = floats(4, 3)
        np.testing.assert_allclose(engine.run({"c": np.bool_(0), "x": x})["y"], x.sum(1), 1e-5, 1e-6)
        with pytest.raises(InputError, match="Squeeze"):
            engine.run({"c": np.bool_(1), "x": x})
        np.testing.assert_array_equal(engine.run({"c": np.bool_(1), "x": x[:, :1]})["y"], x[:, 0])


@pytest.mark.parametrize("mode", ("reflect", "edge", "wrap"))
@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT16, BOOL, INT64), ids=str)
def test_borders(mode: str, dtype: Any) -> None:
    random = np.random.default_rng(0)
    for shape in ((4, 5, 6), (1, 2, 1), (33, 1, 2), (7,), (2, 3)):
        x = (random.standard_normal(shape) * 9).astype(dtype)
        for most in (0, 1, 3, 11):
            before, after = (tuple(int(n) for n in random.integers(0, most + 1, len(shape))) for _ in range(2))
            for symbols in (shape, (N, *shape[1:])):
                graph = op_graph(Pad(before, after, mode), [x], [symbols])
                steps = lowered(graph).steps
                assert all(isinstance(step.kernel, Native) or is_verdict(step) for step in steps)
                expected = np.pad(x, list(zip(before, after, strict=True)), mode=mode)  # type: ignore[call-overload]
                np.testing.assert_array_equal(*run_graph(graph, {"x0": x}).values(), expected)


def test_borders_of_nothing_are_refused() -> None:
    graph = op_graph(Pad((1, 0), (0, 0), "reflect"), [floats(2, 3)], [(N, 3)])
    with pytest.raises(InputError, match="axis 0 is empty"):
        run_graph(graph, {"x0": floats(0, 3)})


@pytest.mark.parametrize("place", (0, 2, -1, -3))
def test_picks_at_a_known_place(place: int) -> None:
    for axis in range(3):
        x = floats(3, 4, 5)
        graph = op_graph(Gather(axis), [x, np.int64(place)], [(N, M, 5), ()])
        node = graph.nodes[0]
        assert node.op == Gather(axis)
        text = f"""g (float[N, M, 5] x) => (float y) {{ at = Constant <value = int64 {{{place}}}> ()
                   y = Gather <axis = {axis}> (x, at) }}"""
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
        model.graph.output[0].type.tensor_type.ClearField("shape")
        with gpu_engine.compile(model, device="cpu") as engine:
            assert all(isinstance(step.kernel, Native) or is_verdict(step) for step in engine.plan.steps)
            np.testing.assert_array_equal(engine.run(x), np.take(x, place, axis))
            if axis < 2:
                short = np.take(x, range(abs(place) - (place < 0)), axis) if place else np.take(x, [], axis)
                with pytest.raises(InputError, match=f"index {place}|empty|no rows"):
                    engine.run(np.ascontiguousarray(short))


def test_strings_stay_out_of_native_bodies() -> None:
    text = """g (bool c, string[N] x) => (string[N] y) { y = If (c) <
      then_branch = yes () => (string[N] a) { a = Identity (x) },
      else_branch = no () => (string[N] b) { b = StringConcat (x, x) }> }"""
    with gpu_engine.compile(model_of(text), device="cpu") as engine:
        x = np.array(["a", "b"], object)
        assert engine.run({"c": np.bool_(1), "x": x})["y"].tolist() == ["a", "b"]
        assert engine.run({"c": np.bool_(0), "x": x})["y"].tolist() == ["aa", "bb"]

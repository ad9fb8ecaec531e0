"""Operators on shapes: cutting, joining, padding and generating, with extents known, symbolic or told by running."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.ir import dims
from gpu_engine.ir.graph import Graph, ShapeTensor
from gpu_engine.ir.ops import Iota
from gpu_engine.ir.ops.array import Array as ArrayOp
from tests.one_node import FORMS, Array, graph_of, model_of, onnxruntime_of, run, same
from tests.reference import run_graph

RNG = np.random.default_rng(1)
HUGE = [2**63 - 1, -(2**63), 2**31 - 1, 10**9]


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def agrees(
    name: str, inputs: dict[str, Array | None], opset: int, known: tuple[str, ...] = (), **attributes: Any
) -> None:
    feed = {key: array for key, array in inputs.items() if array is not None}
    (expected,) = onnxruntime_of(model_of(name, inputs, attributes, opset, 1), feed)
    for form in FORMS:
        same(run(name, inputs, opset, known=known, form=form, **attributes), expected)


def spelled(x: Array, start: int, end: int, step: int, axis: int) -> Array:
    """https://onnx.ai/onnx/operators/onnx__Slice.html, read literally."""
    n = x.shape[axis]
    low, high = (0, n) if step > 0 else (-1, n - 1)
    first = min(max(start + n if start < 0 else start, 0), high)
    last = min(max(end + n if end < 0 else end, low), high)
    return np.take(x, list(range(first, last, step)), axis)


@settings(max_examples=150)
@given(
    extent=st.integers(0, 6),
    start=st.integers(-9, 9) | st.sampled_from(HUGE),
    end=st.integers(-9, 9) | st.sampled_from(HUGE),
    step=st.sampled_from([-3, -2, -1, 1, 2, 5]),
)
def test_slices(extent: int, start: int, end: int, step: int) -> None:
    x = np.arange(2 * extent, dtype=np.float32).reshape(2, extent)
    inputs = {"x": x, "starts": ints(start), "ends": ints(end), "axes": ints(-1), "steps": ints(step)}
    for form in FORMS if extent else ("static", "known", "constant"):
        same(
            run("Slice", inputs, known=("starts", "ends", "axes", "steps"), form=form), spelled(x, start, end, step, 1)
        )


def test_slices_by_attributes() -> None:
    x = normal(4, 5)
    same(run("Slice", {"x": x}, 9, starts=[1, -3], ends=[9, -1]), x[1:, -3:-1])
    same(run("Slice", {"x": x}, 9, starts=[0], ends=[-1], axes=[1]), x[:, :-1])


def symbolic_slice(start: Any, end: Any, step: int = 1) -> dims.Dim:
    """The extent of x[start:end:step] of an axis called n, where start and end may be built from n."""
    nodes = [helper.make_node("Shape", ["x"], ["n"])]
    weights = [onnx.numpy_helper.from_array(ints(step), "step"), onnx.numpy_helper.from_array(ints(0), "axis")]
    names = []
    for label, bound in (("s", start), ("e", end)):
        weights.append(onnx.numpy_helper.from_array(ints(bound if isinstance(bound, int) else bound[1]), f"c{label}"))
        if not isinstance(bound, int):
            nodes.append(helper.make_node(bound[0], ["n", f"c{label}"], [label]))
        names.append(f"c{label}" if isinstance(bound, int) else label)
    nodes.append(helper.make_node("Slice", ["x", *names, "axis", "step"], ["y"]))
    x, y = helper.make_tensor_value_info("x", 1, ["n"]), onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    made = graph_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    for n in (1, 2, 3, 7):
        values = np.arange(n, dtype=np.float32)
        bounds = [
            b if isinstance(b, int) else {"Add": n + b[1], "Sub": n - b[1], "Div": n // b[1]}[b[0]]
            for b in (start, end)
        ]
        same(run_graph(made, {"x": values})["y"], spelled(values, *bounds, step, 0))
    return made.outputs[0].shape[0]


def test_symbolic_slices_keep_a_normal_form() -> None:
    n = dims.symbol("n")
    assert symbolic_slice(0, 2**63 - 1) == n
    assert symbolic_slice(1, 2**31 - 1) == n - 1
    assert symbolic_slice(0, -1) == n - 1
    assert symbolic_slice(-1, -(2**63), -1) == n
    assert symbolic_slice(2**63 - 1, -(2**63), -1) == n
    symbolic_slice(0, ("Div", 2))
    assert symbolic_slice(("Sub", 1), 2**63 - 1) == 1
    assert symbolic_slice(0, 10**9, 2) == dims.ceil_div(n, 2)
    symbolic_slice(-3, 2**63 - 1)
    symbolic_slice(2, -2)
    symbolic_slice(("Sub", 3), ("Add", 1))
    symbolic_slice(("Sub", 5), ("Sub", 2), 2)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads(mode: str) -> None:
    x = normal(4, 5)
    for pads in (ints(1, 2, 3, 0), ints(0, -1, -2, 2), ints(0, 0, 0, 0)):
        agrees("Pad", {"x": x, "pads": pads}, 19, ("pads",), mode=mode)
    agrees("Pad", {"x": x, "pads": ints(1, 2), "value": None, "axes": ints(-1)}, 19, ("pads", "axes"), mode=mode)
    if mode == "constant":
        value = np.array(2.5, np.float32)
        agrees("Pad", {"x": x, "pads": ints(1, 0, 0, 1), "value": value}, 19, ("pads",), mode=mode)
    same(run("Pad", {"x": x}, 7, pads=[0, 1, 0, 1], mode="edge"), np.pad(x, ((0, 0), (1, 1)), "edge"))


@pytest.mark.parametrize("shape, allowzero", [
    ((0, -1), 0), ((-1,), 0), ((6, 4), 0), ((0, 0, 2, -1), 0), ((2, 0, 1, 4), 0), ((4, 3, 2), 1),
])  # fmt: skip
def test_reshapes(shape: tuple[int, ...], allowzero: int) -> None:
    agrees("Reshape", {"x": normal(2, 3, 4), "shape": ints(*shape)}, 17, ("shape",), allowzero=allowzero)


def test_reshapes_of_nothing() -> None:
    x = np.zeros((0, 3), np.float32)
    assert run("Reshape", {"x": x, "shape": ints(3, 0)}, known=("shape",), allowzero=1).shape == (3, 0)
    assert run("Reshape", {"x": x, "shape": ints(0, 3)}, known=("shape",)).shape == (0, 3)
    with pytest.raises(InvalidModel, match="leaves -1 open"):
        run("Reshape", {"x": x, "shape": ints(0, -1)}, known=("shape",), allowzero=1)


def test_splits() -> None:
    x = normal(7, 2)
    for form in FORMS:
        parts = run("Split", {"x": x, "sizes": ints(2, 0, 5)}, outputs=3, known=("sizes",), form=form)
        for part, expected in zip(parts, np.split(x, [2, 2]), strict=True):
            same(part, expected)
        uneven = run("Split", {"x": x}, 18, outputs=3, form=form, num_outputs=3)
        assert [len(part) for part in uneven] == [3, 3, 1]
    assert [part.shape for part in run("Split", {"x": x}, 11, outputs=2, axis=1)] == [(7, 1), (7, 1)]
    assert [part.shape for part in run("Split", {"x": x}, 11, outputs=2, axis=0, split=[3, 4])] == [(3, 2), (4, 2)]
    with pytest.raises(InvalidModel, match="equal parts"):
        run("Split", {"x": x}, 13, outputs=2)


def test_axes_as_attribute_and_as_input() -> None:
    x = normal(1, 3, 1)
    same(run("Squeeze", {"x": x}, 11), x[0, :, 0])
    same(run("Squeeze", {"x": x}, 11, axes=[-1]), x[..., 0])
    for form in FORMS:
        same(run("Squeeze", {"x": x, "axes": ints(0, -1)}, known=("axes",), form=form), x[0, :, 0])
        same(run("Unsqueeze", {"x": x, "axes": ints(-1, 0)}, known=("axes",), form=form), x[None, ..., None])
    same(run("Unsqueeze", {"x": x}, 11, axes=[0, 4]), x[None, ..., None])
    with pytest.raises(UnsupportedModel, match="depends on the run"):
        run("Squeeze", {"x": x}, form="symbolic")


def test_expand_and_tile() -> None:
    agrees("Expand", {"x": normal(3, 1), "shape": ints(2, 1, 4)}, 17, ("shape",))
    agrees("Expand", {"x": normal(3, 4), "shape": ints(1)}, 17, ("shape",))
    agrees("Tile", {"x": normal(2, 3), "repeats": ints(2, 0)}, 17, ("repeats",))
    agrees("Tile", {"x": normal(2, 3), "repeats": ints(1, 3)}, 17, ("repeats",))
    agrees("Transpose", {"x": normal(2, 3, 4)}, 17)
    agrees("Concat", {"x": normal(2, 3), "y": normal(0, 3), "z": normal(1, 3)}, 17, axis=-2)
    for axis in (-3, -1, 0, 2, 3):
        agrees("Flatten", {"x": normal(2, 3, 4)}, 17, axis=axis)


@pytest.mark.parametrize("start, end", [(0, None), (1, None), (-1, None), (0, -1), (-9, 2), (2, 9), (2, 1)])
def test_shapes(start: int, end: int | None) -> None:
    x = normal(2, 3, 4)
    found = run("Shape", {"x": x}, start=start, **({} if end is None else {"end": end}))
    assert found.dtype == np.int64 and found.tolist() == [2, 3, 4][start:end]


@pytest.mark.parametrize("start, limit, delta", [(0, 5, 1), (3, -4, -2), (5, 5, 1), (5, 2, 1), (-1, 9, 4)])
def test_ranges(start: int, limit: int, delta: int) -> None:
    for dtype in (np.int64, np.int32, np.float32):
        inputs = {n: np.array(v, dtype) for n, v in (("start", start), ("limit", limit), ("delta", delta))}
        agrees("Range", inputs, 17, tuple(inputs))


def test_a_range_of_narrow_floats_counts_in_wide_ones() -> None:
    inputs = {n: np.array(v, np.float16) for n, v in (("start", 2048), ("limit", 2056), ("delta", 1))}
    same(run("Range", inputs, 27, known=tuple(inputs)), np.arange(2048, 2056, dtype=np.float32).astype(np.float16))


@pytest.mark.parametrize("k", [-9, -1, 0, 2, 9])
def test_triangles_and_diagonals(k: int) -> None:
    for upper in (0, 1):
        agrees("Trilu", {"x": normal(2, 3, 4), "k": np.array(k)}, 17, ("k",), upper=upper)
    agrees("EyeLike", {"x": normal(3, 4)}, 17, k=k, dtype=7)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int) -> None:
    inputs = {"i": np.array([[0, -1, 5], [3, -4, -5]]), "depth": np.array(4), "v": np.array([2, 7], np.float32)}
    agrees("OneHot", inputs, 17, ("depth",), axis=axis)


def test_constants() -> None:
    tensor = onnx.numpy_helper.from_array(np.array([7], np.int8))
    same(run("ConstantOfShape", {"shape": ints(2, 3)}, known=("shape",), value=tensor), np.full((2, 3), 7, np.int8))
    same(run("ConstantOfShape", {"shape": ints()}, known=("shape",)), np.zeros((), np.float32))
    for form in FORMS:
        same(run("ConstantOfShape", {"shape": ints(2, 0)}, known=("shape",), form=form), np.zeros((2, 0), np.float32))
    values = onnx.numpy_helper.from_array(np.array([1.5, 2.5], np.float32), "v")
    sparse = helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(ints(1, 5)), [2, 3])
    for attributes, expected in (
        ({"value_int": 3}, np.array(3)), ({"value_ints": [3, 4]}, ints(3, 4)), ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [1, 2]}, np.array([1, 2], np.float32)), ({"value": tensor}, np.array([7], np.int8)),
        ({"sparse_value": sparse}, np.array([[0, 1.5, 0], [0, 0, 2.5]], np.float32)),
    ):  # fmt: skip
        same(run("Constant", {}, **attributes), expected)
    assert run("Constant", {}, value_string="a").tolist() == "a"
    assert run("Constant", {}, value_strings=["a", "bc"]).tolist() == ["a", "bc"]


def shape_graph(nodes: list[onnx.NodeProto], shape: list[Any], **constants: Array) -> Graph:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], weights)
    return graph_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def test_shape_arithmetic_never_runs() -> None:
    node = helper.make_node
    graph = shape_graph(
        [
            node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["batch"]),
            node("Gather", ["shape", "one"], ["sequence"]), node("Mul", ["sequence", "two"], ["twice"]),
            node("Div", ["twice", "two"], ["again"]), node("Unsqueeze", ["batch", "axis"], ["b"]),
            node("Unsqueeze", ["again", "axis"], ["s"]), node("Concat", ["b", "s", "heads"], ["wanted"], axis=0),
            node("Equal", ["wanted", "minus"], ["open"]), node("Where", ["open", "ones", "wanted"], ["given"]),
            node("Cast", ["given"], ["narrow"], to=6), node("Cast", ["narrow"], ["back"], to=7),
            node("ReduceProd", ["back"], ["count"], keepdims=1), node("Reshape", ["x", "given"], ["apart"]),
            node("Shape", ["apart"], ["apart_shape"]), node("ReduceProd", ["apart_shape"], ["total"], keepdims=1),
            node("Reshape", ["apart", "total"], ["y"]),
        ],
        ["batch", "sequence", 12],
        zero=np.array(0), one=np.array(1), two=np.array(2), axis=ints(0), heads=ints(3, 4), minus=ints(-1),
        ones=ints(1),
    )  # fmt: skip
    assert [type(n.op).__name__ for n in graph.nodes] == ["Reshape", "Reshape"]
    assert graph.outputs[0].shape == (12 * dims.symbol("batch") * dims.symbol("sequence"),)


def test_a_shape_as_output_is_made_where_it_runs() -> None:
    graph = shape_graph([helper.make_node("Shape", ["x"], ["y"])], ["n", 3])
    assert [type(n.op) for n in graph.nodes] == [ShapeTensor]
    assert run_graph(graph, {"x": normal(5, 3)})["y"].tolist() == [5, 3]


def test_what_only_running_tells_goes_on_as_an_extent() -> None:
    node = helper.make_node
    graph = shape_graph(
        [
            node("NonZero", ["x"], ["where"]), node("Shape", ["where"], ["shape"]),
            node("Gather", ["shape", "one"], ["count"]), node("Range", ["zero", "count", "one"], ["y"]),
        ],
        ["n"], zero=np.array(0), one=np.array(1),
    )  # fmt: skip
    assert [type(n.op) for n in graph.nodes] == [ArrayOp, Iota]
    assert run_graph(graph, {"x": np.array([1, 0, 2], np.float32)})["y"].tolist() == [0, 1]


def test_exporters_count_by_the_places_of_ones() -> None:
    node, one = helper.make_node, helper.make_tensor("", TensorProto.INT64, [1], [1])
    nodes = [
        node("Shape", ["x"], ["shape"]), node("ConstantOfShape", ["shape"], ["ones"], value=one),
        node("NonZero", ["ones"], ["where"]), node("Transpose", ["where"], ["rows"]),
        node("Squeeze", ["rows", "axis"], ["y"]),
    ]  # fmt: skip
    assert not shape_graph(nodes, [4], axis=ints(1)).nodes
    graph = shape_graph(nodes, ["n"], axis=ints(1))
    assert run_graph(graph, {"x": normal(3)})["y"].tolist() == [0, 1, 2]


def test_the_rank_must_not_depend_on_the_run() -> None:
    inputs = {"x": normal(2, 3), "shape": ints(3, 2)}
    assert graph_of(model_of("Reshape", inputs, {}, 17, 1)).outputs[0].rank == 2
    with pytest.raises(UnsupportedModel, match="rank"):
        graph_of(model_of("Reshape", inputs, {}, 17, 1, free=("shape",)))

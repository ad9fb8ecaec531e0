"""Operators on tensors against NumPy and onnxruntime, with operands known, open and of symbolic shape."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.passes.batchability import prove
from tests.one_node import FORMS, Array, graph_of, model_of, onnxruntime_of, run, same

RNG = np.random.default_rng(0)
INTS = np.array([-7, -3, -2, -1, 0, 1, 2, 3, 7], np.int32)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def agrees(
    name: str,
    inputs: dict[str, Array | None],
    opset: int = 17,
    outputs: int = 1,
    known: tuple[str, ...] = (),
    rtol: float = 1e-5,
    **attributes: Any,
) -> None:
    """Every form of the node gives what onnxruntime gives."""
    feed = {key: array for key, array in inputs.items() if array is not None}
    expected = onnxruntime_of(model_of(name, inputs, attributes, opset, outputs), feed)
    for form in FORMS:
        found = run(name, inputs, opset, outputs, known, form, **attributes)
        for actual, wanted in zip([found] if outputs == 1 else found, expected, strict=True):
            same(actual, wanted, rtol, 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_functions_that_cancel_keep_their_digits(dtype: Any) -> None:
    x = np.array([-1e4, -40, -20, -1, -1e-3, -1e-6, -0.0, 1e-6, 1e-3, 1, 20, 40, 1e4, np.inf], dtype)
    wide = x.astype(np.longdouble)
    rtol = 8 * float(np.finfo(dtype).eps)
    softplus = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    same(run("Softplus", {"x": x}), softplus.astype(dtype), rtol)
    negative = np.where(wide < 0, np.expm1(np.minimum(wide, 0)), wide)
    same(run("Elu", {"x": x}), negative.astype(dtype), rtol)
    same(run("Celu", {"x": x}), negative.astype(dtype), rtol)
    same(run("Selu", {"x": x}), (1.0507010221481323 * np.where(
        wide < 0, 1.6732631921768188 * negative, wide)).astype(dtype), rtol)  # fmt: skip
    finite, wide = x[:-1], wide[:-1]
    mish = wide * np.tanh(np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide))))
    same(run("Mish", {"x": finite}), mish.astype(dtype), rtol, 1e-7 if dtype == np.float16 else 0)
    same(run("Sigmoid", {"x": x}), (1 / (1 + np.exp(-x.astype(np.longdouble)))).astype(dtype), rtol)


def test_not_a_number_passes_through_comparisons() -> None:
    x, nan = np.array([np.nan, 1, -1], np.float32), np.float32(np.nan)
    same(run("Relu", {"x": x}), np.array([nan, 1, 0], np.float32))
    same(run("Clip", {"x": x, "low": np.array(0, np.float32), "high": None}), np.array([nan, 1, 0], np.float32))
    same(run("Max", {"x": x, "y": np.array([0, nan, 0], np.float32)}), np.array([nan, nan, 0], np.float32))
    same(run("ReduceMax", {"x": x}, keepdims=0), nan)
    assert run("IsNaN", {"x": x}).tolist() == [True, False, False]


@pytest.mark.parametrize("negative, positive", [*itertools.product((0, 1), repeat=2)])
def test_is_inf(negative: int, positive: int) -> None:
    x = np.array([-np.inf, np.inf, np.nan, 3], np.float32)
    found = run("IsInf", {"x": x}, detect_negative=negative, detect_positive=positive)
    assert found.tolist() == [bool(negative), bool(positive), False, False]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_integer_division_and_remainders(dtype: Any) -> None:
    a, b = (grid.ravel().astype(dtype) for grid in np.meshgrid(INTS, INTS[INTS != 0]))
    same(run("Div", {"a": a, "b": b}), np.trunc(a / b).astype(dtype))
    same(run("Mod", {"a": a, "b": b}), np.mod(a, b))
    same(run("Mod", {"a": a, "b": b}, fmod=1), np.fmod(a, b))


def test_floats_have_the_remainder_of_the_divisors_sign() -> None:
    a, b = np.array([5.5, -5.5, 5.5, -5.5, 1, 1], np.float32), np.array([2, 2, -2, -2, np.inf, -np.inf], np.float32)
    same(run("Mod", {"a": a, "b": b}, 28), np.mod(a, b))
    same(run("Mod", {"a": a, "b": b}, 28, fmod=1), np.fmod(a, b))


def test_powers_take_the_dtype_of_the_base() -> None:
    base = np.array([0, 1, 2, 3, 9], np.int32)
    same(run("Pow", {"x": base, "y": np.array([2.0], np.float32)}, known=("y",)), base**2)
    same(run("Pow", {"x": base, "y": np.array([0.5], np.float32)}, known=("y",)), np.sqrt(base).astype(np.int32))
    same(run("Pow", {"x": base, "y": np.array([3], np.int64)}), base**3)
    signed, powers = np.array([-1, -1, 1, 2, 0, -3], np.int32), np.array([-3, -2, -1, -1, -2, 3], np.int32)
    same(run("Pow", {"x": signed, "y": powers}), np.array([-1, 1, 1, 0, 0, -27], np.int32))
    wide = np.array([-2.0, 0.5, 3.0], np.float32)
    same(run("Pow", {"x": wide, "y": np.array([3, -2, 0], np.int64)}), np.array([-8, 4, 1], np.float32), 1e-6)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifts_beyond_the_width(direction: str) -> None:
    amounts = [-1, 0, 1, 7, 8, 9, 100]
    for value in (-128, -3, 1, 127):
        outside = -1 if direction == "RIGHT" and value < 0 else 0
        inside = [value >> n if direction == "RIGHT" else value << n for n in (0, 1, 7)]
        expected = np.array([outside, *inside, outside, outside, outside]).astype(np.int8)
        x, y = np.full(len(amounts), value, np.int8), np.array(amounts, np.int8)
        same(run("BitShift", {"x": x, "y": y}, 28, direction=direction), expected)


def test_saturating_casts_to_eight_bits() -> None:
    x = np.array([1e6, -1e6, np.inf, -np.inf, np.nan, 0.1, 447, 465], np.float32)
    for number, dtype in ((17, ml_dtypes.float8_e4m3fn), (19, ml_dtypes.float8_e5m2)):
        limit = float(ml_dtypes.finfo(dtype).max)
        kept = run("Cast", {"x": x}, to=number)
        assert kept.dtype == dtype
        assert kept.astype(np.float32)[:4].tolist() == [limit, -limit, limit, -limit] and np.isnan(kept[4])
        same(run("Cast", {"x": x}, to=number, saturate=0).astype(np.float32), x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    "mode, expected", [("up", [1, 2, 2, 4, 4]), ("down", [1, 1, 1, 2, 2]), ("nearest", [1, 1, 2, 2, 4])]
)
def test_casts_to_powers_of_two(mode: str, expected: list[float]) -> None:
    x = np.array([1, 1.2, 1.5, 2.2, 3], np.float32)
    found = run("Cast", {"x": x}, 24, to=24, round_mode=mode)
    assert found.astype(np.float32).tolist() == expected
    edges = run("Cast", {"x": np.array([np.inf, 3e38, np.nan], np.float32)}, 24, to=24, round_mode="up")
    assert edges.astype(np.float32)[:2].tolist() == [2.0**127, 2.0**127] and np.isnan(edges[2])


def test_numbers_and_strings() -> None:
    x = np.array([0.1, 314.15926, -2.0, np.nan, np.inf, -np.inf, 1e-5], np.float32)
    texts = run("Cast", {"x": x}, to=8)
    assert texts.tolist() == ["0.1", "314.15927", "-2", "NaN", "INF", "-INF", "0.00001"]
    same(run("Cast", {"x": texts}, to=1), x)
    words = np.array(["1e3", "+INF", "inf", "nan", " 7 "], object)
    same(run("Cast", {"x": words}, to=11), np.array([1000, np.inf, np.inf, np.nan, 7.0]))
    assert run("Cast", {"x": np.array(["9007199254740993", "-3"], object)}, to=7).tolist() == [9007199254740993, -3]


@pytest.mark.parametrize("name", ["Sum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare"])
def test_narrow_floats_are_folded_in_a_wide_one(name: str) -> None:
    if name == "Sum":
        tiny = np.full(1, 2.0**-12, np.float16)
        same(
            run(name, {str(i): array for i, array in enumerate([np.float16([1]), *[tiny] * 8])}),
            np.float16([1.002]),
            1e-3,
        )
        return
    x = np.full((4, 5000), 0.25, np.float16)
    wide = x.astype(np.float64)
    expected = {
        "ReduceMean": wide.mean(1), "ReduceL1": wide.sum(1), "ReduceL2": np.sqrt((wide**2).sum(1)),
        "ReduceLogSumExp": np.log(np.exp(wide).sum(1)), "ReduceSumSquare": (wide**2).sum(1),
    }[name]  # fmt: skip
    same(run(name, {"x": x, "axes": ints(1)}, known=("axes",), keepdims=0), expected.astype(np.float16), 1e-3)


def test_squares_of_narrow_floats_do_not_overflow_before_the_root() -> None:
    same(run("ReduceL2", {"x": np.array([300, 400], np.float16)}, keepdims=0), np.float16(500), 1e-3)


def test_log_sum_exp_of_extremes() -> None:
    def of(*values: float) -> Any:
        return run("ReduceLogSumExp", {"x": np.array(values, np.float32)}, keepdims=0)

    same(of(1000, 1000), np.float32(1000 + np.log(2)), 1e-6)
    same(of(-1000, -1000), np.float32(-1000 + np.log(2)), 1e-6)
    assert of(-np.inf, -np.inf) == -np.inf and of(np.inf, 1) == np.inf and np.isnan(of(np.nan, 1))
    assert run("ReduceLogSumExp", {"x": np.zeros((0, 3), np.float32), "axes": ints(0)}).tolist() == [[-np.inf] * 3]


@pytest.mark.parametrize(
    "name, fill", [("ReduceSum", 0), ("ReduceProd", 1), ("ReduceMax", -np.inf), ("ReduceMin", np.inf)]
)
def test_reductions_of_nothing(name: str, fill: float) -> None:
    x = np.zeros((2, 0, 3), np.float32)
    for form in FORMS:
        same(run(name, {"x": x, "axes": ints(1)}, 20, known=("axes",), form=form), np.full((2, 1, 3), fill, np.float32))


def test_a_mean_of_integers_truncates() -> None:
    x = np.array([[-2, 1, 0], [7, 1, 0]], np.int32)
    same(run("ReduceMean", {"x": x, "axes": ints(1)}, keepdims=0), np.array([0, 2], np.int32))


def test_no_axes_reduce_everything_or_nothing() -> None:
    x = normal(2, 3)
    same(run("ReduceSumSquare", {"x": x, "axes": ints()}, noop_with_empty_axes=1), x * x)
    for form in FORMS:
        same(run("ReduceSum", {"x": x, "axes": ints()}, known=("axes",), form=form, keepdims=0), x.sum(), 1e-6)
    open_axes = model_of("ReduceSum", {"x": x, "axes": ints(0)}, {"noop_with_empty_axes": 1}, 17, 1, free=("axes",))
    assert graph_of(open_axes).outputs[0].rank == 2


@pytest.mark.parametrize("largest, last", [*itertools.product((0, 1), repeat=2)])
def test_ties(largest: int, last: int) -> None:
    x = np.array([3, 1, 3, 1, 3], np.float32)
    values, indices = run("TopK", {"x": x, "k": ints(4)}, outputs=2, known=("k",), largest=largest)
    assert indices.tolist() == ([0, 2, 4, 1] if largest else [1, 3, 0, 2])
    same(values, x[indices])
    index = run("ArgMax" if largest else "ArgMin", {"x": x}, keepdims=0, select_last_index=last)
    assert index == {(1, 0): 0, (1, 1): 4, (0, 0): 1, (0, 1): 3}[largest, last]


def test_top_k_that_only_running_tells() -> None:
    agrees("TopK", {"x": normal(3, 5), "k": ints(2)}, outputs=2, known=("k",), axis=0)
    with pytest.raises(InvalidModel, match="top 6"):
        run("TopK", {"x": normal(5), "k": ints(6)}, outputs=2, known=("k",))


@pytest.mark.parametrize("exclusive, reverse", [*itertools.product((0, 1), repeat=2)])
def test_running_totals(exclusive: int, reverse: int) -> None:
    agrees("CumSum", {"x": normal(2, 4), "axis": np.array(-1)}, known=("axis",), exclusive=exclusive, reverse=reverse)
    x = normal(4)
    ordered = x[::-1] if reverse else x
    total = np.concatenate(([1], ordered))[:-1].cumprod() if exclusive else ordered.cumprod()
    found = run("CumProd", {"x": x, "axis": np.array(0)}, 26, exclusive=exclusive, reverse=reverse)
    same(found, (total[::-1] if reverse else total).astype(np.float32), 1e-6)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction: str) -> None:
    index = np.array([[0, -1, 1], [2, 0, -2]])
    agrees("ScatterElements", {"x": normal(3, 4), "i": index, "u": normal(2, 3)}, 18, reduction=reduction, axis=0)
    if reduction != "none":
        index = np.array([[[0, 1], [0, 1]], [[2, -1], [1, 0]]])
        expected = normal(3, 4)
        x, updates = expected.copy(), normal(2, 2)
        function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
        function.at(expected, (index[..., 0], index[..., 1]), updates)
        same(run("ScatterND", {"x": x, "i": index, "u": updates}, 18, reduction=reduction), expected, 1e-6)


def test_an_index_outside_fails_and_never_reads_wild() -> None:
    x = normal(3, 4)
    for name, index in (
        ("Gather", ints(3)),
        ("Gather", ints(-4)),
        ("GatherElements", np.array([[4]])),
        ("GatherND", np.array([[3]])),
    ):
        with pytest.raises(IndexError):
            run(name, {"x": x, "i": index}, **({"axis": 1} if name == "GatherElements" else {}))


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("ordered", [0, 1])
def test_unique(axis: int | None, ordered: int) -> None:
    x = np.array([[2, 1, 2], [0, 1, 0], [2, 1, 2]], np.float32)
    agrees("Unique", {"x": x}, outputs=4, sorted=ordered, **({} if axis is None else {"axis": axis}))


def test_data_dependent_extents() -> None:
    x = np.array([[1, 0, 2], [0, 0, 3]], np.float32)
    agrees("NonZero", {"x": x})
    agrees("Compress", {"x": x, "c": np.array([0, 1, 1], bool)}, axis=1)
    agrees("Compress", {"x": x, "c": np.array([0, 1, 1], bool)})
    assert run("NonZero", {"x": np.array(5.0)}).shape == (0, 1)
    assert run("NonZero", {"x": np.array(0.0)}).shape == (0, 0)


@pytest.mark.parametrize("equation, shapes", [
    ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))), ("ij,jk", ((3, 4), (4, 5))), ("i,j->ij", ((3,), (4,))),
    ("...ij,...jk->...ik", ((2, 3, 4), (3, 1, 4, 5))), ("ii->i", ((4, 4),)), ("...ii->...i", ((2, 4, 4),)),
    ("ii", ((3, 3),)), ("ij->ji", ((3, 4),)), ("ab...,b...->a...", ((2, 3, 4), (3, 4))),
    ("bhid,bhjd->bhij", ((2, 2, 3, 4),) * 2),
    ("ijk,kl,lm->ijm", ((2, 3, 4), (4, 5), (5, 6))), ("ij,ij->", ((3, 4), (3, 4))), ("iij->j", ((3, 3, 2),)),
])  # fmt: skip
def test_einsum(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = [normal(*shape) for shape in shapes]
    for form in FORMS:
        found = run("Einsum", {f"x{i}": x for i, x in enumerate(operands)}, form=form, equation=equation)
        same(found, np.einsum(equation, *operands), 1e-5, 1e-5)


def test_matrix_products() -> None:
    for a, b in itertools.product(((4,), (3, 4), (2, 1, 3, 4)), ((4,), (4, 5), (3, 4, 5))):
        agrees("MatMul", {"a": normal(*a), "b": normal(*b)})
    for left, right, bias in itertools.product((0, 1), (0, 1), (None, (5,), (3, 1), (1,), (3, 5))):
        a, b = normal(*((4, 3) if left else (3, 4))), normal(*((5, 4) if right else (4, 5)))
        c = None if bias is None else normal(*bias)
        agrees("Gemm", {"a": a, "b": b, "c": c}, transA=left, transB=right, alpha=0.5, beta=2.0)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (0, 2, 2)])
def test_determinants(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    same(run("Det", {"x": x}), np.linalg.det(x), 1e-5)


@pytest.mark.parametrize("axis, apart", [(1, True), (0, False)])
def test_rows_of_a_batch_stay_apart_along_other_axes(axis: int, apart: bool) -> None:
    x, index = normal(2, 4), np.array([[0, 1], [1, 0]])
    for name, inputs, attributes in (
        ("TopK", {"x": x, "k": ints(1)}, {"axis": axis}), ("CumSum", {"x": x, "axis": np.array(axis)}, {}),
        ("ScatterElements", {"x": x, "i": index, "u": normal(2, 2)}, {"axis": axis}),
        ("ReverseSequence", {"x": x, "l": ints(1, 2)}, {"time_axis": axis, "batch_axis": 1 - axis}),
    ):  # fmt: skip
        known = tuple(key for key in inputs if key in ("k", "axis"))
        model = model_of(name, inputs, attributes, 17, 2 if name == "TopK" else 1, known)
        for port in model.graph.input:
            port.type.tensor_type.shape.dim[0].dim_param = "rows"
        assert (prove(graph_of(model)).symbol == "rows") == apart, name


def test_forms_that_cannot_be_are_refused() -> None:
    x = normal(2, 3)
    for name, inputs, attributes in (
        ("Reshape", {"x": x, "s": ints(4, 2)}, {}), ("Reshape", {"x": x, "s": ints(-1, -1)}, {}),
        ("Concat", {"x": x, "y": normal(2, 2)}, {"axis": 0}), ("Transpose", {"x": x}, {"perm": [0, 0]}),
        ("Squeeze", {"x": x, "a": ints(0)}, {}), ("Split", {"x": x, "s": ints(1, 2)}, {"axis": 0}),
        ("Gather", {"x": x, "i": ints(0)}, {"axis": 2}), ("Pad", {"x": x, "p": ints(1, 1)}, {}),
        ("MatMul", {"x": x, "y": x}, {}), ("Add", {"x": x, "y": ints(1)}, {}),
        ("Einsum", {"x": x}, {"equation": "ijk"}),
        ("OneHot", {"i": ints(0), "d": ints(3), "v": normal(2)}, {"axis": 3}),
        ("Cast", {"x": x}, {"to": 99}),
    ):  # fmt: skip
        known = tuple(key for key, array in inputs.items() if array.dtype == np.int64)
        with pytest.raises((InvalidModel, UnsupportedModel)):
            run(name, inputs, outputs=2 if name == "Split" else 1, known=known, **attributes)

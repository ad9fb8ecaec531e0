"""Native attention against the reference in float64: masks, causal rows, NaN, any number of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.fused_attention import emit_attention, emit_turned_attention
from cpu_fallback.native import Target
from cpu_fallback.turned_attention import turn_attention
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, symbol
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value, verify
from gpu_engine.ir.interpreter import run_graph
from gpu_engine.ir.ops import Attention, Reshape, Slice, Transpose
from gpu_engine.plan.turned_attention import TurnedAttention, View
from tests.kernel_runner import targets
from tests.node_runner import run_node

Array = NDArray[Any]
TARGETS = [pytest.param(target, id=f"{target.vector_nbytes * 8}") for target in targets()]
EXTENTS = st.one_of(st.integers(0, 33), st.sampled_from([47, 48, 49, 64, 100, 130]))
KEYS = st.one_of(EXTENTS, st.just(600))
LEADS = st.sampled_from([((), (), ()), ((2, 3),) * 3, ((2, 3), (2, 1), (1, 3)), ((4,), (), (1,)), ((0,), (0,), (0,))])


def floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def exact(op: Attention, operands: list[Array]) -> Array:
    wide = [array if array.dtype == bool else array.astype(np.float64) for array in operands]
    with np.errstate(all="ignore"):
        (result,) = op.evaluate(np, *wide)
    return np.asarray(result)


def assert_same(got: Array, truth: Array, tolerance: float = 1e-5) -> None:
    assert got.shape == truth.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(truth))
    np.testing.assert_allclose(got.astype(np.float64), truth, rtol=0, atol=tolerance)


def mask_of(kind: str, random: np.random.Generator, lead: tuple[int, ...], s: int, t: int) -> Array:
    if kind == "whole":
        return random.random((*lead, s, t)) < 0.7
    if kind == "added":
        return np.where(random.random((s, t)) < 0.3, -np.inf, random.standard_normal((s, t))).astype(np.float32)
    return np.where(random.random((*lead, 1, t)) < 0.3, -20, 0).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(
    target=st.sampled_from(targets()), leads=LEADS, s=EXTENTS, t=KEYS, d=EXTENTS, e=EXTENTS, threads=st.integers(1, 3),
    mask=st.sampled_from(["", "whole", "added", "row"]), causal=st.booleans(), zero_nan=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_shapes_and_masks(
    target: Target, leads: Any, s: int, t: int, d: int, e: int, threads: int, mask: str, causal: bool, zero_nan: bool,
    seed: int,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    operands = [floats(random, *lead, *tail) for lead, tail in zip(leads, ((s, d), (t, d), (t, e)), strict=True)]
    if mask:
        operands.append(mask_of(mask, random, leads[0], s, t))
    shapes: dict[int, tuple[Dim, ...]] = {}
    values = {name: extent for name, extent in (("s", s), ("t", t), ("d", d), ("e", e)) if extent > 0}
    for i, tail in enumerate(("sd", "td", "te")):
        extents = [symbol(name) if name in values else 0 for name in tail]
        shapes[i] = (*leads[i], *extents)
    op = Attention(1 / math.sqrt(max(1, d)), causal=causal, zero_nan=zero_nan)
    got = run_node(emit_attention, op, operands, target, threads=threads, shapes=shapes, values=values)
    assert_same(got, exact(op, operands))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero_nan", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_infinity(target: Target, zero_nan: bool, causal: bool, masked: bool) -> None:
    random = np.random.default_rng(5)
    op = Attention(0.5, causal=causal, zero_nan=zero_nan)
    for poison in range(6):
        q, k, v = floats(random, 20, 8), floats(random, 40, 8), floats(random, 40, 24)
        if poison == 1:
            q[3, 2] = np.nan
        elif poison == 2:
            k[30, 1] = np.inf
        elif poison == 3:
            v[35, 7], v[2, 1] = np.nan, np.inf
        elif poison == 4:
            q[:, 0], k[:, 0] = np.inf, -np.inf
        elif poison == 5:
            q *= 1e18
            k *= 1e18
        operands = [q, k, v]
        if masked:
            shown = random.random((20, 40)) < 0.5
            shown[7] = False
            operands.append(shown)
        assert_same(run_node(emit_attention, op, operands, target, threads=2), exact(op, [*operands]))


@pytest.mark.parametrize("heads", [1, 5])
def test_threads_at_once_compute_the_same(heads: int) -> None:
    random = np.random.default_rng(13)
    target = targets()[0]
    operands = [floats(random, heads, n, 32) for n in (150, 170, 170)]
    alone = run_node(emit_attention, Attention(0.2, causal=True), operands, target)
    for threads in (2, 3, 7):
        for _ in range(5):
            got = run_node(
                emit_attention, Attention(0.2, causal=True), operands, target, threads=threads, at_once=True
            )  # fmt: skip
            np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("target", TARGETS)
def test_a_negative_scale_and_a_finite_fill(target: Target) -> None:
    random = np.random.default_rng(6)
    operands = [floats(random, 3, 9, 5), floats(random, 3, 21, 5), floats(random, 3, 21, 17)]
    for op, extra in ((Attention(-0.7), []), (Attention(0.3, fill=-1e4), [random.random((3, 1, 21)) < 0.5])):
        assert_same(run_node(emit_attention, op, [*operands, *extra], target), exact(op, [*operands, *extra]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_halves(target: Target, dtype: Any) -> None:
    random = np.random.default_rng(8)
    q, k, v = (floats(random, 2, *shape).astype(dtype) for shape in ((11, 16), (37, 16), (37, 40)))
    mask = np.where(random.random((11, 37)) < 0.5, -8, 0).astype(dtype)
    op = Attention(0.25)
    got = run_node(emit_attention, op, [q, k, v, mask], target)
    assert got.dtype == dtype
    assert_same(got, exact(op, [q, k, v, mask]), 3 * float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("target", TARGETS)
def test_heads_between_tokens_and_features(target: Target) -> None:
    random = np.random.default_rng(9)
    turn, rest = (0, 2, 1, 3), (0, 0, 0, 0)
    q, k, v = floats(random, 2, 11, 3, 16), floats(random, 1, 37, 3, 16), floats(random, 2, 3, 37, 20)
    mask = floats(random, 2, 1, 1, 37)
    b, s, t = map(symbol, "bst")
    logical = (b, 3, s, 16), (1, 3, t, 16), (b, 3, t, 20)
    views = tuple(View(shape, axes, rest) for shape, axes in zip(logical, (turn, turn, (0, 1, 2, 3)), strict=True))
    op = TurnedAttention(Attention(0.25), views, turn)
    for threads in (1, 2):
        got = run_node(
            emit_turned_attention, op, [q, k, v, mask], target, threads=threads,
            shapes={0: (b, s, 3, 16), 1: (1, t, 3, 16), 2: (b, 3, t, 20)}, values={"b": 2, "s": 11, "t": 37},
        )  # fmt: skip
        assert_same(got, exact(op.attention, [q.transpose(turn), k.transpose(turn), v, mask]).transpose(turn))


@pytest.mark.parametrize("used_twice", [False, True])
def test_transposes_around_attention_vanish(used_twice: bool) -> None:
    builder = Builder()
    q, k, v = (Value(TensorType(FLOAT32, (2, 8, 3, 4))) for _ in range(3))
    turned = [builder.emit(Transpose((0, 2, 1, 3)), value) for value in (q, k, v)]
    result = builder.emit(Attention(0.5), *turned)
    outputs = [builder.emit(Transpose((0, 2, 1, 3)), result), *([result] if used_twice else [])]
    names = tuple(f"y{i}" for i in range(len(outputs)))
    graph = Graph((q, k, v), tuple(outputs), tuple(builder.nodes), ("q", "k", "v"), names)
    check_turned(graph, [TurnedAttention, *([Transpose] if used_twice else [])])


def test_slices_of_one_projection_vanish() -> None:
    builder = Builder()
    x = Value(TensorType(FLOAT32, (2, 8, 36)))
    parted = builder.emit(Reshape((2, 8, 3, 3, 4)), x)
    turned = []
    for i in range(3):
        part = builder.emit(Slice((0, 0, i, 0, 0), (1,) * 5, (2, 8, 1, 3, 4)), parted)
        turned.append(builder.emit(Transpose((0, 2, 1, 3)), builder.emit(Reshape((2, 8, 3, 4)), part)))
    result = builder.emit(Transpose((0, 2, 1, 3)), builder.emit(Attention(0.5), *turned))
    check_turned(Graph((x,), (result,), tuple(builder.nodes), ("x",), ("y",)), [Reshape, TurnedAttention])


def check_turned(graph: Graph, expected: list[type]) -> None:
    """The graph is turned into these operations and computes the same, natively too."""
    own = targets()[0]
    found = verify(turn_attention(graph, own), "turned")
    assert [type(node.op) for node in found.nodes] == expected
    shapes = [tuple(map(dims.number, value.shape)) for value in graph.inputs]
    arrays = [floats(np.random.default_rng(i), *shape) for i, shape in enumerate(shapes)]
    for array, other in zip(run_graph(np, found, arrays), run_graph(np, graph, arrays), strict=True):
        np.testing.assert_allclose(array, other, rtol=0, atol=1e-6)
    node = next(node for node in found.nodes if isinstance(node.op, TurnedAttention))
    operands = [
        (arrays[i] if len(arrays) == 3 else arrays[0]).reshape(tuple(map(dims.number, value.shape)))
        for i, value in enumerate(node.inputs)
    ]
    (truth,) = node.op.evaluate(np, *operands)
    native = run_node(emit_turned_attention, node.op, operands, own)
    np.testing.assert_allclose(native, truth, rtol=0, atol=1e-6)


def test_doubles_have_no_native_form() -> None:
    (target, *_) = targets()
    with pytest.raises(AssertionError, match="no native form"):
        run_node(emit_attention, Attention(1.0), [np.ones((2, 2))] * 3, target)

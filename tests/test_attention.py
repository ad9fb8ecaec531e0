"""Attention: recognised in every form that exporters write, the same as what it stands for, expandable again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import BOOL, FLOAT16, FLOAT32, DType
from gpu_engine.ir.graph import Builder, Graph, Value, verify
from gpu_engine.ir.ops.attention import BLOCK_NBYTES
from gpu_engine.passes.expansion import expand
from gpu_engine.passes.pipeline import optimize
from tests.reference import assert_same, graph_of, kinds, optimized, pointwise, random_inputs, run_graph

N, S = dims.symbol("N"), dims.symbol("S")


def attention(
    transposition: str = "perm", scale: str = "after", masking: str = "", zero_nan: bool = False, dtype: DType = FLOAT32
) -> Graph:
    """softmax(q k^T / 2) v of [N, S, 2, 4] operands, as exporters vary it."""

    def build(b: Builder, q: Value, k: Value, v: Value, *masks: Value) -> Value:
        q, v = (b.emit(ops.Transpose((0, 2, 1, 3)), value) for value in (q, v))
        if transposition == "perm":
            k = b.emit(ops.Transpose((0, 2, 3, 1)), k)
        elif transposition == "twice":
            k = b.emit(ops.Transpose((0, 1, 3, 2)), b.emit(ops.Transpose((0, 2, 1, 3)), k))
        else:
            k = b.emit(ops.Reshape((2 * N, S, 4)), b.emit(ops.Transpose((0, 2, 1, 3)), k))
            k = b.emit(ops.Reshape((N, 2, 4, S)), b.emit(ops.Transpose((0, 2, 1)), k))
        if scale == "both":
            q, k = (pointwise(b, lambda s: s * math.sqrt(0.5), value) for value in (q, k))
        if scale == "before":
            q = pointwise(b, lambda s: s / 2, q)
        scores = b.emit(ops.MatMul(), q, k)
        if scale == "after":
            scores = pointwise(b, lambda s: s / 2, scores)
        scores = masked(b, scores, masking, masks)
        weights = b.emit(ops.Softmax(3), scores)
        if zero_nan:
            invalid = pointwise(b, expr.isnan, weights)
            weights = pointwise(b, lambda c, s: expr.where(c, 0.0, s), invalid, weights)
        return b.emit(ops.MatMul(), weights, v)

    shapes: dict[str, Any] = dict.fromkeys("qkv", (dtype, (N, S, 2, 4)))
    if masking:
        shapes["mask"] = (dtype if masking == "add" else BOOL, (N, 1, 1, S) if masking != "full" else (N, 1, S, S))
    return graph_of(shapes, build)


def masked(b: Builder, scores: Value, masking: str, masks: tuple[Value, ...]) -> Value:
    match masking:
        case "add":
            return pointwise(b, lambda m, s: m + s, masks[0], scores)
        case "keep" | "full":
            return pointwise(b, lambda m, s: expr.where(m, s, -math.inf), masks[0], scores)
        case "fill":
            return pointwise(b, lambda m, s: expr.where(m, -1e9, s), masks[0], scores)
        case "bias":
            chosen = pointwise(b, lambda m: expr.where(m, expr.const(0.0, FLOAT32), -3.4e38), masks[0])
            return pointwise(b, lambda s, m: s + m, scores, b.emit(ops.Expand((N, 1, S, S)), chosen))
    return scores


@pytest.mark.parametrize("transposition", ["perm", "twice", "merged"])
@pytest.mark.parametrize("scale", ["after", "before", "both"])
def test_attention(transposition: str, scale: str) -> None:
    graph = optimized(attention(transposition, scale), N=2, S=5)
    assert sorted(kinds(graph)) == ["Attention", "Transpose", "Transpose", "Transpose"]
    op = graph.nodes[-1].op
    assert isinstance(op, ops.Attention) and math.isclose(op.scale, 0.5, rel_tol=1e-6)
    assert all(len(node.op.perm) == 4 for node in graph.nodes[:-1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("masking", ["add", "keep", "full", "fill", "bias"])
@pytest.mark.parametrize("zero_nan", [False, True])
def test_masked_attention(masking: str, zero_nan: bool) -> None:
    graph = attention(masking=masking, zero_nan=zero_nan)
    result = optimized(graph, N=2, S=5)
    op = result.nodes[-1].op
    assert isinstance(op, ops.Attention) and op.zero_nan == zero_nan
    assert "Expand" not in kinds(result)
    feeds = random_inputs(graph, N=3, S=4)
    for everywhere in (True, False) if masking != "add" else (-math.inf,):
        feeds["mask"] = np.full_like(feeds["mask"], everywhere)
        assert_same(graph, result, feeds)


def test_attention_in_half_precision_behind_casts() -> None:
    def build(b: Builder, q: Value, k: Value, v: Value) -> Value:
        scores = b.emit(ops.MatMul(transpose_b=True), q, k)
        wide = pointwise(b, lambda s: expr.cast(s, FLOAT32), scores)
        weights = b.emit(ops.Softmax(2), wide)
        return b.emit(ops.MatMul(), pointwise(b, lambda s: expr.cast(s, FLOAT16), weights), v)

    graph = graph_of(dict.fromkeys("qkv", (FLOAT16, (N, S, 8))), build)
    result = optimize(graph)
    assert kinds(result) == ["Attention"]
    assert_same(graph, result, random_inputs(graph, N=2, S=5), rtol=4e-3, atol=4e-3)


def test_weights_that_are_an_output_are_not_hidden_in_attention() -> None:
    def build(b: Builder, q: Value, k: Value, v: Value) -> tuple[Value, ...]:
        weights = b.emit(ops.Softmax(2), b.emit(ops.MatMul(transpose_b=True), q, k))
        return b.emit(ops.MatMul(), weights, v), weights

    graph = optimized(graph_of(dict.fromkeys("qkv", (N, S, 8)), build), N=2, S=3)
    assert kinds(graph) == ["MatMul", "Softmax", "MatMul"]


def test_softmax_over_another_axis_is_no_attention() -> None:
    def build(b: Builder, q: Value, k: Value, v: Value) -> Value:
        weights = b.emit(ops.Softmax(1), b.emit(ops.MatMul(transpose_b=True), q, k))
        return b.emit(ops.MatMul(), weights, v)

    assert "Attention" not in kinds(optimized(graph_of(dict.fromkeys("qkv", (2, 3, 8)), build)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, BOOL, FLOAT32], ids=str)
@pytest.mark.parametrize("zero_nan", [False, True])
def test_attention_expands_to_what_it_means(causal: bool, mask: DType | None, zero_nan: bool) -> None:
    op = ops.Attention(0.3, causal, -1.5, zero_nan)
    shapes: dict[str, Any] = {"q": (N, 2, S, 4), "k": (N, 1, 6, 4), "v": (6, 3)}
    shapes |= {"mask": (mask, (N, 1, S, 6))} if mask is not None else {}
    graph = graph_of(shapes, lambda b, *values: b.emit(op, *values))
    expanded = verify(expand(graph, lambda found: isinstance(found, ops.Attention)), "expand")
    assert "Attention" not in kinds(expanded)
    for rows in (1, 7):
        assert_same(graph, expanded, random_inputs(graph, N=2, S=rows))


def test_attention_over_no_keys_and_no_rows() -> None:
    graph = graph_of({"q": (2, S, 4), "k": (2, N, 4), "v": (2, N, 3)}, lambda b, *v: b.emit(ops.Attention(1.0), *v))
    assert not run_graph(graph, random_inputs(graph, N=0, S=3))["y"].any()
    assert run_graph(graph, random_inputs(graph, N=3, S=0))["y"].shape == (2, 0, 3)


def test_long_attention_is_computed_in_blocks_of_queries() -> None:
    op = ops.Attention(0.5, causal=True)
    graph = graph_of({"q": (1, S, 4), "k": (1, 700, 4), "v": (1, 700, 2)}, lambda b, *values: b.emit(op, *values))
    assert BLOCK_NBYTES < 700 * 700 * 4
    expanded = expand(graph, lambda found: isinstance(found, ops.Attention))
    assert_same(graph, expanded, random_inputs(graph, S=700))

"""Scales behind a product go into its constant weights: BatchNormalization, and any other affine map per channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT64, is_float
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, Value
from gpu_engine.ir.ops import Conv, ConvTranspose, Map, MatMul
from gpu_engine.passes.counting import Uses, only_user, rewrite_counting
from gpu_engine.passes.epilogues import Product
from gpu_engine.passes.operands import Operands, inlined, operand_shape

Line = tuple[Any, Any]
"""(a, b) of a * x + b, both float64 arrays that broadcast to the product."""
WEIGHT_LIMIT_NBYTES = 256 << 20


def fold_scales(graph: Graph) -> Graph:
    """The graph where `a * product + b` with constant a and b per output channel is a product of scaled weights, + b.

    The weights are scaled in float64 and rounded once.
    """
    return rewrite_counting(graph, _folded)


def _folded(node: Node, builder: Builder, uses: Uses) -> tuple[Value] | None:
    if not isinstance(node.op, Map) or not is_float(node.op.expr.dtype):
        return None
    for value in node.inputs:
        made = builder.producer(value)
        if made is None or value.shape != node.outputs[0].shape or not only_user(value, node, uses):
            continue
        operands = (node.op.expr, node.inputs)
        if isinstance(made.op, Map):
            operands = inlined(*operands, {value: (made.op.expr, made.inputs)})
            found = [(operand, builder.producer(operand)) for operand in made.inputs if uses.get(operand) == 1]
            value, made = next(((v, p) for v, p in found if p and isinstance(p.op, Product)), (value, made))
        if not isinstance(made.op, Product) or uses.get(made.inputs[1], 1) > 1:
            continue
        if (result := _scaled(operands, value, made, builder)) is not None:
            return (result,)
    return None


def _scaled(operands: Operands, value: Value, made: Node, builder: Builder) -> Value | None:
    """The map `operands` of `value`, which is the product `made`, with its scale in the weights."""
    assert isinstance(made.op, Product)
    weights = made.inputs[1].constant
    foldable = weights is not None and weights.nbytes <= WEIGHT_LIMIT_NBYTES and is_float(value.dtype)
    if (
        weights is None
        or not foldable
        or getattr(made.op, "accumulate", None)
        or operand_shape(operands[1]) != value.shape
    ):
        return None
    plain = dataclasses.replace(made.op, epilogue=None)
    product = Value(plain.infer(*(operand.type for operand in made.inputs[:2]))[0])
    inner = made.op.epilogue or expr.arg(0, product.dtype)
    root, inputs = inlined(*operands, {value: (inner, (product, *made.inputs[2:]))})
    line = affine(root, inputs, product)
    if line is None:
        return None
    channel = product.rank - 1 if isinstance(made.op, MatMul) else 1
    scale, bias = _per_channel(line[0], product, channel), line[1]
    if scale is None or (scale == 1).all():
        return None
    with np.errstate(all="ignore"):
        scaled = scaled_weights(plain, weights.astype(FLOAT64), scale).astype(weights.dtype)
        offset = np.asarray(bias).astype(value.dtype)
    if not (np.isfinite(scaled).all() and np.isfinite(offset).all()) or offset.ndim > product.rank:
        return None
    result = builder.emit(plain, made.inputs[0], builder.constant(scaled))
    if not offset.any():
        return result
    shifted = expr.arg(0, value.dtype) + expr.arg(1, value.dtype)
    return builder.emit(Map(shifted), result, builder.constant(offset))


def _per_channel(scale: Any, product: Value, channel: int) -> Any:
    """The scale as one value per channel, or as one for all; None if it varies along another axis."""
    scale = np.asarray(scale)
    full = (1,) * (product.rank - scale.ndim) + scale.shape
    if len(full) > product.rank or any(extent != 1 for axis, extent in enumerate(full) if axis != channel):
        return None
    return scale.reshape(-1)


def scaled_weights(op: Product, weights: Any, scale: Any) -> Any:
    """Weights that make `op` produce `scale` (one per output channel, or one for all) times as much."""
    match op:
        case MatMul():
            return weights * (scale[:, None] if op.transpose_b and scale.size > 1 else scale)
        case Conv():
            return weights * scale.reshape(-1, *(1,) * (weights.ndim - 1))
        case ConvTranspose():
            grouped = weights.reshape(op.group, -1, *weights.shape[1:])
            by_group = scale.reshape(op.group if scale.size > 1 else 1, 1, -1, *(1,) * (weights.ndim - 2))
            return (grouped * by_group).reshape(weights.shape)


def affine(root: Expr, inputs: tuple[Value, ...], x: Value) -> Line | None:
    """(a, b) if `root` is a * x + b with constants a and b, computed in float64; None if it is not."""
    lines: dict[Expr, Line] = {}
    with np.errstate(all="ignore"):
        for node in expr.walk(root):
            if not is_float(node.dtype):
                return None
            line = _argument(inputs[node.value], x) if node.op == "arg" else _line(node, lines)
            if line is None:
                return None
            lines[node] = line
    return None if is_constant(lines[root][0]) else lines[root]


def _argument(value: Value, x: Value) -> Line | None:
    if value is x:
        return 1.0, 0.0
    return None if value.constant is None else (0.0, value.constant.astype(FLOAT64))


def _line(node: Expr, lines: Mapping[Expr, Line]) -> Line | None:
    parts = [lines[child] for child in node.args]
    if node.op == "const":
        return 0.0, float(node.value)
    if all(is_constant(a) for a, _ in parts):
        function = expr.NUMPY.get(node.op)
        return None if function is None else (0.0, function(*(np.asarray(b) for _, b in parts)))
    match node.op, parts:
        case "neg", [(a, b)]:
            return -a, -b
        case "add", [(a, b), (c, d)]:
            return a + c, b + d
        case "sub", [(a, b), (c, d)]:
            return a - c, b - d
        case "mul", [(a, b), (c, d)] if is_constant(c):
            return a * d, b * d
        case "mul", [(a, b), (c, d)] if is_constant(a):
            return c * b, d * b
        case "div", [(a, b), (c, d)] if is_constant(c):
            return a / d, b / d
    return None


def is_constant(a: Any) -> bool:
    return isinstance(a, float) and a == 0

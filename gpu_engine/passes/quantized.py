"""Products of dequantised tensors as products of integers: what QuantizeLinear and DequantizeLinear describe (QDQ).

A factor is a scale times integers that are centred, their zero point subtracted, so that padding with zeros means what
it says. The product of the integers is exact in int32 where no sum can leave it; the scales multiply the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8, limits
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Conv, Dequantize, Map, MatMul, Pool, Reshape, Transpose

SUM_LIMIT = 2**31


@dataclass(frozen=True)
class Grid:
    """A float32 tensor as scale * integers, which lie within `span`; the scale is a constant."""

    integers: Value
    scale: Any
    span: tuple[int, int]

    @property
    def greatest(self) -> int:
        """The magnitude of the integers."""
        return max(map(abs, self.span))


def multiply_integers(graph: Graph) -> Graph:
    """The graph whose convolutions and matrix products of two dequantised factors multiply int16 into int32; what moves
    dequantised elements, or takes the greatest of some, does so before they are dequantised."""
    takers = [node for node in graph.nodes if isinstance(node.op, Conv | MatMul) or _keeps_grid(node)]
    factors = {value for node in takers for value in node.inputs[:2]}
    rule = _Rule(frozenset(factors))
    return rewrite(rewrite(graph, rule.rewritten), rule.restored)


@dataclass(frozen=True)
class _Rule:
    """What becomes of one node; `grids` are the dequantised values so far."""

    factors: frozenset[Value]
    grids: dict[Value, Grid] = field(default_factory=dict)
    weights: dict[Value, tuple[Dequantize, tuple[Value, ...]]] = field(default_factory=dict)

    def restored(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        """Weights that no integer product took, as they were; other maps of constants are folded."""
        if not isinstance(node.op, Map) or any(value.constant is None for value in node.inputs):
            return None
        op, inputs = self.weights.get(node.outputs[0], (node.op, node.inputs))
        return builder.emit_all(op, *inputs)

    def rewritten(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        match node.op:
            case Map():
                return self._dequantized(node, builder)
            case Dequantize():
                return self._weights(node, node.op, builder)
            case Conv() | MatMul():
                return self._multiplied(node, builder)
        return self._moved(node, builder) if _keeps_grid(node) else None

    def _dequantized(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        """A map that centres and scales, parted in two where a product wants the integers between."""
        found = _parted(node)
        if found is None:
            return None
        centred, scaled = found
        x = node.inputs[0]
        if (same := self._requantized(node, centred, scaled, builder)) is not None:
            return (same,)
        if x.constant is None and (node.outputs[0] not in self.factors or len(node.inputs) > 1):
            return None
        integers = builder.emit(Map(centred), *_operands(centred, node.inputs))
        if integers.rank != node.outputs[0].rank:
            return None
        op, inputs = Map(scaled), (integers, *node.inputs[1:])
        (kind,) = op.infer(*(value.type for value in inputs))
        (result,) = builder.append(op, inputs, (Value(kind),))
        scale = _scale(scaled, node.inputs)
        if scale is not None:
            self.grids[result] = Grid(integers, scale, _span(integers, centred))
        return (result,)

    def _weights(self, node: Node, op: Dequantize, builder: Builder) -> Sequence[Value] | None:
        """Weights of bytes as such a map of constants, which knows what it was."""
        if op.block or node.inputs[0].dtype not in (INT8, UINT8):
            return None
        plain = Map(op.expr([value.dtype for value in node.inputs]))
        found = self._dequantized(Node(plain, node.inputs, node.outputs, node.source), builder)
        if found is not None:
            self.weights[found[0]] = (op, node.inputs)
        return found

    def _requantized(self, node: Node, centred: Expr, scaled: Expr, builder: Builder) -> Value | None:
        """The value that was quantised and is dequantised here, if it was on the same grid before."""
        made = builder.producer(node.inputs[0])
        grid = self.grids.get(made.inputs[0]) if made is not None and len(made.inputs) == 1 else None
        if made is None or grid is None or not isinstance(made.op, Map) or len(node.inputs) > 1:
            return None
        scale, span = _scale(scaled, node.inputs), _span(node.inputs[0], centred)
        if scale is None or grid.scale.size != 1 or scale != grid.scale or span != grid.span:
            return None
        levels = np.arange(span[0], span[1] + 1).astype(np.int16)
        found = expr.evaluate(centred, [expr.evaluate(made.op.expr, [expr.evaluate(scaled, [levels])])])
        return made.inputs[0] if np.array_equal(found, levels) else None

    def _moved(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        """The operation on integers, which are then dequantised."""
        grid = self.grids.get(node.inputs[0])
        if grid is None or grid.scale.size != 1 or not grid.scale > 0:
            return None
        integers = builder.emit(node.op, grid.integers)
        scaled = cast(expr.arg(0, INT16), FLOAT32) * expr.const(grid.scale.ravel()[0], FLOAT32)
        result = builder.emit(Map(scaled), integers)
        self.grids[result] = Grid(integers, grid.scale, grid.span)
        kept = self.weights.get(node.inputs[0])
        if kept is not None and all(value.constant.size == 1 for value in kept[1][1:]):  # type: ignore[union-attr]
            self.weights[result] = (kept[0], (builder.emit(node.op, kept[1][0]), *kept[1][1:]))
        return (result,)

    def _multiplied(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        op = node.op
        assert isinstance(op, Conv | MatMul)
        grids = [self.grids.get(value) for value in node.inputs[:2]]
        a, b = grids
        if a is None or b is None or op.epilogue is not None or op.accumulate is not None or a.scale.size != 1:
            return None
        scale = _output_scale(op, b)
        if scale is None or not _bounded(op, a, b):
            return None
        product = builder.emit(replace(op, accumulate=INT32), a.integers, b.integers)
        factor = (a.scale.astype(np.float64) * scale).astype(np.float32)
        total = cast(expr.arg(0, INT32), FLOAT32)
        if factor.size == 1:
            return (builder.emit(Map(total * expr.const(factor.ravel()[0], FLOAT32)), product),)
        return (builder.emit(Map(total * expr.arg(1, FLOAT32)), product, builder.constant(factor)),)


def _parted(node: Node) -> tuple[Expr, Expr] | None:
    """(bytes to centred int16, those to float32) if the map is DequantizeLinear's."""
    assert isinstance(node.op, Map)
    root, x = node.op.expr, node.inputs[0]
    if root.op != "mul" or root.dtype != FLOAT32 or x.dtype not in (INT8, UINT8):
        return None
    whole, factor = root.args
    if whole.op != "cast" or factor.op not in ("arg", "const"):
        return None
    (inner,) = whole.args
    if not _is_centred(inner):
        return None
    others = tuple(node.inputs[1:])
    if any(value.constant is None for value in others):
        return None
    return cast(inner, INT16), cast(expr.arg(0, INT16), FLOAT32) * factor


def _is_centred(inner: Expr) -> bool:
    """Whether this is the byte of operand 0, less another byte perhaps."""
    parts = inner.args if inner.op == "sub" and inner.dtype == INT32 else (inner,)
    first, *rest = (_uncast(part) for part in parts)
    return first.op == "arg" and first.value == 0 and all(
        (part.op == "const" and abs(int(part.value)) <= 255) or (part.op == "arg" and part.dtype in (INT8, UINT8))
        for part in rest
    )  # fmt: skip


def _uncast(part: Expr) -> Expr:
    return part.args[0] if part.op == "cast" else part


def _operands(root: Expr, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """As many of the operands as the expression reaches for."""
    return inputs[: expr.arg_count(root)]


def _scale(scaled: Expr, inputs: tuple[Value, ...]) -> Any:
    factor = scaled.args[1]
    return np.asarray(factor.value) if factor.op == "const" else inputs[factor.value].constant


def _keeps_grid(node: Node) -> bool:
    """Whether every element of the result is one of the operand, the same of integers on a grid of positive scale."""
    return isinstance(node.op, Transpose | Reshape) or (isinstance(node.op, Pool) and node.op.kind == "max")


def _span(integers: Value, centred: Expr) -> tuple[int, int]:
    """The least and the greatest of what is held, or of what any bytes give."""
    held = integers.constant
    if held is None:
        (x,) = (node for node in expr.walk(centred) if node.op == "arg")
        held = expr.evaluate(centred, [np.array(limits(x.dtype), x.dtype)])
    return int(held.min(initial=0)), int(held.max(initial=0))


def _output_scale(op: Conv | MatMul, b: Grid) -> Any:
    """The scale of the second factor as it lies beside the product; None if it varies along what is summed over."""
    scale = b.scale.astype(np.float64)
    if scale.size == 1:
        return scale.reshape(())
    rank = b.integers.rank
    full = scale.reshape((1,) * (rank - scale.ndim) + scale.shape)
    axis = 0 if isinstance(op, Conv) else rank - 2 if op.transpose_b else rank - 1
    if scale.ndim > rank or full.shape[axis] != full.size:
        return None
    return full.reshape(-1, *(1,) * (rank - 2)) if isinstance(op, Conv) else full.reshape(-1)


def _bounded(op: Conv | MatMul, a: Grid, b: Grid) -> bool:
    """Whether every sum of products fits int32, and the form is one that has kernels."""
    held = b.integers.constant
    if isinstance(op, Conv):
        depthwise = held is not None and op.group == held.shape[0] and held.shape[1] == 1
        if held is None or not (op.group == 1 or depthwise):
            return False
        depth = held[0].size if held.size else 0
    else:
        extent = a.integers.shape[-2 if op.transpose_a else -1]
        if not isinstance(extent, int):
            return False
        depth = extent
    return depth * a.greatest * b.greatest < SUM_LIMIT

"""Products of float8 numbers, as graphs with QuantizeLinear and DequantizeLinear around them mean (QDQ).

A factor is float8 numbers times a scale. The product multiplies the numbers as they are and sums in float32; scales
multiply the sums. What is dequantised for such products alone is never written but as bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_engine.gpu.float8 import FLOAT8
from gpu_engine.gpu.printing import is_printable
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Conv, Dequantize, Map, MatMul

FIELDS: Mapping[type, str] = {Map: "expr", MatMul: "epilogue", Conv: "epilogue"}
"""Where an operation keeps what it does to each element last."""


@dataclass(frozen=True)
class Tail:
    """The end of an expression: `narrow` is float8, and `scale` times it, in `dtype`, the whole."""

    narrow: Expr
    scale: float
    dtype: DType


@dataclass(frozen=True)
class Factor:
    """float8 numbers and what they are times: one number, or one for each output of the product."""

    numbers: Value
    scale: Any


def join_float8(graph: Graph) -> Graph:
    """The graph whose products of two dequantised float8 factors multiply float8."""
    makers = {value: node for node in graph.nodes for value in node.outputs}
    wanted: dict[Value, Tail] = {}
    for node in graph.nodes:
        if _multiplies_floats(node):
            tails = [_tail_of(makers.get(value)) for value in node.inputs[:2]]
            if tails[0] is not None and (
                tails[1] is not None or _weights(node, makers.get(node.inputs[1])) is not None
            ):
                wanted |= {value: tail for value, tail in zip(node.inputs, tails, strict=False) if tail is not None}
    return rewrite(graph, _Rule(wanted).rewritten) if wanted else graph


def _multiplies_floats(node: Node) -> bool:
    op = node.op
    return isinstance(op, MatMul | Conv) and op.accumulate is None and getattr(op, "group", 1) == 1


def _tail_of(made: Node | None) -> Tail | None:
    """How a node's result ends in float8 numbers times one scale."""
    name = None if made is None else FIELDS.get(type(made.op))
    root = None if name is None or made is None else getattr(made.op, name)
    if root is None or root.dtype not in (FLOAT32, FLOAT16, BFLOAT16):
        return None
    inner, scale = root, 1.0
    if inner.op == "cast" and inner.args[0].dtype == FLOAT32:
        inner = inner.args[0]
    if inner.op == "mul" and inner.args[1].op == "const":
        inner, scale = inner.args[0], float(inner.args[1].value)
    narrow = inner.args[0] if inner.op == "cast" else inner
    if narrow.dtype not in FLOAT8 or narrow.op != "cast" or not is_printable(narrow):
        return None
    return Tail(narrow, scale, root.dtype)


def _weights(node: Node, made: Node | None) -> Factor | None:
    """The second factor where it is constant float8 numbers with a scale for all, or for each output."""
    if made is None or not isinstance(made.op, Dequantize) or made.op.block or made.inputs[0].dtype not in FLOAT8:
        return None
    codes, scale, *zeros = made.inputs
    if scale.constant is None or any(value.constant is None or value.constant.any() for value in zeros):
        return None
    array = scale.constant.astype(np.float64)
    if array.size == 1:
        return Factor(codes, array.reshape(()))
    op, full = node.op, array.reshape((1,) * (codes.rank - array.ndim) + array.shape)
    axis = 0 if isinstance(op, Conv) else codes.rank - (2 if getattr(op, "transpose_b", False) else 1)
    if full.shape[axis] != full.size:
        return None
    return Factor(codes, full.reshape(-1, *(1,) * (codes.rank - 2)) if isinstance(op, Conv) else full.reshape(-1))


@dataclass(frozen=True)
class _Rule:
    """What becomes of one node; `factors` are the values that float8 numbers stand for so far."""

    wanted: Mapping[Value, Tail]
    factors: dict[Value, Factor] = field(default_factory=dict)

    def rewritten(self, node: Node, builder: Builder) -> Sequence[Value] | None:
        multiplied = self._multiplied(node, builder) if _multiplies_floats(node) else None
        if multiplied is not None:
            node = Node(multiplied[0], multiplied[1], node.outputs, node.source)
        tail = self.wanted.get(node.outputs[0])
        if tail is None:
            return None if multiplied is None else builder.emit_all(node.op, *node.inputs)
        return (self._narrowed(node, builder),)

    def _narrowed(self, node: Node, builder: Builder) -> Value:
        """The node's result as float8, and the map that dequantises it for whom that is not enough."""
        tail = _tail_of(node)
        assert tail is not None
        op = dataclasses.replace(node.op, **{FIELDS[type(node.op)]: tail.narrow})  # type: ignore[type-var]
        numbers = builder.emit(op, *node.inputs)
        scaled = cast(expr.arg(0, numbers.dtype), FLOAT32) * expr.const(tail.scale, FLOAT32)
        result = builder.emit(Map(cast(scaled, tail.dtype)), numbers)
        self.factors[result] = Factor(numbers, np.float64(tail.scale))
        return result

    def _multiplied(self, node: Node, builder: Builder) -> tuple[MatMul | Conv, tuple[Value, ...]] | None:
        """(the product of float8 numbers, its operands)."""
        op, (a, b, *extras) = node.op, node.inputs
        assert isinstance(op, MatMul | Conv)
        left, right = self.factors.get(a), self.factors.get(b) or _weights(node, builder.producer(b))
        if left is None or right is None:
            return None
        scale = (left.scale * right.scale).astype(np.float32)
        sums = expr.arg(0, FLOAT32)
        if scale.size == 1:
            total = sums * expr.const(scale.ravel()[0], FLOAT32)
        else:
            total = sums * expr.arg(2 + len(extras) - 1, FLOAT32)
            extras.append(builder.constant(scale))
        root = op.epilogue or expr.arg(0, a.dtype)
        places = {i: expr.arg(i, value.dtype) for i, value in enumerate(extras, 1)}
        epilogue = expr.substitute(root, {**places, 0: cast(total, a.dtype)})
        product = dataclasses.replace(op, accumulate=FLOAT32, epilogue=epilogue)
        return product, (left.numbers, right.numbers, *extras)

"""Narrow floats in wide memory: what float16 and bfloat16 operations make stays float32 until something stores it.

Native kernels compute such numbers in float32 anyway. Converting every operand of a product first, and rounding what it
makes, would cost more than the memory that it saves; and the fastest kernels are those of float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.folding import hidden_nbytes
from gpu_engine.ir.graph import Builder, Graph, Node, Op, Value, rewrite
from gpu_engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    ConvTranspose,
    Expand,
    LayerNorm,
    Map,
    MatMul,
    Pool,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.ops.pointwise import identity_cast

NARROW = (FLOAT16, BFLOAT16)
HEAVY = (Attention, Conv, ConvTranspose, MatMul)
"""One of these makes a graph worth changing."""
COMPUTING = (*HEAVY, LayerNorm, Pool, Reduce, Resize, Softmax)
MOVING = (Concat, Expand, Reshape, Slice, Transpose)


def widen_floats(graph: Graph) -> Graph:
    """The graph with float32 between its operations on narrower floats; inputs and outputs keep their types."""
    if not any(isinstance(node.op, HEAVY) and _is_narrow(node.inputs[0]) for node in graph.nodes):
        return graph
    known: dict[Value, Value] = {}
    return rewrite(graph, lambda node, builder: _Rule(builder, known).rewritten(node))


def retyped(root: Expr, narrow: frozenset[int]) -> Expr:
    """The expression in float32 instead of narrower floats, over operands that are float32 but for those of `narrow`.

    Casts to narrower floats still round.
    """
    built: dict[Expr, Expr] = {}
    for node in expr.walk(root):
        small = node.dtype in NARROW
        if node.op == "arg":
            own = node if not small or node.value in narrow else expr.arg(node.value, FLOAT32)
            built[node] = expr.cast(own, FLOAT32) if small else own
        elif node.op == "const":
            built[node] = expr.const(node.value, FLOAT32) if small else node
        elif node.op == "cast":
            rounded = expr.cast(built[node.args[0]], node.dtype, saturate=node.value)
            built[node] = expr.cast(rounded, FLOAT32) if small else rounded
        else:
            built[node] = expr.apply(node.op, *(built[child] for child in node.args))
    return built[root]


@dataclass(frozen=True)
class _Rule:
    """What becomes of one node; `known` are values widened before."""

    builder: Builder
    known: dict[Value, Value]

    def rewritten(self, node: Node) -> tuple[Value] | None:
        if len(node.outputs) != 1 or not any(map(_is_narrow, (*node.inputs, *node.outputs))):
            return None
        match node.op:
            case Map(expr=root):
                return self._mapped(node, root)
            case op if isinstance(op, COMPUTING):
                result = self.builder.emit(_widened(op), *map(self._wide, node.inputs))
            case op if isinstance(op, MOVING) and all(map(self._has_wide, node.inputs)):
                result = self.builder.emit(op, *map(self._wide, node.inputs))
            case _:
                return None
        return (self._narrowed(result, node.outputs[0]),)

    def _mapped(self, node: Node, root: Expr) -> tuple[Value]:
        """Operands that are narrow in memory are converted as they are read."""
        narrow = frozenset(i for i, value in enumerate(node.inputs) if _is_narrow(value) and not self._has_wide(value))
        inputs = [value if i in narrow else self._wide(value) for i, value in enumerate(node.inputs)]
        return (self._narrowed(self.builder.emit(Map(retyped(root, narrow)), *inputs), node.outputs[0]),)

    def _narrowed(self, result: Value, old: Value) -> Value:
        """`result` as what stands for `old`."""
        return self.builder.emit(identity_cast(FLOAT32, old.dtype), result) if _is_narrow(old) else result

    def _has_wide(self, value: Value) -> bool:
        return not _is_narrow(value) or value.known is not None or self._source(value) is not None

    def _source(self, value: Value) -> Value | None:
        """What `value` was made from by rounding alone."""
        node = self.builder.producer(value)
        narrows = node is not None and node.op == identity_cast(FLOAT32, value.dtype)
        return node.inputs[0] if node is not None and narrows else None

    def _wide(self, value: Value) -> Value:
        if not _is_narrow(value):
            return value
        if value not in self.known:
            self.known[value] = self._source(value) or self._converted(value)
        return self.known[value]

    def _converted(self, value: Value) -> Value:
        """Weights at once, whatever they take: packed ones stand for them soon."""
        if value.constant is None or hidden_nbytes(value.constant):
            return self.builder.emit(identity_cast(value.dtype, FLOAT32), value)
        return self.builder.constant(value.constant.astype(FLOAT32), value.name)


def _is_narrow(value: Value) -> bool:
    return value.dtype in NARROW


def _widened(op: Op) -> Op:
    """The operation with expressions over float32."""
    fields: dict[str, Any] = {
        name: retyped(root, frozenset())
        for name in ("epilogue", "before", "after")
        if isinstance(root := getattr(op, name, None), Expr)
    }
    if getattr(op, "accumulate", None) in NARROW:
        fields["accumulate"] = FLOAT32
    return dataclasses.replace(op, **fields) if fields else op  # type: ignore[type-var]

"""Casts inside an expression: a detour through a wider type is no detour."""

from __future__ import annotations

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
)
from gpu_engine.ir.expr import Expr

EXACT: dict[DType, frozenset[DType]] = {
    BOOL: frozenset({UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64}),
    UINT8: frozenset({UINT16, INT16, UINT32, INT32, UINT64, INT64, FLOAT16, FLOAT32, FLOAT64}),
    INT8: frozenset({INT16, INT32, INT64, FLOAT16, FLOAT32, FLOAT64}),
    UINT16: frozenset({UINT32, INT32, UINT64, INT64, FLOAT32, FLOAT64}),
    INT16: frozenset({INT32, INT64, FLOAT32, FLOAT64}),
    UINT32: frozenset({UINT64, INT64, FLOAT64}),
    INT32: frozenset({INT64, FLOAT64}),
    FLOAT16: frozenset({FLOAT32, FLOAT64}),
    BFLOAT16: frozenset({FLOAT32, FLOAT64}),
    FLOAT32: frozenset({FLOAT64}),
}
"""The types that hold every value of a type."""


def without_needless_casts(root: Expr) -> Expr:
    """`root` where the cast of an exact cast is one cast from the original, bit for bit the same."""
    built: dict[Expr, Expr] = {}
    for node in expr.walk(root):
        args = tuple(built[child] for child in node.args)
        if node.op == "cast":
            (inner,) = args
            if inner.op == "cast" and inner.dtype in EXACT.get(inner.args[0].dtype, ()) and not node.value:
                inner = inner.args[0]
            built[node] = expr.cast(inner, node.dtype, saturate=node.value)
        elif args == node.args:
            built[node] = node
        else:
            built[node] = expr.apply(node.op, *args)
    return built[root]

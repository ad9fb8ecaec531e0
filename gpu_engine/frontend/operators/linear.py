"""Matrix products, contractions and determinants."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_array, emit_map, operator
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import MatMul, Reshape


@operator("MatMul", since=1)
def matmul(b: Builder, a: Value, c: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__MatMul.html"""
    if a.rank == 0 or c.rank == 0:
        raise InvalidModel(f"a matrix product of {a.type} and {c.type}")
    left = a if a.rank > 1 else b.emit(Reshape((1, *a.shape)), a)
    right = c if c.rank > 1 else b.emit(Reshape((*c.shape, 1)), c)
    result = b.emit(MatMul(), left, right)
    if a.rank > 1 and c.rank > 1:
        return result
    kept = result.shape[:-2] + result.shape[-2:-1] * (a.rank > 1) + result.shape[-1:] * (c.rank > 1)
    return b.emit(Reshape(kept), result)


@operator("Gemm", since=7)
def gemm(
    b: Builder,
    a: Value,
    c: Value,
    bias: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Gemm.html"""
    if a.rank != 2 or c.rank != 2:
        raise InvalidModel(f"Gemm of {a.type} and {c.type}, which are no matrices")
    result = b.emit(MatMul(bool(transA), bool(transB)), a, c)
    if bias is None or beta == 0:
        return result if alpha == 1 else emit_map(b, lambda x: _scaled(x, alpha), result)
    if bias.rank > 2:
        raise InvalidModel(f"Gemm adds {bias.type} to {result.type}")
    return emit_map(b, lambda x, y: _scaled(x, alpha) + _scaled(y, beta), result, bias)


def _scaled(x: Expr, factor: float) -> Expr:
    if factor == 1:
        return x
    return x * factor if x.dtype.kind not in "iu" else cast(cast(x, np.dtype(np.float64)) * factor, x.dtype)


@operator("Det", since=11)
def det(b: Builder, x: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Det.html"""
    if x.rank < 2:
        raise InvalidModel(f"a determinant of {x.type}")
    kind = TensorType(x.dtype, x.shape[:-2])
    return emit_array(b, determinant, lambda b, x: kind, (x,), {}, mixes=(x.rank - 2, x.rank - 1))[0]


def determinant(xp: Any, x: Any) -> Any:
    return xp.linalg.det(x.astype(compute_dtype(x.dtype), copy=False))

"""Matrix products and convolutions with what follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.convolution import conv, conv_transpose
from gpu_engine.frontend.operators.linear import gemm, matmul
from gpu_engine.frontend.operators.microsoft.activation import activation_of
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.operands import known_ints
from gpu_engine.frontend.registry import emit_array, emit_map, operator
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import MatMul, Reduce, Reshape, Transpose


def from_nhwc(b: Builder, x: Value) -> Value:
    """x [N, spatial..., C] as [N, C, spatial...]."""
    return b.emit(Transpose((0, x.rank - 1, *range(1, x.rank - 1))), x)


def to_nhwc(b: Builder, x: Value) -> Value:
    """x [N, C, spatial...] as [N, spatial..., C]."""
    return b.emit(Transpose((0, *range(2, x.rank), 1)), x)


@operator("FusedConv", since=1, domain=MICROSOFT)
def fused_conv(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    z: Value | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedConv

    activation(Conv(x, w, bias) + z)
    """
    y = conv(b, x, w, bias, kernel_shape=kernel_shape, strides=strides, dilations=dilations, pads=pads,
             auto_pad=auto_pad, group=group)  # fmt: skip
    y = y if z is None else emit_map(b, lambda e, s: e + s, y, z)
    parameters = dict(zip(("alpha", "beta"), activation_params, strict=False))
    return _activated(b, y, activation_of(activation, parameters), bool(activation))


def _activated(b: Builder, y: Value, function: Callable[[Expr], Expr], wanted: bool) -> Value:
    return emit_map(b, function, y) if wanted else y


@operator("NhwcFusedConv", since=1, domain=MICROSOFT)
def nhwc_fused_conv(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    z: Value | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.NhwcFusedConv

    x, z and the result have the channels last; w has ONNX's layout.
    """
    y = fused_conv(
        b,
        from_nhwc(b, x),
        w,
        bias,
        None if z is None else from_nhwc(b, z),
        activation=activation,
        activation_params=activation_params,
        kernel_shape=kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )
    return to_nhwc(b, y)


@operator("NhwcConv", since=1, domain=MICROSOFT)
def nhwc_conv(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.NhwcConv"""
    y = conv(b, from_nhwc(b, x), w, bias, kernel_shape=kernel_shape, strides=strides, dilations=dilations,
             pads=pads, auto_pad=auto_pad, group=group)  # fmt: skip
    return to_nhwc(b, y)


@operator("ConvTransposeWithDynamicPads", since=1, domain=MICROSOFT)
def conv_transpose_with_dynamic_pads(
    b: Builder,
    x: Value,
    w: Value,
    pads: Value | None = None,
    bias: Value | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ConvTransposeWithDynamicPads

    The pads must be known when the model is compiled.
    """
    known = known_ints(pads)
    if pads is not None and known is None:
        raise InvalidModel("pads must be known when the model is compiled")
    return conv_transpose(b, x, w, bias, kernel_shape=kernel_shape, strides=strides, dilations=dilations,
                          pads=known or (), auto_pad=auto_pad, output_padding=output_padding, group=group)  # fmt: skip


@operator("FusedGemm", since=1, domain=MICROSOFT)
def fused_gemm(
    b: Builder,
    a: Value,
    c: Value,
    bias: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedGemm"""
    y = gemm(b, a, c, bias, alpha=alpha, beta=beta, transA=transA, transB=transB)
    parameters = {"alpha": activation_alpha, "beta": activation_beta, "gamma": activation_gamma}
    return _activated(b, y, activation_of(activation, parameters), bool(activation))


@operator("FusedMatMul", since=1, domain=MICROSOFT)
def fused_matmul(
    b: Builder,
    a: Value,
    c: Value,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedMatMul

    The transpositions of an operand of one axis are ignored.
    """
    left = _batch_transposed(b, a) if transBatchA else a
    right = _batch_transposed(b, c) if transBatchB else c
    swap_left, swap_right = bool(transA) and a.rank > 1, bool(transB) and c.rank > 1
    if min(left.rank, right.rank) > 1:
        product = b.emit(MatMul(swap_left, swap_right), left, right)
    else:
        swapped = (_swapped(b, left) if swap_left else left, _swapped(b, right) if swap_right else right)
        product = matmul(b, *swapped)
    return product if alpha == 1 else emit_map(b, lambda e: e * alpha, product)


def _batch_transposed(b: Builder, x: Value) -> Value:
    """The first axis moved to the place before the last."""
    return b.emit(Transpose((*range(1, x.rank - 1), 0, x.rank - 1)), x) if x.rank > 2 else x


def _swapped(b: Builder, x: Value) -> Value:
    return b.emit(Transpose((*range(x.rank - 2), x.rank - 1, x.rank - 2)), x)


@operator("TransposeMatMul", since=1, domain=MICROSOFT)
def transpose_matmul(b: Builder, a: Value, c: Value, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.TransposeMatMul"""
    return fused_matmul(b, a, c, alpha=alpha, transA=transA, transB=transB)


@operator("CDist", since=1, domain=MICROSOFT)
def cdist(b: Builder, x: Value, y: Value, *, metric: str = "sqeuclidean") -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.CDist

    The squares are taken of the differences, which keeps the digits of near pairs.
    """
    if metric not in ("euclidean", "sqeuclidean"):
        raise InvalidModel(f"the metric {metric} is not euclidean or sqeuclidean")
    if x.rank != 2 or y.rank != 2:
        raise InvalidModel(f"distances of {x.type} and {y.type}, which are no matrices")
    rows = b.emit(Reshape((x.shape[0], 1, x.shape[1])), x)
    distance = expr.arg(0, x.dtype) - expr.arg(1, y.dtype)
    total = expr.arg(0, x.dtype)
    after = expr.sqrt(total) if metric == "euclidean" else None
    return b.emit(Reduce("sum", (2,), False, distance * distance, after), rows, y)


@operator("Inverse", since=1, domain=MICROSOFT)
def inverse(b: Builder, x: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Inverse

    ValueError for a matrix that has none.
    """
    if x.rank < 2:
        raise InvalidModel(f"an inverse of {x.type}")
    return emit_array(b, inverted, lambda b, x: x.type, (x,), {}, mixes=(x.rank - 2, x.rank - 1))[0]


def inverted(xp: Any, x: Any) -> Any:
    try:
        return xp.linalg.inv(x.astype(compute_dtype(x.dtype), copy=False))
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the inverse of {list(x.shape)}: {error}") from error

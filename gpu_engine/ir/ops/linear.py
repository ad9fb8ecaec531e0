"""Operations that multiply and accumulate: matrix product and convolutions, with an epilogue on the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.pointwise import Map, broadcast_shapes


def _product_dtype(a: Any, b: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What to multiply in: sums of products of bytes are exact in float64, which has a fast matrix product."""
    bytes_only = dtype.kind in "iu" and a.dtype.kind in "iu" and a.dtype.itemsize == b.dtype.itemsize == 1
    return np.dtype(np.float64) if bytes_only and b.dtype.kind in "iu" else compute_dtype(dtype)


def _finished(epilogue: Expr | None, xp: Any, result: Any, extras: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    if result.dtype.kind == "f" and dtype.kind in "iu":
        result = result.astype(np.int64)
    if epilogue is None:
        return (result.astype(dtype, copy=False),)
    return Map(epilogue).evaluate(xp, result.astype(dtype, copy=False), *extras)


def _epilogue_type(epilogue: Expr | None, product: TensorType, extras: tuple[TensorType, ...]) -> TensorType:
    if epilogue is None:
        return product
    (result,) = Map(epilogue).infer(product, *extras)
    if result.rank != product.rank:
        raise InvalidModel(f"an epilogue operand has more axes than the result {product}")
    return TensorType(result.dtype, product.shape)


@dataclass(frozen=True)
class MatMul:
    """a [..., M, K] times b [..., K, N] with broadcast batch axes; both operands have at least two axes.

    `transpose_a` / `transpose_b` swap the last two axes of an operand first. `epilogue` maps the product (arg 0) and
    further operands (args 1.., broadcast to the product) to the result. Accumulates in at least float32 for floats;
    integers wrap in `accumulate` (int32 for MatMulInteger).
    """

    transpose_a: bool = False
    transpose_b: bool = False
    epilogue: Expr | None = None
    accumulate: np.dtype[Any] | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        a, b, *extras = inputs
        m, k = a.shape[-2:] if not self.transpose_a else a.shape[:-3:-1]
        inner, n = b.shape[-2:] if not self.transpose_b else b.shape[:-3:-1]
        if isinstance(k, int) and isinstance(inner, int) and k != inner:
            raise InvalidModel(f"the inner extents {k} and {inner} of {a} and {b} differ")
        if self.accumulate is None and a.dtype != b.dtype:
            raise InvalidModel(f"a product of {a} and {b}")
        batch = broadcast_shapes(a.shape[:-2], b.shape[:-2]) if a.rank > 2 or b.rank > 2 else ()
        product = TensorType(self.accumulate or a.dtype, (*batch, m, n))
        return (_epilogue_type(self.epilogue, product, tuple(extras)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        a, b, *extras = arrays
        dtype = self.accumulate or a.dtype
        a, b = (x.astype(_product_dtype(a, b, dtype), copy=False) for x in (a, b))
        a = a.swapaxes(-1, -2) if self.transpose_a else a
        b = b.swapaxes(-1, -2) if self.transpose_b else b
        with np.errstate(all="ignore"):
            return _finished(self.epilogue, xp, xp.matmul(a, b), tuple(extras), dtype)


@dataclass(frozen=True)
class Conv:
    """x [N, C, spatial...] with w [M, C/group, kernel...]; a cross-correlation, as ONNX's Conv.

    `before` / `after` pad each spatial axis with zeros (negative crops); strides and dilations per spatial axis.
    `epilogue` as in MatMul: a bias is an operand of shape [M, 1...] added there.
    """

    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    group: int = 1
    epilogue: Expr | None = None
    accumulate: np.dtype[Any] | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, w, *extras = inputs
        if x.rank != w.rank or x.rank != len(self.strides) + 2:
            raise InvalidModel(f"a convolution of {x} with {w} over {len(self.strides)} spatial axes")
        channels = w.shape[1] * self.group
        if isinstance(x.shape[1], int) and isinstance(channels, int) and x.shape[1] != channels:
            raise InvalidModel(f"{x} has {x.shape[1]} channels, {w} in {self.group} groups wants {channels}")
        spatial = tuple(
            window_count(extent, kernel, stride, before, after, dilation)
            for extent, kernel, stride, before, after, dilation in zip(
                x.shape[2:], w.shape[2:], self.strides, self.before, self.after, self.dilations, strict=True
            )
        )
        product = TensorType(self.accumulate or x.dtype, (x.shape[0], w.shape[0], *spatial))
        return (_epilogue_type(self.epilogue, product, tuple(extras)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, w, *extras = arrays
        dtype = self.accumulate or x.dtype
        x, w = (array.astype(_product_dtype(x, w, dtype), copy=False) for array in (x, w))
        windows = window_view(xp, x, w.shape[2:], self.strides, self.before, self.after, self.dilations, 0)
        rank, (n, _, *spatial) = len(self.strides), windows.shape[: 2 + len(self.strides)]
        windows = windows.reshape(n, self.group, x.shape[1] // self.group, *windows.shape[2:])
        order = (0, 1, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
        columns = windows.transpose(order).reshape(n, self.group, int(np.prod(spatial)), int(np.prod(w.shape[1:])))
        weights = w.reshape(self.group, w.shape[0] // self.group, int(np.prod(w.shape[1:])))
        with np.errstate(all="ignore"):
            product = xp.matmul(weights, columns.swapaxes(-1, -2))
        return _finished(self.epilogue, xp, product.reshape(n, w.shape[0], *spatial), tuple(extras), dtype)


def window_count(extent: Dim, kernel: Dim, stride: int, before: Dim, after: Dim, dilation: int) -> Dim:
    """How many windows of `kernel` elements, `dilation` apart, fit at `stride` into a padded axis."""
    covered = (kernel - 1) * dilation + 1
    count = dims.floor_div(extent + before + after - covered, stride) + 1
    if isinstance(count, int) and count < 0:
        return 0
    return count


def window_view(xp: Any, x: Any, kernel: Any, strides: Any, before: Any, after: Any, dilations: Any, fill: Any) -> Any:
    """[N, C, windows..., kernel...] of x [N, C, spatial...] padded with `fill`: a strided view."""
    pads = [
        (0, 0),
        (0, 0),
        *((max(0, dims.number(a)), max(0, dims.number(b))) for a, b in zip(before, after, strict=True)),
    ]
    crop = (slice(None), slice(None), *(
        slice(max(0, -dims.number(a)), extent - max(0, -dims.number(b)))
        for a, b, extent in zip(before, after, x.shape[2:], strict=True)))  # fmt: skip
    x = x[crop]
    if any(a or b for a, b in pads):
        x = xp.pad(x, pads, constant_values=fill)
    counts = [
        max(0, dims.number(window_count(extent, k, stride, 0, 0, dilation)))
        for extent, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    steps = x.strides[2:]
    return xp.lib.stride_tricks.as_strided(
        x,
        (*x.shape[:2], *counts, *kernel),
        (*x.strides[:2], *(a * b for a, b in zip(steps, strides, strict=True)),
         *(a * b for a, b in zip(steps, dilations, strict=True))),
    )  # fmt: skip


@dataclass(frozen=True)
class ConvTranspose:
    """The gradient of Conv as an operation: x [N, C, spatial...], w [C, M/group, kernel...].

    `before` / `after` are taken off the full output, `output_padding` adds at the end. `epilogue` as in MatMul.
    """

    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    output_padding: tuple[Dim, ...]
    group: int = 1
    epilogue: Expr | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, w, *extras = inputs
        if isinstance(x.shape[1], int) and isinstance(w.shape[0], int) and x.shape[1] != w.shape[0]:
            raise InvalidModel(f"{x} has {x.shape[1]} channels, {w} wants {w.shape[0]}")
        spatial = tuple(
            stride * (extent - 1) + extra + (kernel - 1) * dilation + 1 - before - after
            for extent, kernel, stride, before, after, dilation, extra in zip(
                x.shape[2:], w.shape[2:], self.strides, self.before, self.after, self.dilations, self.output_padding,
                strict=True,
            )
        )  # fmt: skip
        product = TensorType(x.dtype, (x.shape[0], w.shape[1] * self.group, *spatial))
        return (_epilogue_type(self.epilogue, product, tuple(extras)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, w, *extras = arrays
        dtype, wide = x.dtype, compute_dtype(x.dtype)
        n, channels, *spatial = x.shape
        kernel = w.shape[2:]
        left = w.astype(wide, copy=False).reshape(self.group, channels // self.group, -1)
        right = x.astype(wide, copy=False).reshape(n, self.group, channels // self.group, int(np.prod(spatial)))
        with np.errstate(all="ignore"):
            taps = xp.matmul(left.swapaxes(-1, -2), right)
        taps = taps.reshape(n, w.shape[1] * self.group, *kernel, *spatial)
        full = [
            stride * (extent - 1) + extra + (k - 1) * dilation + 1
            for extent, k, stride, dilation, extra in zip(
                spatial, kernel, self.strides, self.dilations, self.output_padding, strict=True
            )
        ]
        result = xp.zeros((*taps.shape[:2], *full), wide)
        for tap in np.ndindex(*kernel):
            place = tuple(
                slice(k * dilation, k * dilation + stride * (extent - 1) + 1, stride)
                for k, dilation, stride, extent in zip(tap, self.dilations, self.strides, spatial, strict=True)
            )
            result[(slice(None), slice(None), *place)] += taps[(slice(None), slice(None), *tap)]
        cut = tuple(
            slice(dims.number(a), extent - dims.number(b))
            for a, b, extent in zip(self.before, self.after, full, strict=True)
        )
        return _finished(self.epilogue, xp, result[(slice(None), slice(None), *cut)], tuple(extras), dtype)

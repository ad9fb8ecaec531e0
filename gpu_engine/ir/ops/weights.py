"""Weights of few bits: numbers that constants stand for, kept narrow until a device has read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import number
from gpu_engine.ir.dtypes import INT8, INT32, UINT8, DType, compute_dtype, is_integer, limits
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Node, TensorType, Value
from gpu_engine.ir.ops.movement import Expand, Reshape, Slice
from gpu_engine.ir.ops.pointwise import Map


def centred(code: Expr, zero: Expr | None, wide: DType) -> Expr:
    """code - zero in `wide`; integers are subtracted as int32."""
    if zero is None:
        return cast(code, wide)
    between = INT32 if is_integer(code.dtype) and is_integer(zero.dtype) else wide
    return cast(cast(code, between) - cast(zero, between), wide)


def dequantized(code: Expr, scale: Expr, zero: Expr | None, dtype: DType) -> Expr:
    """What a code stands for: (code - zero) * scale, computed in at least float32 and rounded to `dtype` once."""
    wide = compute_dtype(dtype)
    return cast(centred(code, zero, wide) * cast(scale, wide), dtype)


@dataclass(frozen=True)
class Dequantize:
    """(codes - zero points) * scales in `dtype`, of constants: codes, scales and perhaps zero points.

    Scales and zero points broadcast to the codes, or with `block` have their rank and along `axis` one element for
    every `block` codes. Never folded by itself: `expanded` does, for devices that want the numbers.
    """

    dtype: DType
    axis: int = 0
    block: int = 0
    folds = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        codes = inputs[0]
        if any(_spread_shape(self, kind.shape, codes.shape) is None for kind in inputs[1:]):
            raise InvalidModel(f"scales and zero points {', '.join(map(str, inputs[1:]))} for {codes}")
        return (TensorType(self.dtype, codes.shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        codes, *parts = arrays
        spread = [xp.broadcast_to(self._spread(xp, part, codes.shape), codes.shape) for part in parts]
        return (expr.evaluate(self.expr([array.dtype for array in arrays]), [codes, *spread], xp),)

    def expr(self, dtypes: Sequence[DType]) -> Expr:
        """One number of its code (arg 0), scale and zero point."""
        code, scale, *zeros = (expr.arg(i, dtype) for i, dtype in enumerate(dtypes))
        return dequantized(code, scale, zeros[0] if zeros else None, self.dtype)

    def _spread(self, xp: Any, part: Any, shape: Sequence[int]) -> Any:
        if not self.block:
            return part
        whole = xp.repeat(part, min(self.block, shape[self.axis]), self.axis)
        return whole[(slice(None),) * self.axis + (slice(shape[self.axis]),)]


def _spread_shape(op: Dequantize, own: tuple[Any, ...], codes: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The shape of scales once every code has its own; None if they do not fit."""
    if op.block:
        if len(own) != len(codes) or own[op.axis] != dims.ceil_div(codes[op.axis], op.block):
            return None
        own = (*own[: op.axis], codes[op.axis], *own[op.axis + 1 :])
    fits = len(own) <= len(codes) and all(
        extent in (1, full) for extent, full in zip(reversed(own), reversed(codes), strict=False)
    )
    return own if fits else None


def bits_of(dtype: DType) -> int:
    """Bits that a code takes: 2 or 4 of those that NumPy keeps in a byte each, else all of them."""
    if dtype.kind == "V" and is_integer(dtype):
        low, high = limits(dtype)
        return int(high - low).bit_length()
    return dtype.itemsize * 8


def expanded(node: Node, builder: Builder) -> tuple[Value]:
    """The numbers of a Dequantize node: a constant where it may be folded, else a map that computes them."""
    op = node.op
    assert isinstance(op, Dequantize)
    codes, *parts = node.inputs
    if bits_of(codes.dtype) < 8:
        assert codes.constant is not None
        codes = builder.constant(codes.constant.astype(UINT8 if limits(codes.dtype)[0] >= 0 else INT8))
    shape, extent = codes.shape, number(codes.shape[op.axis])
    if op.block and extent % op.block == 0:
        apart = [(*kind[: op.axis], each, rest, *kind[op.axis + 1 :]) for kind, each, rest in [
            (shape, extent // op.block, op.block), *((part.shape, extent // op.block, 1) for part in parts)
        ]]  # fmt: skip
        inputs = [builder.emit(Reshape(kind), value) for kind, value in zip(apart, (codes, *parts), strict=True)]
    else:
        inputs = [codes, *(_repeated(builder, part, op, extent) if op.block else part for part in parts)]
    numbers = builder.emit(Map(op.expr([value.dtype for value in inputs])), *inputs)
    return (numbers if numbers.shape == shape else builder.emit(Reshape(shape), numbers),)


def _repeated(builder: Builder, value: Value, op: Dequantize, extent: int) -> Value:
    """A scale or zero point of every block, for every code of it."""
    before, (blocks, *after) = value.shape[: op.axis], value.shape[op.axis :]
    apart = builder.emit(Reshape((*before, blocks, 1, *after)), value)
    block = min(op.block, extent)
    repeated = builder.emit(Expand((*before, blocks, block, *after)), apart)
    whole = builder.emit(Reshape((*before, blocks * block, *after)), repeated)
    kept = (*before, extent, *after)
    return builder.emit(Slice((0,) * len(kept), (1,) * len(kept), kept), whole)

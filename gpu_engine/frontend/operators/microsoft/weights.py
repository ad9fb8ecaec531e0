"""Weights of a few bits, in blocks with a scale each.

They become numbers when the model is compiled, where these fit, or else on every call.
"""

from __future__ import annotations

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.linear import matmul
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.movement import cut
from gpu_engine.frontend.operators.quantization import spread
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT64, UINT8, from_onnx, is_float
from gpu_engine.ir.expr import Expr, cast, where
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops.weights import dequantized

FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CODES = (np.array((*FP4, *(-value for value in FP4)), FLOAT32), np.array(NF4, FLOAT32))
"""What the 16 codes of bitsandbytes stand for (https://github.com/bitsandbytes-foundation/bitsandbytes): FP4, NF4."""
CODE_DTYPES = {2: from_onnx(25), 4: from_onnx(21), 8: UINT8}
"""The type of codes by their bits."""


def unpacked(b: Builder, packed: Value, bits: int, *, high_first: bool = False) -> Value:
    """The numbers of `bits` bits in the bytes of the last axis, as uint8, the lowest bits of a byte first."""
    if bits == 8:
        return packed
    places = np.arange(0, 8, bits, dtype=UINT8)
    shifts = b.constant(places[::-1].copy() if high_first else places)
    apart = b.emit(ops.Reshape((*packed.shape, 1)), packed)
    numbers = emit_map(b, lambda e, s: expr.shift_right(e, s) & (2**bits - 1), apart, shifts)
    return b.emit(ops.Reshape((*packed.shape[:-1], packed.shape[-1] * (8 // bits))), numbers)


@operator("MatMulNBits", since=1, domain=MICROSOFT)
def matmul_nbits(
    b: Builder,
    a: Value,
    packed: Value,
    scales: Value,
    zero_points: Value | None = None,
    g_idx: Value | None = None,
    bias: Value | None = None,
    *,
    K: int,
    N: int,
    block_size: int,
    bits: int = 4,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

    g_idx holds the block of every column and takes its zero point from there too, which ONNX Runtime 1.31 forgets.
    """
    if bits not in (2, 4, 8) or weight_prepacked or min(K, N, block_size) < 1:
        raise InvalidModel(f"weights [{N}, {K}] of {bits} bits in blocks of {block_size}, prepacked {weight_prepacked}")
    blocks = dims.ceil_div(K, block_size)
    bytes_of = b.emit(ops.Reshape((N, blocks, block_size * bits // 8)), packed)
    scale = b.emit(ops.Reshape((N, blocks, 1)), scales)
    zero = _block_zeros(b, zero_points, (N, blocks), bits)
    weights = None if g_idx is not None else _narrow(b, bytes_of, scale, zero, bits, K)
    if weights is None:
        weights = _numbers(b, unpacked(b, bytes_of, bits), scale, zero, g_idx, K)
    left = a if a.rank > 1 else b.emit(ops.Reshape((1, *a.shape)), a)
    product = b.emit(ops.MatMul(transpose_b=True), left, weights)
    product = product if a.rank > 1 else b.emit(ops.Reshape((N,)), product)
    return product if bias is None else emit_map(b, lambda e, c: e + c, product, bias)


def _narrow(b: Builder, packed: Value, scale: Value, zero: Value, bits: int, columns: int) -> Value | None:
    """Weights [N, K] of constants as the node that keeps them narrow, from bytes [N, blocks, bytes of a block]."""
    if packed.constant is None or scale.constant is None or zero.constant is None or packed.shape[-1] == 0:
        return None
    rows, blocks = scale.shape[:2]
    block = dims.number(packed.shape[-1]) * 8 // bits
    codes = packed.constant
    if bits < 8:
        codes = (codes[..., None] >> np.arange(0, 8, bits, dtype=UINT8)) & (2**bits - 1)
    flat = codes.reshape(dims.number(rows), -1)[:, :columns].view(CODE_DTYPES[bits])
    zeros = np.repeat(zero.constant[..., 0], dims.number(blocks) // zero.constant.shape[1], 1)
    parts = b.emit(ops.Reshape((rows, blocks)), scale), b.constant(zeros)
    return b.emit(ops.Dequantize(scale.dtype, 1, block), b.constant(flat), *parts)


def _numbers(b: Builder, codes: Value, scale: Value, zero: Value, g_idx: Value | None, columns: int) -> Value:
    """Weights [N, K] of codes [N, blocks, block size], computed."""
    rows = codes.shape[0]
    if g_idx is not None:
        codes = cut(b, b.emit(ops.Reshape((rows, dims.product(codes.shape[1:]))), codes), {1: (0, 1, columns)})
        index = cut(b, g_idx, {0: (0, 1, columns)})
        scale, zero = (_by_column(b, value, index) for value in (scale, zero))
    numbers = emit_map(b, number_of, codes, scale, zero)
    return cut(b, b.emit(ops.Reshape((rows, dims.product(numbers.shape[1:]))), numbers), {1: (0, 1, columns)})


def number_of(code: Expr, scale: Expr, zero: Expr | None) -> Expr:
    """What a code stands for, in the type of its scale."""
    return dequantized(code, scale, zero, scale.dtype)


def _block_zeros(b: Builder, zeros: Value | None, shape: tuple[Dim, Dim], bits: int) -> Value:
    """The zero point of every block, [N, blocks, 1]: packed as the weights are, one number each, or the middle."""
    rows, blocks = shape
    if zeros is None:
        return b.constant(np.full((1, 1, 1), 2 ** (bits - 1), UINT8))
    if is_float(zeros.dtype):
        return b.emit(ops.Reshape((rows, blocks, 1)), zeros)
    packed = b.emit(ops.Reshape((rows, dims.ceil_div(blocks * bits, 8))), zeros)
    held = cut(b, unpacked(b, packed, bits), {1: (0, 1, blocks)})
    return b.emit(ops.Reshape((rows, blocks, 1)), held)


def _by_column(b: Builder, value: Value, columns: Value) -> Value:
    """value [N, blocks, 1] as [N, K], for the block of every column."""
    if value.shape[1] == 1:
        return b.emit(ops.Reshape(value.shape[:2]), value)
    return b.emit(ops.Gather(1), b.emit(ops.Reshape(value.shape[:2]), value), columns)


@operator("MatMulBnb4", since=1, domain=MICROSOFT)
def matmul_bnb4(
    b: Builder,
    a: Value,
    packed: Value,
    absmax: Value,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulBnb4"""
    if quant_type not in (0, 1) or min(K, N, block_size) < 1:
        raise InvalidModel(f"weights [{N}, {K}] of type {quant_type} (0: FP4, 1: NF4) in blocks of {block_size}")
    codes = cut(b, unpacked(b, packed, 4, high_first=True), {0: (0, 1, N * K)})
    blocks = dims.ceil_div(N * K, block_size)
    whole = b.emit(ops.Pad((0,), (blocks * block_size - N * K,)), codes, b.constant(UINT8.type(0)))
    numbers = b.emit(ops.Gather(0), b.constant(CODES[quant_type]), emit_map(b, lambda e: cast(e, INT64), whole))
    scaled = emit_map(
        b,
        lambda e, s: cast(e * cast(s, FLOAT32), s.dtype),
        b.emit(ops.Reshape((blocks, block_size)), numbers),
        b.emit(ops.Reshape((blocks, 1)), absmax),
    )
    flat = cut(b, b.emit(ops.Reshape((blocks * block_size,)), scaled), {0: (0, 1, N * K)})
    weights = b.emit(ops.Reshape((N, K)), flat)
    return matmul(b, a, b.emit(ops.Transpose((1, 0)), weights) if transB else weights)


@operator("GatherBlockQuantized", since=1, domain=MICROSOFT)
def gather_block_quantized(
    b: Builder,
    data: Value,
    indices: Value,
    scales: Value,
    zero_points: Value | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized

    An index beyond the axis gives zeros.
    """
    rank = data.rank
    picked, blocked = normal_axis(gather_axis, rank), normal_axis(quantize_axis, rank)
    packed = data.dtype == UINT8
    if packed and (bits not in (2, 4, 8) or picked == rank - 1 or picked == blocked):
        raise InvalidModel(f"{bits} bits in {data.type}, gathered along axis {picked}, blocks along {blocked}")
    index, inside = _bounded(b, indices, data.shape[picked])
    block, by_block = block_size or _known_extent(data, blocked), index
    if picked == blocked:
        by_block = emit_map(b, lambda i: i / block, index)
    codes, scale = b.emit(ops.Gather(picked), data, index), _along(b, scales, picked, by_block)
    zero = None if zero_points is None else _along(b, zero_points, picked, by_block)
    if packed:
        codes = unpacked(b, codes, bits)
        middle = b.constant(np.full((), 2 ** (bits - 1), scale.dtype))
        zero = middle if zero is None else cut(b, unpacked(b, zero, bits), {zero.rank - 1: (0, 1, scale.shape[-1])})
    if picked != blocked:
        axis = blocked if blocked < picked else blocked + index.rank - 1
        scale = _repeated(b, scale, codes, axis, block)
        zero = None if zero is None else _repeated(b, zero, codes, axis, block)
    ones = (1,) * (rank - 1 - picked)
    known = b.emit(ops.Reshape((*index.shape, *ones)), inside)
    return emit_map(b, lambda c, s, z, i: where(i, number_of(c, s, z), 0.0), codes, scale, zero, known)


def _bounded(b: Builder, indices: Value, extent: Dim) -> tuple[Value, Value]:
    """Indices that an axis has, counted from its start, and whether they are those that were asked for."""
    bounds = b.shape_constant([extent]) if indices.rank else b.shape_constant(np.array(extent, object))
    index = emit_map(b, lambda i, n: where(i < 0, cast(i, INT64) + n, cast(i, INT64)), indices, bounds)
    inside = emit_map(b, lambda i, n: (i >= 0) & (i < n), index, bounds)
    return emit_map(b, lambda i, n: expr.maximum(expr.minimum(i, n - 1), 0), index, bounds), inside


def _known_extent(data: Value, axis: int) -> int:
    extent = data.shape[axis]
    if not isinstance(extent, int):
        raise InvalidModel(f"axis {axis} of {data.type} must be known when the model is compiled")
    return extent


def _repeated(b: Builder, value: Value, codes: Value, axis: int, block: int) -> Value:
    """A value per block of an axis of the codes as one per element, unless there is one for all."""
    return value if value.rank == 0 or value.shape[axis] == 1 else spread(b, value, codes, axis, block)


def _along(b: Builder, value: Value, axis: int, index: Value) -> Value:
    """The slices of value along an axis; one slice serves every index."""
    if value.shape[axis] != 1:
        return b.emit(ops.Gather(axis), value, index)
    return b.emit(ops.Reshape((*value.shape[:axis], *(1,) * index.rank, *value.shape[axis + 1 :])), value)

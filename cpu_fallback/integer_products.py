"""MatMul of int16 into int32 as native steps: a step of the depth multiplies two pairs of neighbours in every lane.

What QDQ graphs come down to: centred bytes as int16, exact sums. Constants are packed in pairs once; a B that is not
constant is read as it is where its columns are contiguous, else its rows are interleaved by a step in front.
"""

from __future__ import annotations

from dataclasses import replace

from cpu_fallback import packing
from cpu_fallback.byte_products import emit_bytes, product_operands
from cpu_fallback.dots import MOST_ROWS
from cpu_fallback.gemm import converted, emit_product, lower_gemm
from cpu_fallback.gemm_driver import PACKED, PLAIN, TRANSPOSED
from cpu_fallback.integer_conv import emit_tiles, is_paired
from cpu_fallback.integer_epilogues import integer_finish
from cpu_fallback.integer_images import CENTRED, EXACT
from cpu_fallback.lanes import is_supported
from cpu_fallback.maps import Walked, compacted, walk_call
from cpu_fallback.native import Target, host
from cpu_fallback.product_calls import Matrix, Product, emit_call
from cpu_fallback.tiles import tile_shape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, INT16, INT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node, TensorType, Value
from gpu_engine.ir.ops import Conv, MatMul
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
PAIR = 2


def lower_integer_matmul(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """Products of int16 in pairs and of bytes by fours; other products as `lower_gemm` has them."""
    found = emit_rows(lowering, op, node, inputs, outputs, host())
    found = found or emit_pairs(lowering, op, node, inputs, outputs, host())
    found = found or emit_bytes(lowering, op, node, inputs, outputs, host())
    found = found or emit_floats(lowering, op, node, inputs, outputs, host())
    return found or lower_gemm(lowering, op, node, inputs, outputs)


def emit_rows(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target) -> bool:
    """Append rows of int16 times a constant matrix as a convolution over one axis, whose tiles keep sums in registers
    for the epilogue; False if that is no such product, or of few rows."""
    a, b, *extras = node.inputs
    shape, depth = node.outputs[0].shape, a.shape[-1]
    if not _is_narrow(op, node, target) or b.constant is None or b.rank != 2 or _is_small(shape):
        return False
    weights = (b.constant if op.transpose_b else b.constant.T)[..., None]
    if not is_paired(a.shape, weights.shape, 1):
        return False
    given = [(buffer, value.shape, value.dtype) for buffer, value in zip(inputs[2:], extras, strict=True)]
    finish = integer_finish(op.epilogue, given, shape, target)
    if finish is None:
        return False
    rows = dims.product(shape[:-1])
    x, out = (inputs[0], (1, rows, depth)), (outputs[0], (1, rows, shape[-1]))
    emit_tiles(lowering, target, Conv((1,), (0,), (0,), (1,)), x, out, weights, finish)
    return True


def emit_floats(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append a product of bytes less a zero point as one of floats that hold every sum; False if it is another."""
    a, b, *extras = node.inputs
    if not a.dtype == b.dtype == INT16 or op.accumulate != INT32:
        return False
    depth = a.shape[-2 if op.transpose_a else -1]
    real = FLOAT32 if isinstance(depth, int) and depth * CENTRED**2 < EXACT else FLOAT64
    epilogue = expr.substitute(op.epilogue or expr.arg(0, INT32), {0: expr.cast(expr.arg(0, real), INT32)})
    factors = [Value(TensorType(real, value.shape)) for value in (a, b)]
    buffers = [converted(lowering, *pair, real) for pair in zip(inputs, (a.shape, b.shape), strict=False)]
    plain = replace(op, accumulate=None, epilogue=epilogue)
    whole = replace(node, op=plain, inputs=(*factors, *extras))
    return emit_product(lowering, plain, whole, (*buffers, *inputs[2:]), outputs, target)


def _is_narrow(op: MatMul, node: Node, target: Target) -> bool:
    """Whether this is a product of int16 into int32 whose depth is known, on a processor that multiplies pairs."""
    a, b = node.inputs[:2]
    narrow = a.dtype == b.dtype == INT16 and op.accumulate == INT32 and not op.transpose_a
    return narrow and target.x86 and isinstance(a.shape[-1], int) and a.shape[-1] > 0


def emit_pairs(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of a product of int16 matrices; False if it has no such form."""
    a, b = node.inputs[:2]
    depth = a.shape[-1]
    if not _is_narrow(op, node, target):
        return False
    root, used = compacted(op.epilogue or expr.arg(0, INT32))
    if used[:1] != (0,) or not is_supported(root, target):
        return False
    shape = node.outputs[0].shape
    if b.constant is None and _is_small(shape):
        return False
    right, form = _right(lowering, op, node, inputs[1], target)
    *lead, row, _ = broadcast_strides(a.shape, (*shape[:-2], *a.shape[-2:]))
    left = Matrix(inputs[0], tuple(lead), row, PAIR)
    tile = tile_shape(target, "i32", PAIR)
    operands = product_operands(node, root, used, inputs, outputs)
    pairs = dims.ceil_div(depth, PAIR)
    emit_call(lowering, Product(root, INT32, tile, form, left, right, shape, pairs, operands, INT16.itemsize))
    return True


def _is_small(shape: Shape) -> bool:
    """Whether kernels that know no pairs could take the product: few rows, or one column."""
    few = isinstance(shape[-2], int) and shape[-2] <= MOST_ROWS
    return few or shape[-1] == 1


def _right(lowering: Lowering, op: MatMul, node: Node, buffer: int, target: Target) -> tuple[Matrix, str]:
    """B as int32 elements of two steps each, and its form."""
    b, batch = node.inputs[1], node.outputs[0].shape[:-2]
    if b.constant is not None:
        oriented = b.constant.swapaxes(-1, -2) if op.transpose_b else b.constant
        packed = packing.pack_narrow_panels(oriented, tile_shape(target, "i32", PAIR))
        *lead, _ = broadcast_strides(packed.shape, (*batch, packed.shape[-1]))
        return Matrix(lowering.constant(packed), tuple(lead), 0, 0), PACKED
    *own, rows, columns = b.shape
    if op.transpose_b:
        shape = (*own, rows, dims.ceil_div(columns, PAIR))
        if columns != shape[-1] * PAIR:
            buffer = _paired(lowering, buffer, b.shape, shape, -1)
    else:
        shape = (*own, dims.ceil_div(rows, PAIR), columns)
        buffer = _paired(lowering, buffer, b.shape, shape, -2)
    *lead, outer, inner = broadcast_strides(shape, (*batch, *shape[-2:]))
    strides = (inner, outer) if op.transpose_b else (outer, inner)
    return Matrix(buffer, tuple(lead), *strides), TRANSPOSED if op.transpose_b else PLAIN


def _paired(lowering: Lowering, buffer: int, own: Shape, shape: Shape, axis: int) -> int:
    """A new buffer of int32 that hold two int16 neighbours along an axis each, the last one a zero if it has none."""
    pairs = lowering.buffer(INT32, shape)
    strides = list(contiguous_strides(own))
    step = strides[axis]
    strides[axis] = step * PAIR
    first, second = (expr.cast(expr.arg(i, INT16), INT32) for i in range(PAIR))
    low, high = first & 0xFFFF, expr.apply("shl", second, 16)
    extent = own[axis]
    assert isinstance(extent, int)
    places: list[tuple[Expr, int, int]] = [(low | high, 0, extent // PAIR)] if extent // PAIR else []
    if extent % PAIR:
        places.append((low, extent // PAIR, 1))
    for root, start, count in places:
        reads = [
            Walked(buffer, INT16, tuple(strides), (step * (PAIR * start + i)) * INT16.itemsize) for i in range(PAIR)
        ]
        out_strides = contiguous_strides(shape)
        write = Walked(pairs, INT32, out_strides, out_strides[axis] * (start * INT32.itemsize))
        extents: list[Dim] = list(shape)
        extents[axis] = count
        call = walk_call(root, reads[: expr.arg_count(root)], write, tuple(extents))
        assert call is not None
        lowering.emit(call, (buffer,), (pairs,))
    return pairs

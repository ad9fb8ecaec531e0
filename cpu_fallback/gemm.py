"""MatMul as native steps: what is converted, and what is packed when."""

from __future__ import annotations

import numpy as np

from cpu_fallback import packing
from cpu_fallback.calls import Array
from cpu_fallback.gemm_driver import PACKED, PLAIN, TRANSPOSED
from cpu_fallback.lanes import COMPUTED, is_supported
from cpu_fallback.linear import lower_matmul
from cpu_fallback.maps import compacted, map_call, operand_dtypes
from cpu_fallback.native import Target, host
from cpu_fallback.product_calls import Matrix, Operand, Product, emit_call
from cpu_fallback.tiles import TileShape, narrow_terms, tile_shape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import INT16, INT32, DType, compute_dtype, is_float
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
PAGE = 4096


def lower_gemm(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A native product where there is one, else NumPy's."""
    found = emit_product(lowering, op, node, inputs, outputs, host())
    return found or lower_matmul(lowering, op, node, inputs, outputs)


def emit_product(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of a native product of floats, or of bytes with a constant; False if it has no native form."""
    product = op.accumulate or node.inputs[0].dtype
    root, used = compacted(op.epilogue or expr.arg(0, product))
    if used[:1] != (0,) or not is_supported(root, target):
        return False
    operands = [Operand(outputs[0], root.dtype.itemsize, contiguous_strides(node.outputs[0].shape))]
    for position, kind in zip(used[1:], operand_dtypes(root)[1:], strict=True):
        strides = broadcast_strides(node.inputs[1 + position].shape, node.outputs[0].shape)
        operands.append(Operand(inputs[1 + position], kind.itemsize, strides))
    make = _float_product if is_float(product) else _byte_product
    found = make(lowering, op, node, inputs, root, operands, target)
    if found is not None:
        emit_call(lowering, found)
    return found is not None


def _float_product(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, root: Expr, operands: list[Operand], target: Target
) -> Product | None:
    dtype = compute_dtype(op.accumulate or node.inputs[0].dtype)
    casts = [expr.cast(expr.arg(0, value.dtype), dtype) for value in node.inputs[:2]]
    if COMPUTED.get(dtype) not in ("float", "double") or not all(is_supported(cast, target) for cast in casts):
        return None
    tile = tile_shape(target, COMPUTED[dtype])
    a, b, form = _factors(lowering, op, node, inputs, tile, dtype)
    depth = node.inputs[0].shape[-2 if op.transpose_a else -1]
    return Product(root, dtype, tile, form, a, b, node.outputs[0].shape, depth, operands, dtype.itemsize)


def _byte_product(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, root: Expr, operands: list[Operand], target: Target
) -> Product | None:
    """Of rows of bytes with a constant; where the processor cannot multiply bytes they become int16.

    Lanes that reach behind the end of a row of A meet zeros in B.
    """
    a, b = node.inputs[:2]
    terms = narrow_terms(target, a.dtype, b.dtype) if op.accumulate == INT32 and not op.transpose_a else 0
    if not terms or b.constant is None:
        return None
    tile = tile_shape(target, "i32", terms)
    buffer = inputs[0] if terms == 4 else converted(lowering, inputs[0], a.shape, INT16)
    packed = packing.pack_narrow_panels(_oriented(b.constant, op.transpose_b), tile)
    batch = node.outputs[0].shape[:-2]
    *lead, row, _ = broadcast_strides(a.shape, (*batch, *a.shape[-2:]))
    *lead_b, _ = broadcast_strides(packed.shape, (*batch, packed.shape[-1]))
    left = Matrix(buffer, tuple(lead), row, terms)
    right = Matrix(lowering.constant(packed), tuple(lead_b), 0, 0)
    depth = dims.ceil_div(a.shape[-1], terms)
    nbytes = INT32.itemsize // terms
    return Product(root, INT32, tile, PACKED, left, right, node.outputs[0].shape, depth, operands, nbytes)


def _factors(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, tile: TileShape, dtype: DType
) -> tuple[Matrix, Matrix, str]:
    """A, B, and in which form B comes: in panels if it is a constant of more than one column."""
    batch, column = node.outputs[0].shape[:-2], node.outputs[0].shape[-1] == 1
    known_a, known_b = (value.constant for value in node.inputs[:2])
    form = TRANSPOSED if op.transpose_b else PLAIN
    if known_b is not None and not column:
        packed = packing.pack_panels(_oriented(known_b, op.transpose_b), tile, dtype)
        *lead, _ = broadcast_strides(packed.shape, (*batch, packed.shape[-1]))
        b, form = Matrix(lowering.constant(packed), tuple(lead), 0, 0), PACKED
    else:
        b = _factor(lowering, node.inputs[1].shape, inputs[1], op.transpose_b, batch, dtype)
    if known_a is not None and form != PACKED:
        return _constant_rows(lowering, known_a, op.transpose_a, batch, dtype), b, form
    return _factor(lowering, node.inputs[0].shape, inputs[0], op.transpose_a, batch, dtype), b, form


def _factor(
    lowering: Lowering, own: Shape, buffer: int, transposed: bool, batch: Shape, dtype: DType
) -> Matrix:  # fmt: skip
    """A factor as it is, converted first if it is of another type."""
    buffer = converted(lowering, buffer, own, dtype)
    *lead, outer, inner = broadcast_strides(own, (*batch, *own[-2:]))
    return Matrix(buffer, tuple(lead), *((inner, outer) if transposed else (outer, inner)))


def converted(lowering: Lowering, buffer: int, shape: Shape, dtype: DType) -> int:
    """The buffer of the same elements as `dtype`: itself, or one that an appended step fills."""
    given = lowering.buffers[buffer]
    if given.dtype == dtype:
        return buffer
    if given.constant is not None:
        return lowering.constant(given.constant.astype(dtype))
    wide = lowering.buffer(dtype, shape)
    found = map_call(expr.cast(expr.arg(0, given.dtype), dtype), [(buffer, shape)], wide, shape)
    assert found is not None
    lowering.emit(found[0], (buffer,), (wide,))
    return wide


def _constant_rows(
    lowering: Lowering, known: Array, transposed: bool, batch: Shape, dtype: DType
) -> Matrix:  # fmt: skip
    """A constant A by rows, which are set apart where they would lie whole pages apart: caches could not hold many."""
    array = np.ascontiguousarray(_oriented(known, transposed), dtype)
    if array.shape[-1] * dtype.itemsize % PAGE == 0:
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 64 // dtype.itemsize)])
    *lead, row, column = broadcast_strides(array.shape, (*batch, *array.shape[-2:]))
    return Matrix(lowering.constant(array), tuple(lead), row, column)


def _oriented(array: Array, transposed: bool) -> Array:
    return array.swapaxes(-1, -2) if transposed else array

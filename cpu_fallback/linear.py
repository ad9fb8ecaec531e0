"""Matrix products: NumPy's BLAS writes the product in place, a native map finishes it.

This is the door for native kernels: `lower_matmul` decides by shapes and constants, may pack a weight with
`Lowering.constant`, and appends whatever steps it likes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_fallback.calls import Array, ArrayCall, evaluate_into
from cpu_fallback.maps import map_call
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, DType, compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Map, MatMul
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
EXACT_TERMS = 512
"""So many products of two bytes add up exactly in float32."""


def lower_matmul(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    dtype = op.accumulate or node.inputs[0].dtype
    shape = node.outputs[0].shape
    product = product_buffer(lowering, op.epilogue, dtype, shape, outputs[0])
    lowering.emit(ArrayCall(multiply, op), inputs[:2], (product,))
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    finish(lowering, op.epilogue, product, extras, outputs[0], shape)
    return True


def product_buffer(lowering: Lowering, epilogue: Expr | None, dtype: DType, shape: Shape, out: int) -> int:
    """Where the product goes before its epilogue: the output itself if the dtypes agree."""
    if epilogue is None or epilogue.dtype == dtype:
        return out
    return lowering.buffer(dtype, shape)


def finish(
    lowering: Lowering, epilogue: Expr | None, product: int, extras: Sequence[tuple[int, Shape]], out: int, shape: Shape
) -> None:
    """Append the map from the product and the extra operands to the output."""
    if epilogue is None:
        return
    operands = [(product, shape), *extras]
    found = map_call(epilogue, operands, out, shape)
    inputs = tuple(buffer for buffer, _ in operands)
    if found is None:
        lowering.emit(ArrayCall(evaluate_into, Map(epilogue)), inputs, (out,))
    else:
        lowering.emit(found[0], inputs, (out,), in_place=found[1])


def multiply(op: MatMul, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """The product of the two operands, without the epilogue."""
    a, b, out = inputs[0], inputs[1], outputs[0]
    if op.transpose_b:
        b = b.swapaxes(-1, -2)
    if op.transpose_a:
        a = a.swapaxes(-1, -2)
    elif b.ndim == 2 and a.ndim > 2:
        a, out = a.reshape(-1, a.shape[-1]), out.reshape(-1, out.shape[-1])
    multiply_into(a, b, out)


def multiply_into(a: Array, b: Array, out: Array) -> None:
    """a @ b in the dtype of `out`: floats in at least float32, integers wrap."""
    if a.dtype == b.dtype == out.dtype and out.dtype in (FLOAT32, FLOAT64):
        np.matmul(a, b, out=out)
    elif out.dtype.kind in "iu" and a.dtype.itemsize == b.dtype.itemsize == 1:
        _multiply_bytes(a, b, out)
    else:
        wide = compute_dtype(out.dtype)
        product = np.matmul(a.astype(wide, copy=False), b.astype(wide, copy=False))
        np.copyto(out, product, casting="unsafe")


def _multiply_bytes(a: Array, b: Array, out: Array) -> None:
    """Exactly, by float32 products of so few terms that nothing rounds."""
    out[...] = 0
    for start in range(0, a.shape[-1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        product = np.matmul(a[..., part].astype(np.float32), b[..., part, :].astype(np.float32))
        out += product.astype(np.int64).astype(out.dtype)

"""MatMul as kernels: what factors are converted to, what becomes a batch, and the tiles."""

from __future__ import annotations

import numpy as np

from gpu_engine.gpu.gemm_kernels import Factor, Product, emit_product
from gpu_engine.gpu.gemm_steps import PLANES, Step, byte_step, dot_step, sum_step
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.tiles import choose
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    DType,
    is_integer,
    limits,
)
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.axes import Shape, broadcast_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
FEW = 4
"""Rows or columns up to which matrix instructions are not worth the zeros that fill them: float32 has none anyway."""
FACTORS: dict[str, DType] = {"fp32": FLOAT32, "tf32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}


def lower_matmul(
    options: GpuOptions, lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Append the kernels of a product; False for types and epilogues that kernels do not compute."""
    dtype = op.accumulate or node.inputs[0].dtype
    root = op.epilogue or expr.arg(0, dtype)
    if not is_printable(root):
        return False
    buffers = tuple(converted(lowering, buffer, options) for buffer in inputs[:2])
    few = any(isinstance(extent, int) and extent <= FEW for extent in node.outputs[0].shape[-2:])
    found = step_of(lowering, dtype, buffers, options, few=few)
    if found is None:
        return False
    family, step = found
    product = _product(op, node, (*buffers, *inputs[2:]), outputs[0], root, dtype)
    nbytes = lowering.buffers[buffers[0]].dtype.itemsize
    batch = dims.product(product.batch)
    for choice in choose(family, batch, product.m, product.n, product.k, nbytes, options.arch):
        emit_product(lowering, product, step, choice)
    return True


def converted(lowering: Lowering, buffer: int, options: GpuOptions) -> int:
    """A factor as kernels load it: constants become the type that is multiplied, or the narrowest that holds them."""
    given = lowering.buffers[buffer]
    if given.constant is None:
        return buffer
    narrow = FACTORS[options.precision] if given.dtype == FLOAT32 else given.dtype
    if is_integer(given.dtype) and given.constant.size:
        span = int(given.constant.min()), int(given.constant.max())
        fitting = (kind for kind in (INT8, INT16) if limits(kind)[0] <= span[0] and span[1] <= limits(kind)[1])
        narrow = next(fitting, given.dtype)
    if narrow == given.dtype or narrow.itemsize > given.dtype.itemsize:
        return buffer
    with np.errstate(over="ignore"):
        return lowering.constant(given.constant.astype(narrow))


def step_of(
    lowering: Lowering, dtype: DType, factors: Buffers, options: GpuOptions, *, few: bool
) -> tuple[str, Step] | None:  # fmt: skip
    """(family of tiles, how a step multiplies) for a product of type `dtype`, of few rows or columns or not."""
    given = lowering.buffers[factors[0]].dtype, lowering.buffers[factors[1]].dtype
    if dtype in (FLOAT16, BFLOAT16):
        return "half", dot_step(FLOAT32, dtype, given)
    if dtype == FLOAT64:
        return "double", dot_step(FLOAT64, FLOAT64, given)
    if dtype == FLOAT32:
        return _single_step(given, options.precision, few=few)
    if dtype.kind not in "iu" or any(kind.kind not in "iu" for kind in given):
        return None
    sums = dtype if dtype.itemsize == 8 else INT32
    if sums == INT32 and all(kind in PLANES for kind in given):
        widths = {kind.itemsize for kind in given}
        return ("bytes" if widths == {1} else "planes"), byte_step(given)
    return "sums", sum_step(sums, given)


def _single_step(given: tuple[DType, DType], precision: str, *, few: bool) -> tuple[str, Step]:
    if precision == "fp32" and few:
        return "sums", sum_step(FLOAT32, given)
    family = {"fp32": "ieee", "tf32": "tf32"}.get(precision, "converted")
    return family, dot_step(FLOAT32, FACTORS[precision], given, "tf32" if precision == "tf32" else "ieee")


def _product(
    op: MatMul, node: Node, buffers: Buffers, out: int, root: Expr, dtype: DType
) -> Product:  # fmt: skip
    """The product; where all matrices share b, the rows of all are rows of one."""
    a, b, *extras = (value.shape for value in node.inputs)
    shape = node.outputs[0].shape
    *_, n = shape
    k = a[-2] if op.transpose_a else a[-1]
    one = all(extent == 1 for extent in b[:-2]) and not op.transpose_a and a[:-2] == shape[:-2]
    lead: Shape = () if one else shape[:-2]
    left = _factor(buffers[0], (dims.product(a[:-1]), a[-1]) if one else a, lead, op.transpose_a)
    right = _factor(buffers[1], b[-2:] if one else b, lead, not op.transpose_b)
    operands = tuple(
        Walked(buffer, broadcast_strides(own, shape)) for buffer, own in zip(buffers[2:], extras, strict=True)
    )
    rows = len(shape) - 1 - len(lead)
    m = dims.product(shape[len(lead) : -1])
    return Product(left, right, m, n, k, shape, rows, root, operands, out, dtype)


def _factor(buffer: int, own: Shape, lead: Shape, outer_is_last: bool) -> Factor:
    """A buffer of matrices whose m or n is the last axis, or the one before it."""
    *batch, first, last = broadcast_strides(own, (*lead, *own[-2:]))
    outer, inner = (last, first) if outer_is_last else (first, last)
    return Factor(buffer, tuple(batch), outer, inner)

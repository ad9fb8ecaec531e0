"""MatMul as kernels: what factors are converted to, what becomes a batch, and the tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from gpu_engine.gpu.epilogues import is_heavy
from gpu_engine.gpu.float8 import FIRST_ARCH, FLOAT8
from gpu_engine.gpu.gemm_kernels import Factor, Product
from gpu_engine.gpu.gemm_steps import PLANES, Step, byte_step, dot_step, float8_step, sum_step
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.persistent_gemm import emit_chosen, walking_epilogue
from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.tiles import Extents, choose
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    DType,
    limits,
)
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.axes import Shape, broadcast_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
FEW = 4
"""Rows or columns up to which matrix instructions are not worth the zeros that fill them: float32 has none anyway."""
K_FIRST = ("tf32", "bytes", "planes", "float8", "float8_half")
"""Families whose matrix instructions want what is summed over side by side."""
FACTORS: dict[str, DType] = {"fp32": FLOAT32, "tf32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}


def lower_matmul(
    options: GpuOptions, lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Append the kernels of a product; False for types and epilogues that kernels do not compute."""
    dtype = op.accumulate or node.inputs[0].dtype
    root = op.epilogue or expr.arg(0, dtype)
    if not is_printable(root):
        return False
    shape, lead = node.outputs[0].shape, _lead(op, node)
    m = dims.product(shape[len(lead) : -1])
    factors = converted(lowering, inputs[0], options), converted(lowering, inputs[1], options)
    found = step_of(lowering, dtype, factors, options, few=_is_few(m) or _is_few(shape[-1]))
    if found is None:
        return False
    family, step = found
    b, transpose_b = _oriented(lowering, factors[1], op.transpose_b, family)
    given = replace(op, transpose_b=transpose_b)
    product = _product(lowering, given, node, (factors[0], b, *inputs[2:]), outputs[0], lead)
    nbytes = lowering.buffers[factors[0]].dtype.itemsize
    extents = Extents(dims.product(lead), m, product.n, product.k, nbytes)
    persistent = walking_epilogue(lowering, product, family, options.arch)
    choices = choose(family, extents, options.arch, heavy=is_heavy(root), persistent=persistent)
    emit_chosen(lowering, product, step, choices, options.arch)
    return True


def _lead(op: MatMul, node: Node) -> Shape:
    """The batch axes of the result; none where all matrices share b, whose rows then are rows of one."""
    a, b = (value.shape for value in node.inputs[:2])
    batch = node.outputs[0].shape[:-2]
    one = all(extent == 1 for extent in b[:-2]) and not op.transpose_a and a[:-2] == batch
    return () if one else batch


def _is_few(extent: Dim) -> bool:
    return isinstance(extent, int) and extent <= FEW


def converted(lowering: Lowering, buffer: int, options: GpuOptions) -> int:
    """A factor as kernels load it: constants become the type that is multiplied, or the narrowest that holds them."""
    given = lowering.buffers[buffer]
    if given.constant is None:
        return buffer
    narrow = FACTORS[options.precision] if given.dtype == FLOAT32 else given.dtype
    if given.dtype.kind in "iu" and given.constant.size:
        span = int(given.constant.min()), int(given.constant.max())
        fitting = (kind for kind in (INT8, INT16) if limits(kind)[0] <= span[0] and span[1] <= limits(kind)[1])
        narrow = next(fitting, given.dtype)
    if narrow == given.dtype or narrow.itemsize > given.dtype.itemsize:
        return buffer
    with np.errstate(over="ignore"):
        return lowering.constant(given.constant.astype(narrow))


def _oriented(lowering: Lowering, buffer: int, transposed: bool, family: str) -> tuple[int, bool]:
    """(the second factor, whether it is [n, k]): a constant as matrix instructions or wide loads want it to lie."""
    given = lowering.buffers[buffer]
    if given.constant is None:
        return buffer, transposed
    outer, inner = given.shape[-2:]
    (k, n) = (inner, outer) if transposed else (outer, inner)
    along_k, along_n = (math.gcd(extent * given.dtype.itemsize, 16) for extent in (dims.number(k), dims.number(n)))
    wanted = along_k > along_n or (along_k == along_n and (transposed or family in K_FIRST))
    if wanted == transposed or 1 in (k, n):
        return buffer, transposed
    return lowering.constant(given.constant.swapaxes(-1, -2)), wanted


def step_of(
    lowering: Lowering, dtype: DType, factors: Buffers, options: GpuOptions, *, few: bool
) -> tuple[str, Step] | None:  # fmt: skip
    """(family of tiles, how a step multiplies) for a product of type `dtype`, of few rows or columns perhaps."""
    given = lowering.buffers[factors[0]].dtype, lowering.buffers[factors[1]].dtype
    if dtype == FLOAT32 and all(kind in FLOAT8 for kind in given):
        return "float8" if options.arch >= FIRST_ARCH else "float8_half", float8_step(given, options.arch)
    if dtype in (FLOAT16, BFLOAT16):
        return "half", dot_step(FLOAT32, dtype, given)
    if dtype == FLOAT64:
        return "double", dot_step(FLOAT64, FLOAT64, given)
    if dtype == FLOAT32 and few and options.precision == "fp32":
        return "sums", sum_step(FLOAT32, given)
    if dtype == FLOAT32:
        family = {"fp32": "ieee", "tf32": "tf32"}.get(options.precision, "converted")
        return family, dot_step(
            FLOAT32, FACTORS[options.precision], given, "tf32" if options.precision == "tf32" else "ieee"
        )
    if dtype.kind not in "iu" or any(kind.kind not in "iu" for kind in given):
        return None
    sums = dtype if dtype.itemsize == 8 else INT32
    if sums == INT32 and all(kind in PLANES for kind in given):
        widths = {kind.itemsize for kind in given}
        return ("bytes" if widths == {1} else "planes"), byte_step(given)
    return "sums", sum_step(sums, given)


def _product(
    lowering: Lowering, op: MatMul, node: Node, buffers: Buffers, out: int, lead: Shape
) -> Product:  # fmt: skip
    """The product of the buffers, which lie as `op` says, with batch axes `lead`."""
    a, b = (lowering.buffers[buffer].shape for buffer in buffers[:2])
    shape = node.outputs[0].shape
    depths = a[-2] if op.transpose_a else a[-1], b[-1] if op.transpose_b else b[-2]
    k = next((depth for depth in depths if isinstance(depth, int)), depths[0])
    if not lead:
        a, b = (a if op.transpose_a else (dims.product(a[:-1]), a[-1])), b[-2:]
    left, right = factor_of(buffers[0], a, lead, op.transpose_a), factor_of(buffers[1], b, lead, not op.transpose_b)
    operands = tuple(
        Walked(buffer, broadcast_strides(value.shape, shape))
        for buffer, value in zip(buffers[2:], node.inputs[2:], strict=True)
    )
    dtype = op.accumulate or node.inputs[0].dtype
    root = op.epilogue or expr.arg(0, dtype)
    rows, m = len(shape) - 1 - len(lead), dims.product(shape[len(lead) : -1])
    return Product(left, right, m, shape[-1], k, shape, rows, root, operands, out, dtype)


def factor_of(buffer: int, own: Shape, lead: Shape, outer_is_last: bool) -> Factor:
    """A buffer of matrices whose m or n is the last axis, or the one before it."""
    *batch, first, last = broadcast_strides(own, (*lead, *own[-2:]))
    outer, inner = (last, first) if outer_is_last else (first, last)
    return Factor(buffer, tuple(batch), outer, inner)

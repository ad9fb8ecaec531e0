"""Products with narrow weights: which weights kernels read as they are, how these lie in memory, and the tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gpu_engine.gpu.epilogues import is_heavy
from gpu_engine.gpu.float8 import FLOAT8
from gpu_engine.gpu.gemm import FACTORS, FEW, factor_of
from gpu_engine.gpu.gemm_kernels import Factor, Loop, Product, emit_product
from gpu_engine.gpu.gemm_steps import Step, dot_step
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.narrow_kernels import MAGIC, Codes, Scales, few_step
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.text import power_of_two
from gpu_engine.gpu.tiles import SPLITS, Choice, Extents, GemmTile, choose, gpu_of
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, UINT8, DType, is_float, is_integer, limits
from gpu_engine.ir.graph import Builder, Graph, Node, TensorType, Value, rewrite
from gpu_engine.ir.ops import Dequantize, MatMul
from gpu_engine.ir.ops.weights import bits_of
from gpu_engine.plan.axes import broadcast_strides
from gpu_engine.plan.lower import Lowering

Array = Any
Buffers = tuple[int, ...]
WIDEST_UNIT, NARROWEST_UNIT = 128, 16
"""Bytes along k of a step: a load is 16, and matrix instructions take no less of k."""
STEP_NBYTES = 2048
"""Bytes of weights that 128 threads load at once, 16 each."""


@dataclass(frozen=True)
class NarrowMatMul:
    """`product` of its first operand and of what `weights` makes of the next `parts`; those of the epilogue follow."""

    product: MatMul
    weights: Dequantize
    parts: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, rest = inputs[0], inputs[1:]
        return self.product.infer(x, *self.weights.infer(*rest[: self.parts]), *rest[self.parts :])

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, rest = arrays[0], arrays[1:]
        return self.product.evaluate(xp, x, *self.weights.evaluate(xp, *rest[: self.parts]), *rest[self.parts :])


def join_weights(graph: Graph) -> Graph:
    """The graph whose products read narrow weights themselves, where there are kernels for that."""
    if not any(isinstance(node.op, Dequantize) for node in graph.nodes):
        return graph
    return rewrite(graph, _joined)


def _joined(node: Node, builder: Builder) -> Sequence[Value] | None:
    made = builder.producer(node.inputs[1]) if isinstance(node.op, MatMul) else None
    if made is None or not isinstance(made.op, Dequantize) or not _has_kernels(node, node.op, made):  # type: ignore[arg-type]
        return None
    op = NarrowMatMul(node.op, made.op, len(made.inputs))  # type: ignore[arg-type]
    return builder.emit_all(op, node.inputs[0], *made.inputs, *node.inputs[2:])


def _has_kernels(node: Node, op: MatMul, made: Node) -> bool:
    codes = made.inputs[0]
    return (
        op.accumulate is None
        and op.transpose_a is False
        and node.inputs[0].dtype in (FLOAT32, FLOAT16, BFLOAT16)
        and codes.rank == 2
        and (is_integer(codes.dtype) or (codes.dtype in FLOAT8 and len(made.inputs) == 2))
        and codes.constant is not None
        and codes.constant.size > 0
        and _has_rows(op, made)
        and (op.epilogue is None or is_printable(op.epilogue))
    )


def _has_rows(op: MatMul, made: Node) -> bool:
    """Whether scales and zero points are the same for all of k, or for blocks of whole loads."""
    weights, along_k = made.op, 1 if op.transpose_b else 0
    assert isinstance(weights, Dequantize)
    if any(value.dtype not in (FLOAT32, FLOAT16, BFLOAT16) and is_float(value.dtype) for value in made.inputs[1:]):
        return False
    if weights.block and weights.axis == along_k:
        return weights.block % NARROWEST_UNIT == 0
    depths = [value.shape[along_k - 2] if value.rank >= 2 - along_k else 1 for value in made.inputs[1:]]
    return all(extent == 1 for extent in depths)


def lower_narrow_matmul(
    options: GpuOptions, lowering: Lowering, op: NarrowMatMul, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Append the kernels of a product with narrow weights."""
    plain, dtype, shape = op.product, node.inputs[0].dtype, node.outputs[0].shape
    factor_dtype = FACTORS[options.precision] if dtype == FLOAT32 else dtype
    arrays = [lowering.buffers[buffer].constant for buffer in inputs[1 : 1 + op.parts]]
    codes = packed(lowering, op, arrays, factor_dtype)
    extras = inputs[1 + op.parts :]
    operands = tuple(
        Walked(buffer, broadcast_strides(value.shape, shape))
        for buffer, value in zip(extras, node.inputs[1 + op.parts :], strict=True)
    )
    x = node.inputs[0].shape
    rows = dims.product(x[:-1])
    a = factor_of(inputs[0], (rows, x[-1]), (), False)
    unused = Factor(codes.buffer, (), 0, 0)
    root = plain.epilogue or expr.arg(0, dtype)
    product = Product(
        a, unused, rows, shape[-1], codes.nbytes, shape, len(shape) - 1, root, operands, outputs[0], dtype,
        name="narrow_gemm", reads=(codes.scales.buffer,),
    )  # fmt: skip
    heavy = is_heavy(root)
    for choice, step, loop in _choices(options, (dtype, factor_dtype), codes, rows, heavy=heavy):
        emit_product(lowering, replace(product, loop=loop), step, choice)
    return True


def packed(lowering: Lowering, op: NarrowMatMul, arrays: Sequence[Array], factor_dtype: DType) -> Codes:
    """The weights as kernels read them, and constants that hold them."""
    values, *parts = arrays
    bits, kind = bits_of(values.dtype), values.dtype
    low = 0 if kind in FLOAT8 else int(limits(kind)[0])
    matrix = (values if op.product.transpose_b else values.T).view(UINT8 if kind in FLOAT8 else kind)
    columns, depth = matrix.shape
    block = _block(op, parts)
    unit = min(block & -block or WIDEST_UNIT, WIDEST_UNIT, max(NARROWEST_UNIT, power_of_two(depth * bits // 8)))
    nbytes = _rounded(-(-depth * bits // 8), block or unit)
    whole = np.zeros((columns, 8 // bits, nbytes), UINT8)
    whole.reshape(columns, -1)[:, :depth] = matrix.astype(np.int16) - low
    joined = whole[:, 0].copy()
    for plane in range(1, 8 // bits):
        joined |= whole[:, plane] << (plane * bits)
    rows = [_row_of_blocks(op, part, columns, nbytes * 8 // bits, block) for part in parts]
    scales = _scales(lowering, rows, low, block, 8 // bits if block else 1)
    exact = scales.zero is not None or is_integer(parts[1].dtype)
    holds = kind in FLOAT8 or MAGIC[factor_dtype][3] >= bits
    native = exact and holds and op.weights.dtype == factor_dtype == scales.dtype
    return Codes(
        lowering.constant(joined), kind, bits, nbytes, depth, columns, unit, scales,
        factor_dtype if native else FLOAT32, op.weights.dtype,
    )  # fmt: skip


def _rounded(extent: int, step: int) -> int:
    return -(-extent // step) * step


def _block(op: NarrowMatMul, parts: Sequence[Array]) -> int:
    """How many of k share a scale and zero point; 0: all."""
    along_k = 1 if op.product.transpose_b else 0
    blocked = op.weights.block and op.weights.axis == along_k
    return op.weights.block if blocked and any(part.shape[along_k] > 1 for part in parts) else 0


def _row_of_blocks(op: NarrowMatMul, part: Array, columns: int, depth: int, block: int) -> Array:
    """Scales or zero points [rows, n]: a row for every block of `depth` places of k, or one for all."""
    weights = op.weights
    if weights.block and weights.axis == (0 if op.product.transpose_b else 1):
        part = np.repeat(part, min(weights.block, columns), weights.axis)
    matrix = part.reshape((1,) * (2 - part.ndim) + part.shape)
    matrix = (matrix.T if op.product.transpose_b else matrix)[:, :columns]
    rows = depth // block if block else 1
    missing = rows - len(matrix) if len(matrix) > 1 else 0
    return np.broadcast_to(np.pad(matrix, ((0, missing), (0, 0)), "edge"), (rows, columns))


def _scales(lowering: Lowering, parts: Sequence[Array], low: int, block: int, planes: int) -> Scales:
    """A constant of scales, and of zero points of codes counted from `low` where one number does not say them all."""
    scale, *zeros = parts
    zero, points = _zero_points(zeros[0], low) if zeros else (-low, np.empty(0, UINT8))
    real = zero is None and is_float(points.dtype)
    dtype = FLOAT32 if real and zeros[0].dtype != scale.dtype else scale.dtype
    items = [scale.astype(dtype)] + [points.astype(dtype)] * real
    words = [_words(np.concatenate(items), len(items) * planes)]
    if zero is None and not real:
        words.append(_words(points, planes))
    rows = len(scale) // planes
    return Scales(lowering.constant(np.concatenate(words)), dtype, block, rows, planes, zero, real)


def _zero_points(zeros: Array, low: int) -> tuple[int | None, Array]:
    """(the zero point of all codes, if one number says it, all of them as bytes or float32), counted from `low`."""
    first = float(zeros.flat[0])
    same = bool((zeros == zeros.flat[0]).all()) and first.is_integer() and abs(first) < 256
    if is_float(zeros.dtype):
        return (int(first) - low if same else None), zeros.astype(FLOAT32) - low
    return (int(first) - low if same else None), (zeros.astype(np.int16) - low).astype(UINT8)


def _words(items: Array, planes: int) -> Array:
    """uint32 [words, rows, n] of items [planes * rows, n], as many planes to a word as fit, lowest first."""
    parts = items.reshape(planes, -1, items.shape[1])
    per, bits = 4 // items.dtype.itemsize, 8 * items.dtype.itemsize
    wide = parts.view(f"u{items.dtype.itemsize}").astype(np.uint32)
    words = np.zeros((-(-planes // per), *wide.shape[1:]), np.uint32)
    for plane, part in enumerate(wide):
        words[plane // per] |= part << np.uint32(bits * (plane % per))
    return words


def _choices(
    options: GpuOptions, kinds: tuple[DType, DType], codes: Codes, rows: Dim, *, heavy: bool
) -> Iterator[tuple[Choice, Step, Loop]]:  # fmt: skip
    """(tile, how a step multiplies, the loop over steps) for every range of rows."""
    dtype, factor_dtype = kinds
    few = dtype == FLOAT32 and options.precision == "fp32"
    ranges = [(1, 2), (2, FEW + 1)][: 1 if codes.planes > 2 else 2] if few else []  # 2 bits need too many registers
    for least, end in ranges:
        height = power_of_two(rows) if isinstance(rows, int) and rows < end else end - 1
        tile, splits = _few_rows(height, codes, options.arch)
        yield Choice(least, end, tile, splits), few_step(height), codes.write_few_loop
    after = ranges[-1][1] if ranges else 1
    if isinstance(rows, int) and rows < after:
        return
    name = {"fp32": "ieee", "tf32": "tf32"}.get(options.precision, "") if dtype == FLOAT32 else ""
    step = dot_step(FLOAT32, factor_dtype, (dtype, codes.dtype), name or "ieee")
    extents = Extents(1, rows, codes.columns, codes.nbytes, dtype.itemsize)
    fit = partial(_fitted, codes, dtype.itemsize, gpu_of(options.arch).shared_nbytes, not few)
    for choice in choose("narrow_ieee" if few else "narrow", extents, options.arch, heavy=heavy, fit=fit):
        yield choice._replace(least=max(choice.least, after)), step, codes.write_loop


def _fitted(codes: Codes, itemsize: int, limit: int, wide: bool, tile: GemmTile) -> GemmTile:
    """The tile with steps inside a block, if `wide` loads of 16 bytes, and stages that shared memory has room for."""
    depth = min(tile.block_k // (2 if itemsize == 4 and tile.block_m >= 64 else 1), codes.unit)
    width = max(tile.block_n, STEP_NBYTES * tile.num_warps // 4 // depth) if wide else tile.block_n
    stage = depth * (tile.block_m * itemsize * codes.planes + width)
    stages = (limit - depth * width * max(2, codes.dtype.itemsize)) // stage
    return replace(tile, block_k=depth, block_n=width, num_stages=max(1, min(tile.num_stages, stages)))


def _few_rows(height: int, codes: Codes, arch: int) -> tuple[GemmTile, int]:
    """(tile, parts of k) for so few rows that each weight is multiplied by one after the other, 16 bytes at a time."""
    depth = max(codes.unit, min(WIDEST_UNIT, power_of_two(codes.nbytes)))
    loads = 4 if codes.planes == 1 else 1 if height > 2 or codes.planes > 2 else 2  # for which there are registers
    tile = GemmTile(height, STEP_NBYTES * loads // depth, depth, 4, 3)
    programs = -(-codes.columns // tile.block_n)
    gpu = gpu_of(arch)
    fitting = [s for s in SPLITS if programs * s <= 2 * gpu.processors and 2 * s * depth <= codes.nbytes]
    return tile, max(fitting, default=1)

"""Products with narrow weights: which weights kernels read as they are, how these lie in memory, and the tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_engine.gpu.epilogues import is_heavy
from gpu_engine.gpu.gemm import FACTORS, FEW, factor_of
from gpu_engine.gpu.gemm_kernels import Factor, Product, emit_product
from gpu_engine.gpu.gemm_steps import Step, dot_step
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.narrow_kernels import MAGIC, Codes, Rows
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.gpu.tiles import GPUS, SPLITS, Choice, Extents, GemmTile, choose
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
        and is_integer(codes.dtype)
        and codes.constant is not None
        and codes.constant.size > 0
        and (op.epilogue is None or is_printable(op.epilogue))
    )


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
    reads = tuple(part.buffer for part in (codes.scale, codes.zero) if isinstance(part, Rows))
    product = Product(
        a, unused, rows, shape[-1], codes.nbytes, shape, len(shape) - 1, root, operands, outputs[0], dtype,
        name="narrow_gemm", reads=reads,
    )  # fmt: skip
    heavy = is_heavy(root)
    for choice, step, turned in _choices(options, (dtype, factor_dtype), codes, rows, heavy=heavy):
        loop = codes.write_turned_loop if turned else codes.write_loop
        emit_product(lowering, replace(product, loop=loop), step, choice)
    return True


def packed(lowering: Lowering, op: NarrowMatMul, arrays: Sequence[Array], factor_dtype: DType) -> Codes:
    """The weights as kernels read them, and constants that hold them."""
    values, *parts = arrays
    bits = bits_of(values.dtype)
    low = int(limits(values.dtype)[0])
    matrix = values if op.product.transpose_b else values.T
    columns, depth = matrix.shape
    block, (scale, *zeros) = _blocks(op, parts, columns)
    unit = _unit(block, depth * bits // 8)
    nbytes = -(-depth * bits // (8 * unit)) * unit
    whole = np.zeros((columns, nbytes * 8 // bits), UINT8)
    whole[:, :depth] = matrix.astype(np.int16) - low
    planes = whole.reshape(columns, 8 // bits, nbytes)
    joined = planes[:, 0].copy()
    for plane in range(1, 8 // bits):
        joined |= planes[:, plane] << (plane * bits)
    lines = -(-nbytes * (8 // bits) // block) if block else 1
    zero, real = _zero(zeros[0] if zeros else np.zeros((1, 1), values.dtype), low)
    held = [_rows(lowering, part, block, lines) if isinstance(part, np.ndarray) else part for part in (scale, zero)]
    exact = op.weights.dtype == factor_dtype == scale.dtype and MAGIC[factor_dtype][3] >= bits and not real
    return Codes(
        lowering.constant(joined), bits, nbytes, depth, columns, unit, held[0], held[1],
        factor_dtype if exact else FLOAT32, op.weights.dtype,
    )  # fmt: skip


def _blocks(op: NarrowMatMul, parts: Sequence[Array], columns: int) -> tuple[int, list[Array]]:
    """(how many of k share a row, 0 for all; scales and zero points as [rows, n or 1])."""
    weights, along_k = op.weights, 1 if op.product.transpose_b else 0
    spread = []
    for part in parts:
        if weights.block and weights.axis != along_k:
            part = np.repeat(part, weights.block, weights.axis)
            part = part[:columns] if weights.axis == 0 else part[:, :columns]
        matrix = part.reshape((1,) * (2 - part.ndim) + part.shape)
        spread.append(matrix.T if op.product.transpose_b else matrix)
    own = weights.block if weights.block and weights.axis == along_k else 1
    return (own if any(len(part) > 1 for part in spread) else 0), spread


def _zero(zeros: Array, low: int) -> tuple[int | Array, bool]:
    """(zero points of codes counted from `low`: one for all, bytes, or float32; whether they are floats)."""
    first = zeros.ravel()[0]
    same = bool((zeros == first).all()) and float(first).is_integer() and abs(float(first)) < 256
    if same:
        return int(first) - low, False
    if is_float(zeros.dtype):
        return zeros.astype(np.float32) - low, True
    return (zeros.astype(np.int16) - low).astype(np.uint8), False


def _rows(lowering: Lowering, part: Array, block: int, lines: int) -> Rows:
    """Scales or zero points [rows, n or 1] in a constant of as many rows as steps may reach."""
    whole = np.ascontiguousarray(np.pad(part, ((0, lines - len(part)), (0, 0)), "edge") if len(part) > 1 else part)
    return Rows(lowering.constant(whole), block if len(part) > 1 else 0, part.shape[1] > 1)


def _unit(block: int, nbytes: int) -> int:
    """Bytes along k of the largest step: within one block, if blocks are not too small, and within the weights."""
    widest = min(WIDEST_UNIT, max(NARROWEST_UNIT, power_of_two(nbytes)))
    within = block & -block
    return min(widest, within) if within >= NARROWEST_UNIT else widest


def _choices(
    options: GpuOptions, kinds: tuple[DType, DType], codes: Codes, rows: Dim, *, heavy: bool
) -> Iterator[tuple[Choice, Step, bool]]:  # fmt: skip
    """(tile, how a step multiplies, whether that wants b as [n, k]) for every range of rows."""
    dtype, factor_dtype = kinds
    few = dtype == FLOAT32 and options.precision == "fp32"
    if few:
        yield _few_rows(rows, codes, options.arch), sum_step(codes.dtype), True
    if few and isinstance(rows, int) and rows <= FEW:
        return
    name = {"fp32": "ieee", "tf32": "tf32"}.get(options.precision, "") if dtype == FLOAT32 else ""
    step = dot_step(FLOAT32, factor_dtype, (dtype, codes.dtype), name or "ieee")
    extents = Extents(1, rows, codes.columns, codes.nbytes, dtype.itemsize)
    for choice in choose("narrow_ieee" if few else "narrow", extents, options.arch, heavy=heavy):
        least = max(choice.least, FEW + 1) if few else choice.least
        tile = replace(choice.tile, block_k=min(choice.tile.block_k, codes.unit))
        yield choice._replace(least=least, tile=tile), step, False


def _few_rows(rows: Dim, codes: Codes, arch: int) -> Choice:
    """Up to FEW rows, each weight times each of them: as many bytes of k as a block allows, side by side."""
    height = power_of_two(rows) if isinstance(rows, int) and rows < FEW else FEW
    tile = GemmTile(height, STEP_NBYTES // codes.unit, codes.unit, 4, 4)
    programs = -(-codes.columns // tile.block_n)
    gpu = GPUS[max(found for found in GPUS if found <= arch)]
    fitting = [s for s in SPLITS if s == 1 or (programs * s <= 2 * gpu.processors and 4 * s * codes.unit <= codes.nbytes)]
    return Choice(1, FEW + 1, tile, max(fitting))


def sum_step(weights: DType) -> Step:
    """Products of float32 one by one, for b as [BLOCK_N, BLOCK_K]."""
    b = "b" if weights == FLOAT32 else "b.to(tl.float32)"

    def start(text: KernelText, tile: GemmTile) -> None:
        text.line(f"acc = tl.zeros(({tile.block_m}, {tile.block_n}, {tile.block_k}), tl.float32)")

    def add(text: KernelText) -> None:
        text.line(f"acc += a[:, None, :] * {b}[None, :, :]")

    return Step("few", FLOAT32, start, add, "tl.sum(acc, 2)", ("0.0", "0.0"))

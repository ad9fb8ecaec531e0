"""MatMul as native steps: what is packed when, which axes are rows and which are batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cpu_fallback import packing
from cpu_fallback.caches import caches
from cpu_fallback.calls import Address, Array, Native, Word
from cpu_fallback.cores import usable_cores
from cpu_fallback.dots import MOST_ROWS, Dots
from cpu_fallback.gemm_driver import BLOCK_TILES, FEW_PANELS, PACKED, PLAIN, TRANSPOSED, Driver
from cpu_fallback.gemm_kernels import GemmKernel
from cpu_fallback.lanes import COMPUTED, is_supported
from cpu_fallback.linear import lower_matmul
from cpu_fallback.loops import BROADCAST, CONTIGUOUS, STRIDED
from cpu_fallback.maps import (
    Shape,
    broadcast_strides,
    collapsed,
    compacted,
    contiguous_strides,
    map_call,
    operand_dtypes,
)
from cpu_fallback.native import Target, host
from cpu_fallback.tiles import TileShape, tile_shape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType, compute_dtype, is_float
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
PAGE = 4096


@dataclass(frozen=True)
class Matrix:
    """A matrix in memory: strides over the batch axes, over rows and over columns. Panels have only the first."""

    buffer: int
    lead: Shape
    row: Dim
    column: Dim


@dataclass(frozen=True)
class Operand:
    """The result or an operand of the epilogue: its buffer, bytes of an element, strides in elements over all axes."""

    buffer: int
    nbytes: int
    strides: Shape


@dataclass(frozen=True)
class Product:
    """A product before its axes are arranged: `shape` is that of the result, `depth` the extent that is summed over.

    `operands` are the result, then those of the epilogue; strides are in elements.
    """

    root: Expr
    dtype: DType
    tile: TileShape
    form: str
    a: Matrix
    b: Matrix
    shape: Shape
    depth: Dim
    operands: Sequence[Operand]


def lower_gemm(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A native product where there is one, else NumPy's."""
    found = emit_product(lowering, op, node, inputs, outputs, host())
    return found or lower_matmul(lowering, op, node, inputs, outputs)


def emit_product(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of a native product of floats; False if it has no native form."""
    product = op.accumulate or node.inputs[0].dtype
    root, used = compacted(op.epilogue or expr.arg(0, product))
    dtype = compute_dtype(product)
    if not is_float(product) or COMPUTED.get(dtype) not in ("float", "double") or used[:1] != (0,):
        return False
    converts = [is_supported(expr.cast(expr.arg(0, value.dtype), dtype), target) for value in node.inputs[:2]]
    if not is_supported(root, target) or not all(converts):
        return False
    result, tile = node.outputs[0], tile_shape(target, COMPUTED[dtype])
    operands = [Operand(outputs[0], root.dtype.itemsize, contiguous_strides(result.shape))]
    for position, kind in zip(used[1:], operand_dtypes(root)[1:], strict=True):
        strides = broadcast_strides(node.inputs[1 + position].shape, result.shape)
        operands.append(Operand(inputs[1 + position], kind.itemsize, strides))
    a, b, form = _factors(lowering, op, node, inputs, tile, dtype)
    depth = node.inputs[0].shape[-2 if op.transpose_a else -1]
    _emit(lowering, Product(root, dtype, tile, form, a, b, result.shape, depth, operands))
    return True


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
    array = _oriented(known, transposed).astype(dtype)
    if array.shape[-1] * dtype.itemsize % PAGE == 0:
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 64 // dtype.itemsize)])
    *lead, row, column = broadcast_strides(array.shape, (*batch, *array.shape[-2:]))
    return Matrix(lowering.constant(array), tuple(lead), row, column)


def _oriented(array: Array, transposed: bool) -> Array:
    return array.swapaxes(-1, -2) if transposed else array


@dataclass(frozen=True)
class Arranged:
    """A product as the kernel computes it: m rows and n columns for every point of the batch axes; strides in bytes."""

    m: Dim
    n: Dim
    batch: Shape
    form: str
    a: Matrix
    b: Matrix
    operands: Sequence[Matrix]


def _arranged(product: Product) -> Arranged:
    """Batch axes that A and the result walk like rows, and B does not walk, become rows. One column becomes a row."""
    streams = [(*product.a.lead, product.a.row), (*product.b.lead, 0)]
    streams += [operand.strides[:-1] for operand in product.operands]
    axes = collapsed(product.shape[:-1], streams)
    m, rows = axes.pop() if axes and axes[-1][1][1] == 0 else (1, [0] * len(streams))
    size = product.dtype.itemsize

    def lead(i: int, nbytes: int) -> Shape:
        return tuple(strides[i] * nbytes for _, strides in axes)

    a = Matrix(product.a.buffer, lead(0, size), rows[0] * size, product.a.column * size)
    b = Matrix(product.b.buffer, lead(1, size), product.b.row * size, product.b.column * size)
    operands = [
        Matrix(operand.buffer, lead(i, operand.nbytes), rows[i] * operand.nbytes, operand.strides[-1] * operand.nbytes)
        for i, operand in enumerate(product.operands, 2)
    ]
    batch = tuple(extent for extent, _ in axes)
    if product.form == PACKED or product.shape[-1] != 1:
        return Arranged(m, product.shape[-1], batch, product.form, a, b, operands)
    turned = [Matrix(x.buffer, x.lead, x.column, x.row) for x in (b, a, *operands)]
    return Arranged(1, m, batch, PLAIN if turned[1].column == size else TRANSPOSED, turned[0], turned[1], turned[2:])


def _emit(lowering: Lowering, product: Product) -> None:
    found, size = _arranged(product), product.dtype.itemsize
    batches = dims.product(found.batch)
    sizes = [operand.nbytes for operand in product.operands]
    accesses = tuple(
        BROADCAST if operand.column == 0 else CONTIGUOUS if operand.column == nbytes else STRIDED
        for operand, nbytes in zip(found.operands[1:], sizes[1:], strict=True)
    )
    few = isinstance(found.m, int) and 1 <= found.m <= MOST_ROWS
    rows: tuple[int, ...] = ()
    vectors: tuple[int, ...] = ()
    scratch: Buffers = ()
    room: tuple[Dim, ...] = ()
    driver: Driver | Dots
    if found.form == TRANSPOSED and few and found.a.column == size:
        driver = Dots(product.dtype, dims.number(found.m), len(found.batch))
    else:
        rows, vectors = _heights(found.m, product.tile), tile_widths(found.n, product.tile)
        packs = _packs(found.m, found.n, product.tile)
        driver = Driver(product.dtype, found.form, packs, len(found.batch), sizes[0], caches())
        scratch, room = _scratch(lowering, product, found, packs)
    line = found.b.column if found.form == TRANSPOSED else found.b.row
    kernel = GemmKernel(driver, rows, vectors, expr.text(product.root), accesses, product.root)
    result, *extras = found.operands
    words: list[Word] = [Address(buffer) for buffer in (found.a.buffer, found.b.buffer, result.buffer, *scratch)]
    words += [found.m, found.n, product.depth, found.a.row, found.a.column, line, *room, batches, *found.batch[1:]]
    words += [*found.a.lead, *found.b.lead, *result.lead]
    words += [Address(extra.buffer) for extra in extras]
    words += [stride for extra in extras for stride in extra.lead]
    words += [extra.row for extra in extras]
    words += [extra.column for extra, access in zip(extras, accesses, strict=True) if access == STRIDED]
    inputs = (product.a.buffer, product.b.buffer, *(extra.buffer for extra in extras))
    in_place = tuple(
        2 + i
        for i, operand in enumerate(product.operands[1:])
        if operand.strides == product.operands[0].strides and sizes[1 + i] == sizes[0]
    )  # fmt: skip
    lowering.emit(Native(kernel, tuple(words)), inputs, (result.buffer,), scratch=scratch, in_place=in_place)


def _scratch(
    lowering: Lowering, product: Product, found: Arranged, packs: bool
) -> tuple[Buffers, tuple[Dim, ...]]:  # fmt: skip
    """Scratch buffers, and (threads that the scratch for A has room for, bytes for each)."""
    scratch: list[int] = []
    room: tuple[Dim, ...] = ()
    depth, size = product.depth, product.dtype.itemsize
    if packs:
        tile = depth * (packing.ROWS * size)
        most = dims.minimum(tile * BLOCK_TILES[1], caches().l2 // 2)
        block = dims.maximum(tile * BLOCK_TILES[0], most)
        nbytes = dims.minimum(block, dims.ceil_div(found.m, product.tile.rows) * tile)
        room = (thread_limit(), nbytes)
        scratch.append(lowering.buffer(product.dtype, (room[0], dims.floor_div(nbytes, size))))
    if found.form != PACKED:
        columns = packing.padded(found.n, product.tile.lanes)
        scratch.append(lowering.buffer(product.dtype, (dims.product(found.batch), depth, columns)))
    return tuple(scratch), room


@lru_cache(maxsize=1)
def thread_limit() -> int:
    """No stream has more threads than these."""
    return len(usable_cores().numbers)


def _heights(m: Dim, shape: TileShape) -> tuple[int, ...]:
    if not isinstance(m, int):
        return tuple(range(1, shape.rows + 1))
    return tuple(sorted({count for count in (min(m, shape.rows), m % shape.rows) if count}))


def tile_widths(n: Dim, shape: TileShape) -> tuple[int, ...]:
    """The vectors that panels of n columns can have."""
    if not isinstance(n, int):
        return tuple(range(1, shape.vectors + 1))
    return tuple(sorted(set(packing.panel_widths(n, shape))))


def _packs(m: Dim, n: Dim, shape: TileShape) -> bool:
    few = isinstance(n, int) and len(packing.panel_widths(n, shape)) < FEW_PANELS
    return not few and not (isinstance(m, int) and m <= shape.rows)

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
from cpu_fallback.gemm_driver import BLOCK_TILES, FEW_PANELS, PACKED, PLAIN, TRANSPOSED, Driver
from cpu_fallback.gemm_kernels import GemmKernel
from cpu_fallback.lanes import COMPUTED, is_supported
from cpu_fallback.linear import lower_matmul
from cpu_fallback.loops import STRIDED
from cpu_fallback.maps import (
    Shape,
    broadcast_strides,
    collapsed,
    compacted,
    contiguous_strides,
    inner_access,
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
class Operand:
    """A factor as the kernel reads it: strides in elements over the batch axes and over its last two axes."""

    buffer: int
    lead: Shape
    outer: Dim
    inner: Dim


def lower_gemm(lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A native product where there is one, else NumPy's."""
    return emit_product(lowering, op, node, inputs, outputs, host()) or lower_matmul(
        lowering, op, node, inputs, outputs
    )


def emit_product(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of a native product of floats; False if it has no native form."""
    product = op.accumulate or node.inputs[0].dtype
    root, used = compacted(op.epilogue or expr.arg(0, product))
    computed = compute_dtype(product)
    if not is_float(product) or COMPUTED.get(computed) not in ("float", "double") or used[:1] != (0,):
        return False
    if not is_supported(root, target) or not all(_converts(value.dtype, computed, target) for value in node.inputs[:2]):
        return False
    shape = tile_shape(target, COMPUTED[computed])
    batch = node.outputs[0].shape[:-2]
    known_a, known_b = (node.inputs[i].constant for i in (0, 1))
    if known_b is None and known_a is not None:
        a = _constant_rows(lowering, known_a, op.transpose_a, batch, computed)
    else:
        a = _operand(lowering, node.inputs[0].shape, inputs[0], op.transpose_a, batch, computed)
    if known_b is not None:
        b, form = _constant_panels(lowering, known_b, op.transpose_b, batch, shape, computed), PACKED
    else:
        b = _operand(lowering, node.inputs[1].shape, inputs[1], False, batch, computed)
        form = TRANSPOSED if op.transpose_b else PLAIN
    extras = [(inputs[1 + i], node.inputs[1 + i].shape) for i in used[1:]]
    depth = node.inputs[0].shape[-2 if op.transpose_a else -1]
    _emit(lowering, _Product(root, computed, form, shape, a, b, node.outputs[0].shape, depth, extras), outputs[0])
    return True


@dataclass(frozen=True)
class _Product:
    """Everything that is known of a product before it becomes a call."""

    root: Expr
    dtype: DType
    form: str
    tile: TileShape
    a: Operand
    b: Operand
    shape: Shape
    depth: Dim
    extras: Sequence[tuple[int, Shape]]


def _emit(lowering: Lowering, product: _Product, out: int) -> None:
    """Append the call. Batch axes that A and the result walk like rows, and B does not walk, become rows."""
    n, size = product.shape[-1], product.dtype.itemsize
    sizes = [size, size, product.root.dtype.itemsize, *(dtype.itemsize for dtype in operand_dtypes(product.root)[1:])]
    steps = [broadcast_strides(shape, product.shape) for _, shape in product.extras]
    streams = [
        (*product.a.lead, product.a.outer),
        (*product.b.lead, 0),
        contiguous_strides(product.shape)[:-1],
        *(step[:-1] for step in steps),
    ]
    axes = collapsed(product.shape[:-1], streams)
    m, rows = axes.pop() if axes and axes[-1][1][1] == 0 else (1, [0] * len(streams))
    accesses = tuple(inner_access(step[-1]) for step in steps)
    packs = _packs(m, n, product.tile)
    driver = Driver(product.dtype, product.form, packs, len(axes), sizes[2], caches())
    kernel = GemmKernel(
        driver, _heights(m, product.tile), _widths(n, product.tile), expr.text(product.root), accesses, product.root
    )  # fmt: skip
    batches = dims.product(extent for extent, _ in axes)
    scratch, room = _scratch(lowering, product, packs, batches, m)
    extras = [buffer for buffer, _ in product.extras]
    words: list[Word] = [Address(buffer) for buffer in (product.a.buffer, product.b.buffer, out, *scratch)]
    words += [m, n, product.depth, rows[0] * size, product.a.inner * size, product.b.outer * size, *room, batches]
    words += [extent for extent, _ in axes[1:]]
    for i in range(3):
        words += [strides[i] * sizes[i] for _, strides in axes]
    words += map(Address, extras)
    for i in range(3, len(sizes)):
        words += [strides[i] * sizes[i] for _, strides in axes]
    words += [step * nbytes for step, nbytes in zip(rows[3:], sizes[3:], strict=True)]
    for step, nbytes, access in zip(steps, sizes[3:], accesses, strict=True):
        words += [step[-1] * nbytes] * (access == STRIDED)
    in_place = tuple(
        2 + i
        for i, (_, shape) in enumerate(product.extras)
        if shape == product.shape and sizes[3 + i] == sizes[2]
    )  # fmt: skip
    inputs = (product.a.buffer, product.b.buffer, *extras)
    lowering.emit(Native(kernel, tuple(words)), inputs, (out,), scratch=scratch, in_place=in_place)


def _scratch(
    lowering: Lowering, product: _Product, packs: bool, batches: Dim, m: Dim
) -> tuple[Buffers, tuple[Dim, ...]]:
    """Scratch buffers, and (threads that the scratch for A has room for, bytes for each)."""
    scratch: list[int] = []
    room: tuple[Dim, ...] = ()
    depth, size = product.depth, product.dtype.itemsize
    if packs:
        tile = depth * (packing.ROWS * size)
        most = dims.minimum(tile * BLOCK_TILES[1], caches().l2 // 2)
        block = dims.maximum(tile * BLOCK_TILES[0], most)
        nbytes = dims.minimum(block, dims.ceil_div(m, product.tile.rows) * tile)
        room = (thread_limit(), nbytes)
        scratch.append(lowering.buffer(product.dtype, (room[0], dims.floor_div(nbytes, size))))
    if product.form != PACKED:
        columns = packing.padded(product.shape[-1], product.tile.lanes)
        scratch.append(lowering.buffer(product.dtype, (batches, depth, columns)))
    return tuple(scratch), room


@lru_cache(maxsize=1)
def thread_limit() -> int:
    """No stream has more threads than these."""
    return len(usable_cores().numbers)


def _heights(m: Dim, shape: TileShape) -> tuple[int, ...]:
    if not isinstance(m, int):
        return tuple(range(1, shape.rows + 1))
    return tuple(sorted({count for count in (min(m, shape.rows), m % shape.rows) if count}))


def _widths(n: Dim, shape: TileShape) -> tuple[int, ...]:
    if not isinstance(n, int):
        return tuple(range(1, shape.vectors + 1))
    return tuple(sorted(set(packing.panel_widths(n, shape))))


def _packs(m: Dim, n: Dim, shape: TileShape) -> bool:
    few = isinstance(n, int) and len(packing.panel_widths(n, shape)) < FEW_PANELS
    return not few and not (isinstance(m, int) and m <= shape.rows)


def _converts(dtype: DType, computed: DType, target: Target) -> bool:
    return is_supported(expr.cast(expr.arg(0, dtype), computed), target)


def _operand(
    lowering: Lowering, own: Shape, buffer: int, transposed: bool, batch: Shape, computed: DType
) -> Operand:  # fmt: skip
    """A factor in memory, converted first if it is of another type."""
    if (dtype := lowering.buffers[buffer].dtype) != computed:
        wide = lowering.buffer(computed, own)
        found = map_call(expr.cast(expr.arg(0, dtype), computed), [(buffer, own)], wide, own)
        assert found is not None
        lowering.emit(found[0], (buffer,), (wide,))
        buffer = wide
    *lead, outer, inner = broadcast_strides(own, (*batch, *own[-2:]))
    return Operand(buffer, tuple(lead), *((inner, outer) if transposed else (outer, inner)))


def _constant_rows(
    lowering: Lowering, known: Array, transposed: bool, batch: Shape, computed: DType
) -> Operand:  # fmt: skip
    """A constant A by rows, which are set apart where they would lie whole pages apart: caches could not hold many."""
    array = _oriented(known, transposed).astype(computed)
    if array.shape[-1] * computed.itemsize % PAGE == 0:
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 64 // computed.itemsize)])
    *lead, outer, inner = broadcast_strides(array.shape, (*batch, *array.shape[-2:]))
    return Operand(lowering.constant(array), tuple(lead), outer, inner)


def _constant_panels(
    lowering: Lowering, known: Array, transposed: bool, batch: Shape, shape: TileShape, computed: DType
) -> Operand:  # fmt: skip
    packed = packing.pack_panels(_oriented(known, transposed), shape, computed)
    *lead, _ = broadcast_strides(packed.shape, (*batch, packed.shape[-1]))
    return Operand(lowering.constant(packed), tuple(lead), 0, 0)


def _oriented(array: Array, transposed: bool) -> Array:
    return array.swapaxes(-1, -2) if transposed else array

"""Products arranged for the kernel: which axes are rows and which are batches, argument words, scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cpu_fallback import packing
from cpu_fallback.caches import caches
from cpu_fallback.calls import Native
from cpu_fallback.cores import usable_cores
from cpu_fallback.dots import MOST_ROWS, Dots
from cpu_fallback.gemm_driver import BLOCK_TILES, FEW_COLUMNS, PACKED, PLAIN, TRANSPOSED, Driver
from cpu_fallback.gemm_kernels import GemmKernel
from cpu_fallback.loops import BROADCAST, CONTIGUOUS, STRIDED
from cpu_fallback.tiles import TileShape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape, collapsed
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word

Buffers = tuple[int, ...]


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

    `operands` are the result, then those of the epilogue; strides are in elements, of which one of A has `a_nbytes`.
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
    a_nbytes: int


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

    a_size = product.a_nbytes
    a = Matrix(product.a.buffer, lead(0, a_size), rows[0] * a_size, product.a.column * a_size)
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


def emit_call(lowering: Lowering, product: Product) -> None:
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
        packs = _packs(found.m, found.n, product.tile, found.a.column == size)
        driver = Driver(
            product.dtype, found.form, packs, len(found.batch), sizes[0], caches(), product.tile.terms
        )  # fmt: skip
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


def _packs(m: Dim, n: Dim, shape: TileShape, along: bool) -> bool:
    """Whether blocks of A may be worth packing; `along` its rows are contiguous."""
    few = isinstance(n, int) and n < FEW_COLUMNS[along]
    return not few and not (isinstance(m, int) and m <= shape.rows)

"""Kernels of matrix products: tiles of sums in registers, what is summed over in steps, the epilogue on the sums.

Programs of tiles that share columns follow each other, `group_m` rows of tiles at a time, so that factors are found in
the L2 cache. Where tiles are too few for a GPU what is summed over is cut into parts, each a program of its own; the
last of a tile's to arrive adds them up, always in the same order, and applies the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_engine.gpu.epilogues import Walk, finish, inside, number, place, widest
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import computing
from gpu_engine.gpu.split_sums import last_part, shared_buffers
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.tiles import Choice, GemmTile
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering


@dataclass(frozen=True)
class Factor:
    """A buffer as a factor: strides in elements along the batch axes, along m or n, and along k."""

    buffer: int
    batch: tuple[Dim, ...]
    outer: Dim
    inner: Dim


@dataclass(frozen=True)
class Product:
    """[batch..., m, k] times [batch..., k, n], and the epilogue `root` of the sums and of `operands`.

    `shape` is that of the result and `rows` how many of its axes, the last but one and those before, m counts; the last
    is n, and those before the rows are the batch; or `walked` are the axes of the batch, of m and of n. `dtype` is that
    of the product, which the sums are converted to. `loop` writes the lines that add up the steps of k from `low` to
    `high`, for factors that have no strides; it may read the buffers `reads` besides.
    """

    a: Factor
    b: Factor
    m: Dim
    n: Dim
    k: Dim
    shape: Shape
    rows: int
    root: Expr
    operands: tuple[Walked, ...]
    out: int
    dtype: DType
    walked: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    loop: Loop | None = None
    name: str = "gemm"
    reads: tuple[int, ...] = ()

    @property
    def batch(self) -> Shape:
        return tuple(self.shape[axis] for axis in self.axes[0])

    @property
    def read(self) -> tuple[int, ...]:
        """The buffers of the operands that the epilogue reads."""
        used = {node.value for node in expr.walk(self.root) if node.op == "arg"}
        return tuple(self.operands[i - 1].buffer for i in sorted(used - {0}))

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Positions of the axes of the batch, of m and of n."""
        if self.walked is not None:
            return self.walked
        rank, lead = len(self.shape), len(self.shape) - 1 - self.rows
        return tuple(range(lead)), tuple(range(lead, rank - 1)), (rank - 1,)


Loop = Callable[[KernelText, Product, Step, GemmTile, int], None]
"""loop(text, product, step, tile, splits)"""


def emit_product(lowering: Lowering, product: Product, step: Step, choice: Choice) -> None:
    """Launch the kernels that compute a product while m is in the choice's range."""
    share = selected(product.m, choice)
    if share == 0:
        return
    tile, programs = choice.tile, _programs(product, choice.tile) * share
    buffers = (product.a.buffer, product.b.buffer, product.out, *(operand.buffer for operand in product.operands))
    text = KernelText(lowering, f"{product.name}_{step.name}", widest=widest(lowering, buffers))
    walks = _write_sums(text, product, step, choice)
    if choice.splits == 1:
        write_result(text, product, walks, _block(tile))
        _launch(text, product, choice, programs)
        return
    block = (tile.block_m, tile.block_n)
    parts, counters = shared_buffers(lowering, step.sums, programs, choice.splits, block)
    with last_part(text, parts, counters, block, inside(walks)):
        write_result(text, product, walks, _block(tile))
    _launch(text, product, choice, programs, (parts, counters), (counters,))


def _whole(text: KernelText, buffer: int, walks: Sequence[Walk], shape: Shape, block: str) -> tuple[str, str | None]:
    """(place, mask) of a tile of extents `block` in a contiguous buffer, also along axes of one element."""
    with text.apart("out"):
        where, _ = place(text, Walked(buffer, contiguous_strides(shape)), walks, shape)
    return f"{where} + tl.zeros({block}, tl.int32)", inside(walks)


def _block(tile: GemmTile) -> str:
    return f"({tile.block_m}, {tile.block_n})"


def write_result(text: KernelText, product: Product, walks: Sequence[Walk], block: str) -> None:
    """The epilogue of `sums`, and where it goes."""
    result = write_epilogue(text, product, walks, block)
    where, mask = _whole(text, product.out, walks, product.shape, block)
    text.store(product.out, where, result, mask)


def write_epilogue(text: KernelText, product: Product, walks: Sequence[Walk], block: str) -> str:
    """Lines of the epilogue of `sums`; its value, a whole block in computing form."""
    value = text.let("value", f"sums.to({computing(product.dtype)})")
    result = finish(text, product.root, value, product.operands, walks, product.shape)
    return f"tl.broadcast_to({result}, {block})"


def selected(m: Dim, choice: Choice) -> Dim:
    """1 while m is in the choice's range, else 0."""
    reached = dims.minimum(1, dims.floor_div(m, choice.least)) if choice.least > 1 else 1
    passed = 0 if choice.end is None else dims.minimum(1, dims.floor_div(m, choice.end))
    return reached - passed


def _programs(product: Product, tile: GemmTile) -> Dim:
    """How many tiles there are."""
    tiles = dims.ceil_div(product.m, tile.block_m) * dims.ceil_div(product.n, tile.block_n)
    return tiles * dims.product(product.batch)


def _launch(
    text: KernelText,
    product: Product,
    choice: Choice,
    programs: Dim,
    scratch: tuple[int, ...] = (),
    zeroed: tuple[int, ...] = (),
) -> None:
    reads, tile = (product.a.buffer, product.b.buffer, *product.reads, *product.read), choice.tile
    text.launch(
        (programs, choice.splits), reads, (product.out,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        scratch=scratch, zeroed=zeroed,
    )  # fmt: skip


def _write_sums(text: KernelText, product: Product, step: Step, choice: Choice) -> list[Walk]:
    """Lines that leave the sums of a program's tile in `sums`; the walks of the batch, the rows, the columns."""
    tile = choice.tile
    write_place(text, product, tile, "tl.program_id(0)")
    walks = write_walks(text, product, tile, 0, tile.block_n)
    _write_span(text, product.k, tile.block_k, choice.splits)
    step.start(text, tile)
    (product.loop or _write_loop)(text, product, step, tile, choice.splits)
    text.line(f"sums = {step.total}")
    return walks


def _fills_rows(product: Product, tile: GemmTile) -> bool:
    """Whether no tile has rows outside, known of numbers alone: masks of rows are cheap, and kernels fewer."""
    return isinstance(product.m, int) and is_multiple(product.m, tile.block_m)


def row_count(text: KernelText, product: Product) -> str:
    """m; what divides it matters only where rows are neighbours in memory."""
    with text.apart("m"):
        aligned = 1 in (product.a.outer, product.n)
        return number(text, product.m) if aligned else text.parameter(product.m, hint=False)


def column_count(text: KernelText, product: Product) -> str:
    """n."""
    with text.apart("n"):
        return number(text, product.n)


def clamped_lines(text: KernelText, product: Product, tile: GemmTile) -> tuple[str, str]:
    """(rows, columns) modulo m and n: a line outside repeats one inside, since what it loads is never stored."""
    rows = "rows" if _fills_rows(product, tile) else f"rows % {row_count(text, product)}"
    columns = "columns" if is_multiple(product.n, tile.block_n) else f"columns % {column_count(text, product)}"
    return rows, columns


def write_place(text: KernelText, product: Product, tile: GemmTile, place: str) -> None:
    """`batch`, and where the tile with the number `place` lies: `down` and `across` in tiles."""
    down, across = tile_counts(text, product, tile)
    text.line(f"place = {place}")
    if product.batch:
        text.line(f"batch = place // ({down} * {across})")
        text.line(f"place = place % ({down} * {across})")
    text.line(f"group = place // ({across} * {tile.group_m})")
    text.line(f"place = place % ({across} * {tile.group_m})")
    text.line(f"height = tl.minimum({down} - group * {tile.group_m}, {tile.group_m})")
    text.line(f"down, across = group * {tile.group_m} + place % height, place // height")


def tile_counts(text: KernelText, product: Product, tile: GemmTile) -> tuple[str, str]:
    """How many tiles lie below each other, and side by side."""
    with text.apart("tiles"):
        down, across = (
            text.parameter(dims.ceil_div(extent, block), hint=False)
            for extent, block in ((product.m, tile.block_m), (product.n, tile.block_n))
        )
    return down, across


def write_walks(text: KernelText, product: Product, tile: GemmTile, first: int, width: int) -> list[Walk]:
    """`rows` of a tile, `width` of its `columns` from the `first` on; the walks of the batch, the rows, the columns."""
    text.line(f"rows = down * {tile.block_m} + tl.arange(0, {tile.block_m})")
    text.line(f"columns = across * {tile.block_n} + {f'{first} + ' * (first > 0)}tl.arange(0, {width})")
    batch, rows, columns = product.axes
    masks: list[str | None] = [None, None]
    if not _fills_rows(product, tile):
        masks[0] = text.let("inside", f"rows[:, None] < {row_count(text, product)}")
    if not is_multiple(product.n, tile.block_n):
        masks[1] = text.let("inside", f"columns[None, :] < {column_count(text, product)}")
    return [Walk("batch", batch), Walk("rows[:, None]", rows, masks[0]), Walk("columns[None, :]", columns, masks[1])]


def _write_span(text: KernelText, k: Dim, block: int, splits: int) -> None:
    """`low` and `high`: what of k a program adds up, in whole steps but for the last part."""
    with text.apart("span"):
        whole = number(text, k)
        if splits == 1:
            text.line(f"low, high = 0, {whole}")
            return
        part = number(text, dims.ceil_div(dims.ceil_div(k, splits), block) * block)
    text.line(f"low = tl.minimum(tl.program_id(1) * {part}, {whole})")
    text.line(f"high = tl.minimum(low + {part}, {whole})")


def _write_loop(text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
    a, b, block = product.a, product.b, tile.block_k
    rows, columns = clamped_lines(text, product, tile)
    text.line(f"steps = tl.arange(0, {block})")
    with text.apart("a"):
        text.line(f"a_at = {_steps(text, f'({rows})[:, None]', a.outer)} + {_steps(text, 'steps[None, :]', a.inner)}")
    with text.apart("b"):
        text.line(
            f"b_at = {_steps(text, 'steps[:, None]', b.inner)} + {_steps(text, f'({columns})[None, :]', b.outer)}"
        )
    for name, factor in (("a", a), ("b", b)):
        with text.apart(name):
            start = place(text, Walked(factor.buffer, factor.batch), [Walk("batch", product.axes[0])], product.batch)[0]
            first = "" if splits == 1 else f" + {_steps(text, 'low', factor.inner)}"
            text.line(f"{name}_from = {text.buffer(factor.buffer)} + ({start}){first}")
    even = is_multiple(product.k, block)
    with text.block(f"for k in range(low, high, {block}):"):
        masks = ["", ""] if even else [
            f", mask=steps{axes} < high - k, other={other}"
            for axes, other in zip(("[None, :]", "[:, None]"), step.others, strict=True)
        ]  # fmt: skip
        for name, factor, mask in (("a", a, masks[0]), ("b", b, masks[1])):
            with text.apart(name):
                text.line(f"{name} = tl.load({name}_from + {name}_at{mask})")
                text.line(f"{name}_from += {_steps(text, str(block), factor.inner)}")
        step.add(text)


def _steps(text: KernelText, index: str, stride: Dim) -> str:
    return index if stride == 1 else f"{index} * {number(text, stride)}"

"""Kernels of matrix products: tiles of sums in registers, what is summed over in steps, the epilogue on the sums.

Programs of tiles that share columns follow each other, `group_m` rows of tiles at a time, so that factors are found in
the L2 cache. Where tiles are too few for a GPU what is summed over is cut into parts: partial sums go to scratch, and
a second kernel adds them, always in the same order, and applies the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_engine.gpu.epilogues import Walk, finish, inside, number, place
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import computing
from gpu_engine.gpu.text import KernelText, power_of_two
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
    share = _selected(product.m, choice)
    if share == 0:
        return
    used = {node.value for node in expr.walk(product.root) if node.op == "arg"}
    operands = tuple(product.operands[i - 1].buffer for i in sorted(used - {0}))
    factors = (product.a.buffer, product.b.buffer, *product.reads)
    text = KernelText(lowering, f"{product.name}_{step.name}")
    walks = _write_sums(text, product, step, choice)
    if choice.splits == 1:
        _write_result(text, product, walks, _block(choice.tile))
        _launch(text, product, choice, share, (*factors, *operands), (product.out,))
        return
    partial = lowering.buffer(step.sums, (choice.splits * share, *product.shape))
    where, mask = _whole(text, partial, walks, product.shape, _block(choice.tile))
    text.store(partial, f"tl.program_id(1) * {number(text, dims.product(product.shape))} + {where}", "sums", mask)
    _launch(text, product, choice, share, factors, (partial,))
    _emit_total(lowering, product, step, partial, choice.splits, share, operands)


def _whole(text: KernelText, buffer: int, walks: Sequence[Walk], shape: Shape, block: str) -> tuple[str, str | None]:
    """(place, mask) of a tile of extents `block` in a contiguous buffer, also along axes of one element."""
    where, _ = place(text, Walked(buffer, contiguous_strides(shape)), walks, shape)
    return f"{where} + tl.zeros({block}, tl.int32)", inside(walks)


def _block(tile: GemmTile) -> str:
    return f"({tile.block_m}, {tile.block_n})"


def _write_result(text: KernelText, product: Product, walks: Sequence[Walk], block: str) -> None:
    """The epilogue of `sums`, and where it goes."""
    kind = computing(product.dtype)
    text.line(f"sums = sums.to({kind})")
    result = finish(text, product.root, "sums", product.operands, walks, product.shape)
    where, mask = _whole(text, product.out, walks, product.shape, block)
    text.store(product.out, where, f"tl.broadcast_to({result}, {block})", mask)


def _selected(m: Dim, choice: Choice) -> Dim:
    """1 while m is in the choice's range, else 0."""
    reached = dims.minimum(1, dims.floor_div(m, choice.least)) if choice.least > 1 else 1
    passed = 0 if choice.end is None else dims.minimum(1, dims.floor_div(m, choice.end))
    return reached - passed


def _launch(
    text: KernelText, product: Product, choice: Choice, share: Dim, reads: tuple[int, ...], writes: tuple[int, ...]
) -> None:  # fmt: skip
    tile = choice.tile
    tiles = dims.ceil_div(product.m, tile.block_m) * dims.ceil_div(product.n, tile.block_n)
    grid = (tiles * dims.product(product.batch) * share, choice.splits)
    text.launch(grid, reads, writes, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _write_sums(text: KernelText, product: Product, step: Step, choice: Choice) -> list[Walk]:
    """Lines that leave the sums of a program's tile in `sums`; the walks of the batch, the rows, the columns."""
    tile = choice.tile
    _write_place(text, product, tile)
    batch, rows, columns = product.axes
    walks = [
        Walk("batch", batch),
        Walk("rows[:, None]", rows, _edge(text, "rows[:, None]", product.m, tile.block_m)),
        Walk("columns[None, :]", columns, _edge(text, "columns[None, :]", product.n, tile.block_n)),
    ]
    _write_span(text, product.k, tile.block_k, choice.splits)
    step.start(text, tile)
    (product.loop or _write_loop)(text, product, step, tile, choice.splits)
    text.line(f"sums = {step.total}")
    return walks


def _edge(text: KernelText, index: str, extent: Dim, block: int) -> str | None:
    return None if is_multiple(extent, block) else text.let("inside", f"{index} < {number(text, extent)}")


def _write_place(text: KernelText, product: Product, tile: GemmTile) -> None:
    """`batch`, `rows` and `columns` of a program's tile."""
    down, across = dims.ceil_div(product.m, tile.block_m), dims.ceil_div(product.n, tile.block_n)
    text.line("place = tl.program_id(0)")
    if product.batch:
        text.line(f"batch = place // ({text.parameter(down)} * {text.parameter(across)})")
        text.line(f"place = place % ({text.parameter(down)} * {text.parameter(across)})")
    if down == 1:
        text.line("down, across = 0, place")
    elif across == 1:
        text.line("down, across = place, 0")
    else:
        text.line(f"group = place // ({text.parameter(across)} * {tile.group_m})")
        text.line(f"place = place % ({text.parameter(across)} * {tile.group_m})")
        text.line(f"height = tl.minimum({text.parameter(down)} - group * {tile.group_m}, {tile.group_m})")
        text.line(f"down, across = group * {tile.group_m} + place % height, place // height")
    text.line(f"rows = down * {tile.block_m} + tl.arange(0, {tile.block_m})")
    text.line(f"columns = across * {tile.block_n} + tl.arange(0, {tile.block_n})")


def _write_span(text: KernelText, k: Dim, block: int, splits: int) -> None:
    """`low` and `high`: what of k a program adds up, in whole steps but for the last part."""
    if splits == 1:
        text.line(f"low, high = 0, {number(text, k)}")
        return
    part = dims.ceil_div(dims.ceil_div(k, splits), block) * block
    text.line(f"low = tl.minimum(tl.program_id(1) * {number(text, part)}, {number(text, k)})")
    text.line(f"high = tl.minimum(low + {number(text, part)}, {number(text, k)})")


def _write_loop(text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
    """Lines are clamped into the factors by taking them modulo m and n: what they load is never stored."""
    a, b, block = product.a, product.b, tile.block_k
    rows = "rows" if is_multiple(product.m, tile.block_m) else f"rows % {number(text, product.m)}"
    columns = "columns" if is_multiple(product.n, tile.block_n) else f"columns % {number(text, product.n)}"
    text.line(f"steps = tl.arange(0, {block})")
    text.line(f"a_at = {_steps(text, f'({rows})[:, None]', a.outer)} + {_steps(text, 'steps[None, :]', a.inner)}")
    text.line(f"b_at = {_steps(text, 'steps[:, None]', b.inner)} + {_steps(text, f'({columns})[None, :]', b.outer)}")
    for name, factor in (("a", a), ("b", b)):
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
            text.line(f"{name} = tl.load({name}_from + {name}_at{mask})")
            text.line(f"{name}_from += {_steps(text, str(block), factor.inner)}")
        step.add(text)


def _steps(text: KernelText, index: str, stride: Dim) -> str:
    return index if stride == 1 else f"{index} * {number(text, stride)}"


def _emit_total(
    lowering: Lowering, product: Product, step: Step, partial: int, splits: int, share: Dim, operands: tuple[int, ...]
) -> None:  # fmt: skip
    """Launch the kernel that adds the parts and applies the epilogue."""
    text = KernelText(lowering, "gemm_total")
    (last,) = product.axes[2]
    width = min(128, power_of_two(product.n)) if isinstance(product.n, int) else 128
    height = 512 // width
    rows = dims.product(product.shape[:last])
    across = dims.ceil_div(product.n, width)
    text.line(f"rows = tl.program_id(0) // {text.parameter(across)} * {height} + tl.arange(0, {height})")
    text.line(f"columns = tl.program_id(0) % {text.parameter(across)} * {width} + tl.arange(0, {width})")
    walks = [
        Walk("rows[:, None]", tuple(range(last)), _edge(text, "rows[:, None]", rows, height)),
        Walk("columns[None, :]", (last,), _edge(text, "columns[None, :]", product.n, width)),
    ]
    block = f"({height}, {width})"
    where, mask = _whole(text, partial, walks, product.shape, block)
    apart = number(text, dims.product(product.shape))
    text.line(f"sums = {text.load(partial, where, mask)}")
    for part in range(1, splits):
        text.line(f"sums += {text.load(partial, f'{where} + {part} * {apart}', mask)}")
    _write_result(text, product, walks, block)
    grid = (dims.ceil_div(rows, height) * across * share,)
    text.launch(grid, (partial, *operands), (product.out,))

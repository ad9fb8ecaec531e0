"""Convolutions in small groups, depthwise ones above all: lanes are channels, and taps are added one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from gpu_engine.gpu.epilogues import Walk, finish, number, place, widest
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import computing
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.gpu.windows import Image, scaled, sum_of, walk
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering

TILE_NBYTES, COLUMNS = 2048, 64
"""Of a program's tile of four warps, a load of 16 bytes for each thread; channels at most."""
UNROLLED = 32
"""Taps up to which their loop is unrolled."""


@dataclass(frozen=True)
class Layer:
    """What a convolution computes besides the sums: the epilogue `root` of these, of type `dtype`, and of operands."""

    root: Expr
    dtype: DType
    operands: tuple[Walked, ...]
    shape: Shape
    out: int

    def parted(self, axis: int, inner: Dim) -> Layer:
        """The same with an axis of the result as two, the last of `inner` elements."""
        outer = dims.floor_div(self.shape[axis], inner)
        shape = (*self.shape[:axis], outer, inner, *self.shape[axis + 1 :])
        operands = tuple(
            replace(each, strides=(*each.strides[:axis], each.strides[axis] * inner, *each.strides[axis:]))
            for each in self.operands
        )
        return replace(self, shape=shape, operands=operands)


def emit_direct(lowering: Lowering, image: Image, weights: int, depth: int, group: int, layer: Layer) -> None:
    """Launch sums over windows of `depth` channels for each of the groups; weights are [taps, depth, M]."""
    read = (image.buffer, weights, *(operand.buffer for operand in layer.operands))
    text = KernelText(lowering, "direct_conv", widest=widest(lowering, (*read, layer.out)))
    channels, rank = layer.shape[-1], len(layer.shape)
    count = dims.product(layer.shape[:-1])
    height, width = tile_extents(count, channels, lowering.buffers[image.buffer].dtype.itemsize)
    programs = write_tile(text, count, channels, height, width)
    of_group = dims.floor_div(channels, group)
    with text.apart("group"):
        own = "columns" if of_group == 1 else f"columns // {number(text, of_group)}"
    text.line(f"first = {own} * {depth}" if depth != 1 else f"first = {own}")
    walked = walk(text, image, "rows")
    kind, taps = computing(layer.dtype), prod(axis.taps for axis in image.axes) * depth
    text.line(f"sums = tl.zeros(({height}, {width}), {kind})")
    steps = "tl.static_range" if taps <= UNROLLED else "range"
    with text.block(f"for step in {steps}({taps}):"):
        terms, masks = walked.tap(text, f"(step // {depth})" if depth > 1 else "step")
        lane = f"first + step % {depth}" if depth > 1 else "first"
        lane = text.let("lane", lane)
        with text.apart("image"):
            channel = sum_of(scaled(text, lane, image.channel_pitch))
        at = f"({walked.place} + {terms})[:, None] + ({channel})[None, :]"
        there = " & ".join(["inside", *(f"({mask})[:, None]" for mask in masks)])
        x = text.load(image.buffer, at, there, "0")
        with text.apart("n"):
            places = f"step * {number(text, channels)} + columns[None, :]"
        w = text.load(weights, places, "columns_inside[None, :]", "0")
        text.line(f"sums += {x}.to({kind}) * {w}.to({kind})")
    walks = [
        Walk("rows[:, None]", tuple(range(rank - 1)), "rows_inside[:, None]"),
        Walk("columns[None, :]", (rank - 1,), "columns_inside[None, :]"),
    ]
    result = finish(text, layer.root, "sums", layer.operands, walks, layer.shape)
    with text.apart("out"):
        at, _ = place(text, Walked(layer.out, contiguous_strides(layer.shape)), walks, layer.shape)
    text.store(layer.out, f"{at} + tl.zeros(({height}, {width}), tl.int32)",
               f"tl.broadcast_to({result}, ({height}, {width}))", "inside")  # fmt: skip
    used = sorted({node.value for node in expr.walk(layer.root) if node.op == "arg"} - {0})
    read = (image.buffer, weights, *(layer.operands[i - 1].buffer for i in used))
    text.launch([programs], read, (layer.out,))


def tile_extents(rows: Dim, columns: Dim, itemsize: int) -> tuple[int, int]:
    """(height, width) of a program's tile of elements of so many bytes."""
    width = min(COLUMNS, power_of_two(columns)) if isinstance(columns, int) else COLUMNS
    height = TILE_NBYTES // max(itemsize, 2) // width
    return (min(height, power_of_two(rows)) if isinstance(rows, int) else height), width


def write_tile(text: KernelText, rows: Dim, columns: Dim, height: int, width: int) -> Dim:
    """`rows`, `columns` and masks of a program's tile; gives the number of programs."""
    across = dims.ceil_div(columns, width)
    with text.apart("tiles"):
        tiles = text.parameter(across, hint=False)
    text.line(f"rows = tl.program_id(0) // {tiles} * {height} + tl.arange(0, {height})")
    text.line(f"columns = tl.program_id(0) % {tiles} * {width} + tl.arange(0, {width})")
    with text.apart("m"):
        count = number(text, rows) if columns == 1 else text.parameter(rows, hint=False)
    text.line(f"rows_inside = rows < {count}")
    with text.apart("n"):
        text.line(f"columns_inside = columns < {number(text, columns)}")
    text.line("inside = rows_inside[:, None] & columns_inside[None, :]")
    return dims.ceil_div(rows, height) * across

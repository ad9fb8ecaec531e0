"""Running sums and products along an axis: blocks are scanned one after the other, with what came before as a carry.

Where the other axes are too few to keep a GPU busy, programs share the axis: one launch folds every share, and each
program of the second one starts from what the shares before its own gave, always folded in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.gpu.folds import Block, FoldTile, TileShape, folding, pass_shape
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import is_printable_dtype
from gpu_engine.gpu.reductions import Fold, kept_strides, with_splits
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir.dtypes import BOOL, compute_dtype
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.array import Array
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


@dataclass(frozen=True)
class Scan:
    """How elements add up: with `reverse` from the end, with `exclusive` without the element itself."""

    fold: Fold
    exclusive: bool
    reverse: bool

    @property
    def neutral(self) -> str:
        return f"tl.full([], {self.fold.neutral}, {self.fold.computed})"

    @property
    def zero(self) -> str:
        return f"tl.full([], 0, {self.fold.computed})"

    def along(self, lanes: str, axis: int) -> str:
        """The running totals of lanes."""
        function = "cumsum" if self.fold.kind == "sum" else "cumprod"
        return f"tl.{function}({lanes}, {axis}, {self.reverse}).to({self.fold.computed})"

    def elements(self, block: Block) -> str:
        """The name of what is added in every lane of a block: neutral where there is no element."""
        read = block.moved(1 if self.reverse else -1) if self.exclusive else block
        return read.masked(read.load(1), self.neutral)


def lower_accumulate(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """Declines an axis that only running tells."""
    attributes, (dtype, shape) = dict(op.attributes), (node.inputs[0].dtype, node.inputs[0].shape)
    if attributes["axis"] is None or dtype == BOOL or not is_printable_dtype(dtype):
        return False
    axes = (int(attributes["axis"]) % len(shape),)
    scan = Scan(Fold(str(attributes["kind"]), dtype), bool(attributes["exclusive"]), bool(attributes["reverse"]))
    strides = contiguous_strides(shape)
    x, out = Walked(inputs[0], strides), Walked(outputs[0], strides)
    split = folding(shape, axes, [out, x])
    tile_shape = with_splits(split, pass_shape(split))
    streams = [out, x]
    if tile_shape.splits > 1:
        wide = compute_dtype(dtype)
        kept = tuple(extent for axis, extent in enumerate(shape) if axis not in axes)
        parts = Walked(lowering.buffer(wide, (tile_shape.splits, *kept)), kept_strides(shape, axes))
        streams.append(parts)
        text = KernelText(lowering, "scan_parts")
        tile = FoldTile(text, folding(shape, axes, [parts, x]), [parts, x], tile_shape)
        _write_shares(text, tile, scan)
        text.launch(tile.grid, (inputs[0],), (parts.buffer,), num_warps=tile_shape.num_warps)
    text = KernelText(lowering, "scan")
    tile = FoldTile(text, folding(shape, axes, streams), streams, tile_shape)
    _write_totals(text, tile, scan, tile_shape)
    in_place = () if scan.exclusive else (0,)
    reads = tuple(stream.buffer for stream in streams[1:])
    text.launch(tile.grid, reads, outputs, num_warps=tile_shape.num_warps, in_place=in_place)
    return True


def _write_shares(text: KernelText, tile: FoldTile, scan: Scan) -> None:
    """What each share of the axis folds to."""
    text.line(f"lanes = tl.full({tile.shape}, {scan.fold.neutral}, {scan.fold.computed})")
    with tile.blocks() as block:
        text.line(f"lanes = {scan.fold.combine('lanes', scan.elements(block))}")
    tile.store_folded(0, scan.fold.across(text, "lanes", tile))


def _write_totals(text: KernelText, tile: FoldTile, scan: Scan, shape: TileShape) -> None:
    carry: str | None = None
    if shape.splits > 1:
        share, found = tile.load_splits(2, scan.fold.neutral)
        before = ">" if scan.reverse else "<"
        kept = text.let("v", f"tl.where({share} {before} tl.program_id(1), {found}, {scan.neutral})")
        carry = _last(text, tile, scan, text.let("totals", scan.along(kept, tile.axis)), share, shape.splits)
        text.line(f"carry = {carry}")
    elif not tile.whole:
        text.line(f"carry = tl.full({tile.folded_shape}, {scan.fold.neutral}, {scan.fold.computed})")
    with tile.blocks(backwards=scan.reverse) as block:
        totals = text.let("totals", scan.along(scan.elements(block), tile.axis))
        if tile.whole:
            block.store(0, totals)
            return
        block.store(0, text.let("result", scan.fold.combine("carry", totals)))
        total = _last(text, tile, scan, totals, tile.lanes(shape.block), shape.block)
        text.line(f"carry = {scan.fold.combine('carry', total)}")


def _last(text: KernelText, tile: FoldTile, scan: Scan, totals: str, lanes: str, count: int) -> str:
    """The name of what all `count` lanes gave: the running total behind the last of them."""
    edge = f"tl.where({lanes} == {0 if scan.reverse else count - 1}, {totals}, {scan.zero})"
    return text.let("last", f"tl.sum({edge}, axis={tile.axis}, keep_dims=True).to({scan.fold.computed})")

"""Softmax and its logarithm along any axis.

A row that fits is read once and stays in registers. Of a longer one every lane keeps the greatest element so far and
the sum of exponentials relative to it; the row is then read again.
"""

from __future__ import annotations

from gpu_engine.gpu.folds import Block, Folding, FoldTile, TileShape, folding, row_shape
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import computing, is_printable_dtype
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir.dtypes import is_float
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Softmax
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering

LEAST = 'float("-inf")'


def lower_softmax(
    lowering: Lowering, op: Softmax, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    dtype, shape = node.inputs[0].dtype, node.inputs[0].shape
    if not is_float(dtype) or not is_printable_dtype(dtype):
        return False
    strides = contiguous_strides(shape)
    streams = [Walked(outputs[0], strides), Walked(inputs[0], strides)]
    axes = folding(shape, (op.axis,), streams)
    tile_shape = row_shape(axes) or loop_shape(axes)
    text = KernelText(lowering, "softmax")
    tile = FoldTile(text, axes, streams, tile_shape)
    _write(text, tile, computing(dtype), op.log)
    text.launch(tile.grid, inputs, outputs, num_warps=tile_shape.num_warps, in_place=(0,))
    return True


def loop_shape(axes: Folding) -> TileShape:
    """A tile for rows that are read block by block, more than once."""
    if not axes.inner:
        return TileShape(32, 64)
    return TileShape(1, 4096, num_warps=8) if isinstance(axes.count, int) else TileShape(1, 1024)


def _write(text: KernelText, tile: FoldTile, computed: str, log: bool) -> None:
    if tile.whole:
        with tile.blocks() as block:
            x = block.masked(block.load(1), LEAST)
            peak = text.let("peak", f"tl.max({x}, axis={tile.axis}, keep_dims=True)")
            shifted = text.let("shifted", f"{x} - {peak}")
            terms = block.masked(f"tl.exp({shifted})", "0.0")
            total = text.let("total", f"tl.sum({terms}, axis={tile.axis}, keep_dims=True)")
            block.store(0, f"{shifted} - tl.log({total})" if log else f"{terms} / {total}")
        return
    peak, total = _totals(text, tile, computed)
    with tile.blocks() as block:
        shifted = text.let("shifted", f"{block.load(1)} - {peak}")
        block.store(0, f"{shifted} - tl.log({total})" if log else f"tl.exp({shifted}) / {total}")


def _totals(text: KernelText, tile: FoldTile, computed: str) -> tuple[str, str]:
    """(the greatest element of a row, the sum of its exponentials relative to that)."""
    text.line(f"peaks = tl.full({tile.shape}, {LEAST}, {computed})")
    text.line(f"sums = tl.zeros({tile.shape}, {computed})")
    with tile.blocks() as block:
        _add(text, block)
    peak = text.let("peak", f"tl.max(peaks, axis={tile.axis}, keep_dims=True)")
    # a lane that saw nothing has the same peak as one that saw only -inf, which makes the row NaN
    scaled = f"tl.where(peaks == {LEAST}, 0.0, sums * tl.exp(peaks - {peak}))"
    total = text.let("total", f"tl.sum({scaled}, axis={tile.axis}, keep_dims=True)")
    return peak, text.let("total", f'tl.where({peak} == {LEAST}, float("nan"), {total})')


def _add(text: KernelText, block: Block) -> None:
    x = block.masked(block.load(1), LEAST)
    text.line(f"""
        higher = tl.maximum(peaks, {x})
        base = tl.where(higher == {LEAST}, 0.0, higher)
        sums = sums * tl.exp(peaks - base) + tl.exp({x} - base)
        peaks = higher
    """)

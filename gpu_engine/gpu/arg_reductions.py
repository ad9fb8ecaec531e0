"""ArgReduce: where the least or the greatest element is, of equals the first or the last; the first NaN wins.

Elements are compared as integers in the same order, in which a NaN is beyond everything, so that no reduction has to
say what it does with one.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.gpu.folds import Block, FoldTile, TileShape, folding, pass_shape
from gpu_engine.gpu.kernel import language_dtype
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import is_printable_dtype
from gpu_engine.gpu.reductions import kept_strides, with_splits
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir.dtypes import BOOL, FLOAT64, INT32, INT64, DType, is_float, limits
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import ArgReduce
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering

NOWHERE = -1


@dataclass(frozen=True)
class Search:
    """What is looked for: `last` of the equal elements, or the first; keys are integers."""

    kind: str
    last: bool
    key: DType

    @property
    def worst(self) -> int:
        low, high = limits(self.key)
        return int(low if self.kind == "max" else high)

    @property
    def missing(self) -> int:
        """The key of a NaN."""
        low, high = limits(self.key)
        return int(high if self.kind == "max" else low)

    def better(self, a: str, b: str) -> str:
        sign = ">" if self.kind == "max" else "<"
        return f"({a} {sign}{'=' if self.last else ''} {b})"


def lower_arg_reduce(
    lowering: Lowering, op: ArgReduce, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    """Declines what the reference refuses: folding nothing."""
    dtype, shape, axes = node.inputs[0].dtype, node.inputs[0].shape, (op.axis,)
    if shape[op.axis] == 0 or not is_printable_dtype(dtype):
        return False
    search = Search(op.kind, op.select_last, _key(dtype))
    source = Walked(inputs[0], contiguous_strides(shape))
    out = Walked(outputs[0], kept_strides(shape, axes))
    split = folding(shape, axes, [out, source])
    tile = with_splits(split, pass_shape(split))
    if tile.splits == 1:
        _emit(lowering, search, [out, source], ([0], [1]), shape, axes, tile)
        return True
    kept = tuple(extent for extent, _ in split.kept)
    rest = (tile.splits, *kept)
    parts = [lowering.buffer(kind, rest) for kind in (INT32, search.key)]
    written = [Walked(part, kept_strides(shape, axes)) for part in parts]
    _emit(lowering, search, [*written, source], ([0, 1], [2]), shape, axes, tile)
    found = [Walked(outputs[0], (0, *(strides[0] for _, strides in split.kept)))]
    found += [Walked(part, contiguous_strides(rest)) for part in parts]
    _emit(lowering, search, found, ([0], [2, 1]), rest, (0,), pass_shape(folding(rest, (0,), found)))
    return True


def _key(dtype: DType) -> DType:
    if is_float(dtype):
        return INT64 if dtype == FLOAT64 else INT32
    return INT32 if dtype == BOOL or dtype.itemsize < 4 else dtype


def _emit(
    lowering: Lowering,
    search: Search,
    streams: list[Walked],
    roles: tuple[list[int], list[int]],
    shape: Shape,
    axes: tuple[int, ...],
    tile_shape: TileShape,
) -> None:
    """One launch: `roles` are (streams for the places and, where given, the keys found; for the elements or, where
    given, the keys and places found before)."""
    written, read = roles
    text = KernelText(lowering, "arg_reduce" if len(written) == 1 else "arg_reduce_parts")
    tile = FoldTile(text, folding(shape, axes, streams), streams, tile_shape)
    key = language_dtype(search.key)
    text.line(f"best = tl.full({tile.shape}, {search.worst}, {key})")
    text.line(f"place = tl.full({tile.shape}, {NOWHERE}, tl.int32)")
    with tile.blocks() as block:
        loaded = [block.load(stream) for stream in read]
        dtype = lowering.buffers[streams[read[0]].buffer].dtype
        keys = block.spread(_ordered(text, search, loaded[0], dtype))
        index = block.masked(block.index if len(loaded) == 1 else loaded[1], str(NOWHERE))
        _update(text, search, block, text.let("key", keys), index)
    _finish(text, search, tile, written)
    reads = tuple(streams[i].buffer for i in read)
    text.launch(tile.grid, reads, tuple(streams[i].buffer for i in written), num_warps=tile_shape.num_warps)


def _ordered(text: KernelText, search: Search, x: str, dtype: DType) -> str:
    """Integers in the order of the elements `x`."""
    key = language_dtype(search.key)
    if not is_float(dtype):
        return f"tl.where({x}, 1, 0)" if dtype == BOOL else f"{x}.to({key})"
    positive = text.let("v", f"tl.where({x} == 0, 0.0, {x})")
    bits = text.let("bits", f"{positive}.to({key}, bitcast=True)")
    most = int(limits(search.key)[1])
    return f"tl.where({x} != {x}, {search.missing}, tl.where({bits} < 0, {bits} ^ {most}, {bits}))"


def _update(text: KernelText, search: Search, block: Block, key: str, index: str) -> None:
    better = text.let("better", f"({index} >= 0) & ({search.better(key, 'best')} | (place < 0))")
    text.line(f"best = tl.where({better}, {key}, best)")
    text.line(f"place = tl.where({better}, {index}, place)")


def _finish(text: KernelText, search: Search, tile: FoldTile, written: list[int]) -> None:
    """The best lane of all, and of equal ones that with the first place, or the last."""
    most = f"tl.{search.kind}(best, axis={tile.axis}, keep_dims=True)"
    found = text.let("found", f"{most}.to({language_dtype(search.key)})")
    equal = text.let("equal", f"(best == {found}) & (place >= 0)")
    nowhere, choice = (NOWHERE, "max") if search.last else (int(limits(INT32)[1]), "min")
    place = f"tl.{choice}(tl.where({equal}, place, {nowhere}), axis={tile.axis}, keep_dims=True)"
    if len(written) == 1:
        tile.store_folded(written[0], f"{place}.to(tl.int64)")
    else:
        # a share without elements gives a place that the next launch leaves out
        empty = text.let("none", f"tl.max(place, axis={tile.axis}, keep_dims=True) < 0")
        tile.store_folded(written[0], f"tl.where({empty}, {NOWHERE}, {place})")
        tile.store_folded(written[1], found)

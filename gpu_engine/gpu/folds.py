"""Tiles of operations that fold axes: indices and masks along the axes that are kept and along those that are folded.

A program computes `width` places of the kept axes. It passes over the folded axes `block` elements at a time, or has
them in registers at once. The axis along which memory is contiguous is the tile's second one, whichever kind it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.plan.axes import Axis, Shape, collapsed

TYPICAL = 256
"""What an extent counts that only binding tells, where kernels are chosen."""
ENOUGH_PROGRAMS = 528
"""Programs that keep 132 multiprocessors busy."""


@dataclass(frozen=True)
class Folding:
    """Axes of each kind with the strides of every stream; `inner` says whether the innermost one is folded."""

    kept: list[Axis]
    folded: list[Axis]
    inner: bool

    @property
    def places(self) -> Dim:
        return dims.product(extent for extent, _ in self.kept)

    @property
    def count(self) -> Dim:
        """How many elements are folded into one."""
        return dims.product(extent for extent, _ in self.folded)


def folding(shape: Shape, axes: Sequence[int], streams: Sequence[Walked]) -> Folding:
    """The axes of `shape`, of which `axes` are folded, as few as the strides of the streams allow."""
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    long = [axis for axis, extent in enumerate(shape) if extent != 1]
    inner = bool(long) and long[-1] in axes
    return Folding(_joined(shape, kept, streams), _joined(shape, axes, streams), inner)


def _joined(shape: Shape, axes: Sequence[int], streams: Sequence[Walked]) -> list[Axis]:
    return collapsed(tuple(shape[axis] for axis in axes), [[s.strides[axis] for axis in axes] for s in streams])


def typical(dim: Dim) -> int:
    """A guess at what an extent will be."""
    if isinstance(dim, int):
        return dim
    return dims.number(dims.substitute(dim, dict.fromkeys(dims.symbols(dim), TYPICAL)))


@dataclass(frozen=True)
class TileShape:
    """`width` kept places and `block` folded elements at a time; `splits` programs share the folded ones."""

    width: int
    block: int
    splits: int = 1
    num_warps: int = 4


class FoldTile:
    """Writes the index arithmetic of a tile into a kernel; creating it writes the indices of the kept axes."""

    def __init__(self, text: KernelText, axes: Folding, streams: Sequence[Walked], shape: TileShape) -> None:
        self._text, self._axes, self._streams = text, axes, streams
        self._width, self._block, self._splits = shape.width, shape.block, shape.splits
        self.axis = 1 if axes.inner else 0
        """The tile's axis along which elements are folded."""
        self.shape = (shape.width, shape.block) if axes.inner else (shape.block, shape.width)
        self.count = axes.count
        self.whole = shape.splits == 1 and isinstance(self.count, int) and self.count <= shape.block
        """Whether one block holds all that is folded."""
        self._mask: str | None = None
        self._index: str | None = None
        self.grid: tuple[Dim, ...] = ()
        indices = self._kept()
        self._bases = [self._sum(stream, indices, axes.kept, i) for i, stream in enumerate(streams)]
        self._range = ("0", text.number(self.count)) if shape.splits == 1 else self._share()

    @property
    def folded_shape(self) -> tuple[int, int]:
        """The shape of a tile in which the folded axis has one element."""
        return (self._width, 1) if self.axis else (1, self._width)

    def lanes(self, count: int) -> str:
        """Numbers from 0 along the axis that is folded."""
        return f"tl.arange(0, {count})" + ("[None, :]" if self.axis else "[:, None]")

    @contextmanager
    def blocks(self, *, backwards: bool = False) -> Iterator[Block]:
        """Lines for one block after the other, with `backwards` the last one first; where one is all, lines for it."""
        start, stop = self._range
        text, block = self._text, self._block
        if self.whole:
            yield self._at("0", stop)
            return
        here = text.fresh("start")
        if not backwards:
            with text.block(f"for {here} in range({start}, {stop}, {block}):"):
                yield self._at(here, stop)
            return
        count = text.let("count", f"({stop} - {start} + {block - 1}) // {block}")
        with text.block(f"for {here} in range({count}):"):
            yield self._at(text.let("start", f"{start} + ({count} - 1 - {here}) * {block}"), stop)

    def store_folded(self, stream: int, value: str) -> None:
        """Write a tile in which the folded axis has one element; with splits, one such tile for each."""
        place = f"{self._bases[stream]}"
        if self._splits > 1:
            place += f" + tl.program_id(1) * {self._text.number(self._axes.places)}"
        place += f" + tl.zeros({self.folded_shape}, tl.int32)"
        self._text.store(self._streams[stream].buffer, place, value, self._mask)

    def load_splits(self, stream: int, other: str) -> tuple[str, str]:
        """(numbers of the splits along the folded axis, what `store_folded` wrote for each of them)."""
        text = self._text
        share = text.let("share", self.lanes(self._splits))
        place = f"{self._bases[stream]} + {share} * {text.number(self._axes.places)}"
        masked = self._mask and other
        return share, text.load(self._streams[stream].buffer, place, self._mask, masked)

    def _kept(self) -> list[str]:
        """The indices along the kept axes."""
        text, width, extents = self._text, self._width, [extent for extent, _ in self._axes.kept]
        places = self._axes.places
        if width == 1:
            self.grid = (places, self._splits)
            self._index = text.let("k", "tl.program_id(0)")
            return text.unravelled(self._index, extents)
        lanes = f"tl.arange(0, {width})" + ("[:, None]" if self.axis else "[None, :]")
        inner = extents[-1] if extents else 1
        if self.axis or (isinstance(inner, int) and inner < width) or len(extents) < 2:
            self.grid = (dims.ceil_div(places, width), self._splits)
            self._index = text.let("k", f"tl.program_id(0) * {width} + {lanes}")
            self._bounded(self._index, places)
            return text.unravelled(self._index, extents)
        across = dims.ceil_div(inner, width)
        self.grid = (across * dims.product(extents[:-1]), self._splits)
        column = text.let("k", f"tl.program_id(0) % {text.number(across)} * {width} + {lanes}")
        self._bounded(column, inner)
        rest = text.let("k", f"tl.program_id(0) // {text.number(across)}")
        return [*text.unravelled(rest, extents[:-1]), column]

    def _bounded(self, index: str, extent: Dim) -> None:
        if dims.modulo(extent, self._width) != 0:
            self._mask = self._text.let("m", f"{index} < {self._text.number(extent)}")

    def _share(self) -> tuple[str, str]:
        """What of the folded elements one of the programs that share them takes."""
        text, pieces = self._text, dims.ceil_div(self.count, self._splits * self._block)
        start = text.let("first", f"tl.program_id(1) * {text.number(pieces * self._block)}")
        stop = text.let("last", f"tl.minimum({start} + {text.number(pieces * self._block)}, {text.number(self.count)})")
        return start, stop

    def _at(self, start: str, stop: str) -> Block:
        text, block = self._text, self._block
        index = text.let("f", f"{start} + {self.lanes(block)}")
        full = self._splits == 1 and dims.modulo(self.count, block) == 0 and self.count != 0
        mask = None if full else text.let("m", f"{index} < {stop}")
        indices = text.unravelled(index, [extent for extent, _ in self._axes.folded])
        return Block(self, index, mask, indices)

    def _sum(self, stream: Walked, indices: Sequence[str], axes: Sequence[Axis], position: int) -> str:
        steps = [self._times(index, strides[position]) for index, (_, strides) in zip(indices, axes, strict=True)
                 if strides[position] != 0]  # fmt: skip
        offset = [self._text.number(stream.offset)] * (stream.offset != 0)
        return self._text.let("at", " + ".join(offset + steps)) if offset or steps else "0"

    def _times(self, index: str, stride: Dim) -> str:
        return index if stride == 1 else f"{index} * {self._text.number(stride)}"


class Block:
    """The folded elements that a program holds at a time, beside its kept places."""

    def __init__(self, tile: FoldTile, index: str, mask: str | None, indices: list[str]) -> None:
        self._tile, self.index, self._mask, self._indices = tile, index, mask, indices

    @property
    def mask(self) -> str | None:
        """The lanes that are elements at all."""
        return _both(self._tile._mask, self._mask)

    @property
    def folded_mask(self) -> str | None:
        """The lanes that are elements along the folded axes."""
        return self._mask

    def moved(self, distance: int) -> Block:
        """The elements so many places further along the one axis that is folded, where there are any."""
        text = self._tile._text
        index = text.let("f", f"{self.index} + {distance}")
        edge = f"({index} >= 0)" if distance < 0 else f"({index} < {text.number(self._tile.count)})"
        mask = text.let("m", _both(self._mask, edge) or "")
        return Block(self._tile, index, mask, [index] if self._indices else [])

    def load(self, stream: int, other: str | None = None) -> str:
        """Elements in computing form; lanes that are none hold `other`, or garbage."""
        place, mask = self._place(stream)
        return self._tile._text.load(self._tile._streams[stream].buffer, place, mask, other if mask else None)

    def store(self, stream: int, value: str) -> None:
        """Write a tile of elements."""
        place, _ = self._place(stream)
        if all(strides[stream] == 0 for _, strides in self._tile._axes.folded):
            place += f" + tl.zeros({self._tile.shape}, tl.int32)"
        self._tile._text.store(self._tile._streams[stream].buffer, place, self.spread(value), self.mask)

    def spread(self, value: str) -> str:
        """`value` in the shape of the tile."""
        return f"tl.broadcast_to({value}, {self._tile.shape})"

    def masked(self, value: str, other: str) -> str:
        """The name of a tile that is `value`, and `other` in lanes that are no elements."""
        if self.mask is None:
            return self._tile._text.let("v", self.spread(value))
        return self._tile._text.let("v", f"tl.where({self.mask}, {self.spread(value)}, {other})")

    def _place(self, stream: int) -> tuple[str, str | None]:
        tile = self._tile
        axes = tile._axes
        steps = [tile._times(index, strides[stream])
                 for index, (_, strides) in zip(self._indices, axes.folded, strict=True)
                 if strides[stream] != 0]  # fmt: skip
        along = self._mask if steps else None
        beside = tile._mask if any(strides[stream] != 0 for _, strides in axes.kept) else None
        return " + ".join([tile._bases[stream], *steps]), _both(beside, along)


def _both(a: str | None, b: str | None) -> str | None:
    return f"({a} & {b})" if a and b else a or b


def pass_shape(axes: Folding, elements: int = 2048) -> TileShape:
    """A tile of about `elements` for a kernel that reads everything once, block by block."""
    count, places = axes.count, typical(axes.places)
    if not axes.inner:
        inner = max(1, typical(axes.kept[-1][0])) if axes.kept else 1
        width = min(128, power_of_two(inner if inner >= 32 else max(1, places)))
        block = max(1, elements // width)
        block = min(block, power_of_two(count)) if isinstance(count, int) else block
        return TileShape(min(width * max(1, 512 // (width * block)), power_of_two(max(1, places))), block)
    if not isinstance(count, int) or count > elements // 2:
        return TileShape(1, elements // 2 if typical(count) < 2 * elements else elements)
    block = power_of_two(count)
    most = power_of_two(max(1, places // ENOUGH_PROGRAMS) + 1) // 2
    return TileShape(max(1, min(elements // block, most)), block)


def row_shape(axes: Folding, most: int = 16384) -> TileShape | None:
    """A tile that holds all that is folded, where that is known and not more than `most` elements; else None."""
    count = axes.count
    if not isinstance(count, int) or count == 0:
        return None
    block = power_of_two(count)
    narrowest = 1 if axes.inner else 8
    if block * narrowest > most:
        return None
    wanted = max(2048 // block, narrowest)
    width = min(wanted, 128, power_of_two(max(1, typical(axes.places))))
    if axes.inner:
        width = min(width, max(1, power_of_two(max(1, typical(axes.places) // ENOUGH_PROGRAMS) + 1) // 2))
    return TileShape(width, block, num_warps=min(16, max(4, width * block // 1024)))

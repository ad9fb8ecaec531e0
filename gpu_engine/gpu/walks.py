"""Tiles of points: which points of a result's axes one program of a kernel computes, and how it counts them.

Memory is read 16 bytes at a time only where Triton proves that neighbouring lanes are neighbours in memory, that the
first of them is aligned, and that no mask parts them; tiles are chosen so that it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.plan.axes import Axis

BLOCK = 1024
"""Elements that a program of four warps computes: eight for each thread, two loads of 16 bytes of float32."""
COLUMNS = 128
"""Of these along the inner axis, where its extent is not known."""
SIDES = {1: 64, 2: 64, 4: 32, 8: 32}
"""The side of a square tile where an operand's neighbours are not the result's, by bytes of an element."""
ALIGNED = 16


@dataclass(frozen=True)
class Tile:
    """What one program computes.

    `indices` along every axis broadcast to `shape`; `flat`, where it is at hand, counts the points in row-major order.
    Lanes outside `mask` are no points; None says that all are. `whole` names a scalar that says whether this program
    has no lane outside. `programs` cover all points.
    """

    indices: tuple[str, ...]
    flat: str | None
    shape: tuple[int, ...]
    mask: str | None
    whole: str | None
    programs: Dim


def write_tile(text: KernelText, axes: Sequence[Axis], itemsize: int, program: str, flat: bool) -> Tile:
    """The tile of program number `program` over `axes`, at least one; elements have at least `itemsize` bytes.

    `flat` says whether some stream walks all axes as they lie in memory.
    """
    block = BLOCK * 2 if itemsize == 1 else BLOCK
    turned = _turned_axis(axes)
    if len(axes) > 1 and turned is not None:
        return _square(text, axes, turned, SIDES[itemsize], program)
    if len(axes) == 1 or (flat and _prefers_line(axes, block, itemsize)):
        return _line(text, [extent for extent, _ in axes], block, program)
    return _rows(text, axes, block, program)


def write_inside(text: KernelText, tile: Tile, body: Callable[[str | None], None]) -> None:
    """Lines that `body` writes for a mask: once without one for programs that have no lane outside, where that pays."""
    if tile.whole is None:
        body(tile.mask)
        return
    with text.block(f"if {tile.whole}:"):
        body(None)
    with text.block("else:"):
        body(tile.mask)


def _prefers_line(axes: Sequence[Axis], block: int, itemsize: int) -> bool:
    """Whether rows of the inner axis start at odd addresses or leave many lanes idle, and dividing by the extents is
    multiplying."""
    extents = [extent for extent, _ in axes]
    inner = extents[-1]
    if not isinstance(inner, int) or not all(isinstance(extent, int) for extent in extents[1:]):
        return False
    columns = _columns(inner, block)
    idle = -inner % columns
    return not is_multiple(inner, ALIGNED // itemsize) or idle * 8 > inner


def _columns(inner: int, block: int) -> int:
    """The widest power of two that leaves few lanes idle, else the one that leaves the fewest."""
    least = power_of_two(inner)
    widths = [width for width in (block, block // 2, block // 4, block // 8) if width <= least] or [least]
    idle = {width: -inner % width for width in widths}
    return next((width for width in widths if idle[width] * 16 <= inner), min(widths, key=lambda width: idle[width]))


def _line(text: KernelText, extents: Sequence[Dim], block: int, program: str) -> Tile:
    """A piece of all axes as one."""
    total = dims.product(extents)
    block = min(block, power_of_two(total)) if isinstance(total, int) else block
    index = text.let("i", f"{program} * {block} + tl.arange(0, {block})")
    mask = whole = None
    if not is_multiple(total, block):
        mask = text.let("inside", f"{index} < {text.number(total)}")
        if not is_multiple(total, ALIGNED) and not (isinstance(total, int) and total <= block):
            whole = text.let("whole", f"{program} * {block} + {block} <= {text.number(total)}")
    indices = tuple(text.unravelled(index, extents))
    return Tile(indices, index, (block,), mask, whole, dims.ceil_div(total, block))


def _rows(text: KernelText, axes: Sequence[Axis], block: int, program: str) -> Tile:
    """A piece of the inner axis by one of all others as one."""
    inner, rows = axes[-1][0], dims.product(extent for extent, _ in axes[:-1])
    columns = _columns(inner, block) if isinstance(inner, int) else COLUMNS
    height = block // columns
    if isinstance(rows, int):
        height = min(height, power_of_two(rows))
    across = dims.ceil_div(inner, columns)
    row = program if across == 1 else f"{program} // {text.number(across)}"
    column = "" if across == 1 else f"{program} % {text.number(across)} * {columns} + "
    r = text.let("r", row if height == 1 else f"{row} * {height} + tl.arange(0, {height})[:, None]")
    c = text.let("c", f"{column}tl.arange(0, {columns})[None, :]")
    masks = [f"({r} < {text.number(rows)})"] * (not is_multiple(rows, height))
    masks += [f"({c} < {text.number(inner)})"] * (not is_multiple(inner, columns))
    mask = text.let("inside", " & ".join(masks)) if masks else None
    indices = (*text.unravelled(r, [extent for extent, _ in axes[:-1]]), c)
    return Tile(indices, None, (height, columns), mask, None, dims.ceil_div(rows, height) * across)


def _square(text: KernelText, axes: Sequence[Axis], turned: int, side: int, program: str) -> Tile:
    """A piece of the inner axis by one of the axis along which an operand's elements are neighbours."""
    (inner, _), (other, _) = axes[-1], axes[turned]
    rest = [extent for i, (extent, _) in enumerate(axes[:-1]) if i != turned]
    width, height = _sides(inner, other, side)
    across, down = dims.ceil_div(inner, width), dims.ceil_div(other, height)
    c = text.let("c", f"{program} % {text.number(across)} * {width} + tl.arange(0, {width})[None, :]")
    left = text.let("left", f"{program} // {text.number(across)}")
    r = text.let("r", f"{left} % {text.number(down)} * {height} + tl.arange(0, {height})[:, None]")
    left = text.let("left", f"{left} // {text.number(down)}")
    masks = [f"({r} < {text.number(other)})"] * (not is_multiple(other, height))
    masks += [f"({c} < {text.number(inner)})"] * (not is_multiple(inner, width))
    mask = text.let("inside", " & ".join(masks)) if masks else None
    indices = text.unravelled(left, rest)
    indices.insert(turned, r)
    return Tile((*indices, c), None, (height, width), mask, None, dims.product([across, down, *rest]))


def _sides(inner: Dim, other: Dim, side: int) -> tuple[int, int]:
    """(width, height) of a tile of side * side elements, narrower where an axis is short."""
    width = min(side, power_of_two(inner)) if isinstance(inner, int) else side
    height = min(side * side // width, power_of_two(other)) if isinstance(other, int) else side
    return (min(side * side // height, power_of_two(inner)) if isinstance(inner, int) else width), height


def _turned_axis(axes: Sequence[Axis]) -> int | None:
    """The axis along which an operand that is not contiguous along the inner one is."""
    _, inner = axes[-1]
    for stream, step in enumerate(inner):
        if step not in (0, 1):
            for i, (extent, strides) in enumerate(axes[:-1]):
                if strides[stream] == 1 and not (isinstance(extent, int) and extent < 2):
                    return i
    return None

"""Map: fused pointwise kernels over broadcast operands. The same kernels copy: operands and result may be strided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.walks import Tile, write_inside, write_tile
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BITS
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Map
from gpu_engine.plan.axes import Shape, broadcast_strides, collapsed, contiguous_strides
from gpu_engine.plan.lower import Lowering


@dataclass(frozen=True)
class Walked:
    """A buffer as a kernel walks it: from element `offset` on, `strides` in elements for every axis of the result."""

    buffer: int
    strides: tuple[Dim, ...]
    offset: Dim = 0


@dataclass(frozen=True)
class Copy:
    """Elements of `source` that go to `target`, one for every point of `extents`."""

    source: Walked
    target: Walked
    extents: Shape


def lower_map(lowering: Lowering, op: Map, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    shape = node.outputs[0].shape
    if not is_printable(op.expr):
        return False
    operands = [
        Walked(buffer, broadcast_strides(value.shape, shape)) for buffer, value in zip(inputs, node.inputs, strict=True)
    ]
    in_place = tuple(i for i, value in enumerate(node.inputs) if value.shape == shape)
    emit_walk(lowering, "map", op.expr, operands, Walked(outputs[0], contiguous_strides(shape)), shape, in_place)
    return True


def emit_walk(
    lowering: Lowering,
    name: str,
    root: Expr,
    operands: Sequence[Walked],
    out: Walked,
    extents: Shape,
    in_place: tuple[int, ...] = (),
) -> None:
    """Launch a kernel that computes the printable `root` for every point of `extents`.

    `in_place` are positions of operands that are read exactly where the result is written.
    """
    used = _used(root)
    text = KernelText(lowering, name)
    itemsize = min(lowering.buffers[stream.buffer].dtype.itemsize for stream in (out, *(operands[i] for i in used)))
    programs = write_walk(text, "tl.program_id(0)", root, operands, out, extents, itemsize)
    read = tuple(operands[i].buffer for i in used)
    text.launch([programs], read, (out.buffer,), in_place=tuple(k for k, i in enumerate(used) if i in in_place))


def emit_copies(lowering: Lowering, copies: Sequence[Copy]) -> None:
    """Launch one kernel that does all copies: elements of one type that can be copied, into one buffer."""
    (target,) = {copy.target.buffer for copy in copies}
    itemsize = lowering.buffers[target].dtype.itemsize
    root = expr.arg(0, BITS[itemsize])
    text = KernelText(lowering, "copy", bits=True)
    start: Dim = 0
    for copy in copies:
        walk = (root, [copy.source], copy.target, copy.extents, itemsize)
        if len(copies) == 1:
            start = write_walk(text, "tl.program_id(0)", *walk)
            break
        program = text.let("program", f"tl.program_id(0) - {text.number(start)}")
        with text.block(f"if ({program} >= 0) & ({program} < {text.number(programs_of(copy, itemsize, lowering))}):"):
            start = start + write_walk(text, program, *walk)
    text.launch([start], tuple(dict.fromkeys(copy.source.buffer for copy in copies)), (target,))


def programs_of(copy: Copy, itemsize: int, lowering: Lowering) -> Dim:
    """How many programs a copy takes."""
    trial = KernelText(lowering, "trial", bits=True)
    return write_walk(trial, "0", expr.arg(0, BITS[itemsize]), [copy.source], copy.target, copy.extents, itemsize)


def write_walk(
    text: KernelText,
    program: str,
    root: Expr,
    operands: Sequence[Walked],
    out: Walked,
    extents: Shape,
    itemsize: int,
) -> Dim:
    """Lines that compute `root` for the points of program number `program`; the number of programs there are.

    `itemsize` is that of the narrowest elements among the streams.
    """
    used = _used(root)
    streams = [out, *(operands[i] for i in used)]
    axes = collapsed(extents, [stream.strides for stream in streams]) or [(1, [1] * len(streams))]
    lies = contiguous_strides(tuple(extent for extent, _ in axes))
    flat = [all(steps[k] == step for (_, steps), step in zip(axes, lies, strict=True)) for k in range(len(streams))]
    tile = write_tile(text, axes, itemsize, program, any(flat))
    strides = [[steps[k] for _, steps in axes] for k in range(len(streams))]
    places = [
        _place(text, stream, own, lies_so, tile) for stream, own, lies_so in zip(streams, strides, flat, strict=True)
    ]
    moves = [any(step != 0 for step in own) for own in strides]

    def body(mask: str | None) -> None:
        values = {
            i: text.load(operands[i].buffer, place, mask if moving else None)
            for i, place, moving in zip(used, places[1:], moves[1:], strict=True)
        }
        shape = f"[{', '.join(map(str, tile.shape))}]"
        text.store(out.buffer, places[0], f"tl.broadcast_to({text.evaluate(root, values)}, {shape})", mask)

    write_inside(text, tile, body)
    return tile.programs


def _used(root: Expr) -> list[int]:
    return sorted({node.value for node in expr.walk(root) if node.op == "arg"})


def _place(text: KernelText, stream: Walked, strides: Sequence[Dim], flat: bool, tile: Tile) -> str:
    """Where the points of a tile are, in elements."""
    terms = [text.number(stream.offset)] * (stream.offset != 0)
    if flat and tile.flat is not None:
        return " + ".join([*terms, tile.flat])
    pairs = zip(tile.indices, strides, strict=True)
    terms += [_times(text, index, stride) for index, stride in pairs if stride != 0]
    return " + ".join(terms) or "0"


def _times(text: KernelText, index: str, stride: Dim) -> str:
    """Parameters are never negative: such a stride changes its sign in the text."""
    highest = dims.bounds(stride)[1]
    if isinstance(stride, int) or highest is None or highest > 0:
        return index if stride == 1 else f"{index} * {text.number(stride)}"
    return f"{index} * -{text.number(-stride)}"


def emit_copy(lowering: Lowering, source: Walked, target: Walked, extents: Shape) -> None:
    """Copy `extents` elements of a type that can be copied between two walks."""
    emit_copies(lowering, [Copy(source, target, extents)])

"""Map: fused pointwise kernels over broadcast operands. The same kernels copy: operands and result may be strided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.gpu.printing import is_printable
from gpu_engine.gpu.text import BITS, KernelText, power_of_two
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Map
from gpu_engine.plan.axes import Axis, Shape, broadcast_strides, collapsed, contiguous_strides
from gpu_engine.plan.lower import Lowering

BLOCK = 1024
"""Elements that a program of four warps computes: eight for each thread, two loads of 16 bytes of float32."""
COLUMNS = 128
"""Of these along the inner axis, where its extent is not known."""
TURNED = 32
"""The side of a square tile where an operand's neighbours are not the result's."""


@dataclass(frozen=True)
class Walked:
    """A buffer as a kernel walks it: from element `offset` on, `strides` in elements for every axis of the result."""

    buffer: int
    strides: tuple[Dim, ...]
    offset: Dim = 0


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


def can_copy(dtype: DType) -> bool:
    """Whether kernels can move elements of this type."""
    return not dtype.hasobject and dtype.itemsize in BITS


def emit_walk(
    lowering: Lowering,
    name: str,
    root: Expr,
    operands: Sequence[Walked],
    out: Walked,
    extents: Shape,
    in_place: tuple[int, ...] = (),
    *,
    bits: bool = False,
) -> None:
    """Launch a kernel that computes the printable `root` for every point of `extents`.

    `in_place` are positions of operands that are read exactly where the result is written.
    """
    used = sorted({node.value for node in expr.walk(root) if node.op == "arg"})
    streams = [out, *(operands[i] for i in used)]
    axes = collapsed(extents, [stream.strides for stream in streams]) or [(1, [1] * len(streams))]
    text = KernelText(lowering, name, bits=bits)
    indices, mask, programs = _tile(text, axes)
    places = [
        " + ".join([text.number(stream.offset)] * (stream.offset != 0) + steps) or "0"
        for i, stream in enumerate(streams)
        for steps in [[_times(text, index, strides[i]) for index, (_, strides) in zip(indices, axes, strict=True)
                       if strides[i] != 0]]
    ]  # fmt: skip
    values = {
        i: text.load(operands[i].buffer, place, mask if _varies(axes, k) else None)
        for k, (i, place) in enumerate(zip(used, places[1:], strict=True), 1)
    }
    result = text.evaluate(root, values)
    text.store(out.buffer, places[0], f"tl.broadcast_to({result}, {mask}.shape)", mask)
    read = tuple(operands[i].buffer for i in used)
    text.launch([programs], read, (out.buffer,), in_place=tuple(k for k, i in enumerate(used) if i in in_place))


def _times(text: KernelText, index: str, stride: Dim) -> str:
    return index if stride == 1 else f"{index} * {text.number(stride)}"


def _varies(axes: Sequence[Axis], stream: int) -> bool:
    """Whether a stream moves with the lanes of a program at all."""
    return any(strides[stream] != 0 for _, strides in axes)


def _tile(text: KernelText, axes: Sequence[Axis]) -> tuple[list[str], str, Dim]:
    """(index along every axis, mask, number of programs) of one program's tile."""
    turned = _turned_axis(axes)
    if len(axes) == 1:
        return _line(text, axes[0][0])
    if turned is not None:
        return _square(text, axes, turned)
    return _rows(text, axes)


def _line(text: KernelText, extent: Dim) -> tuple[list[str], str, Dim]:
    block = min(BLOCK, power_of_two(extent)) if isinstance(extent, int) else BLOCK
    text.line(f"i = tl.program_id(0) * {block} + tl.arange(0, {block})")
    text.line(f"inside = i < {text.number(extent)}")
    return ["i"], "inside", dims.ceil_div(extent, block)


def _rows(text: KernelText, axes: Sequence[Axis]) -> tuple[list[str], str, Dim]:
    """A tile of the inner axis and of all others as one."""
    inner, rows = axes[-1][0], dims.product(extent for extent, _ in axes[:-1])
    columns = min(BLOCK, power_of_two(inner)) if isinstance(inner, int) else COLUMNS
    height = BLOCK // columns
    if isinstance(rows, int):
        height = min(height, power_of_two(rows))
    across = dims.ceil_div(inner, columns)
    text.line(f"r = tl.program_id(0) // {text.number(across)} * {height} + tl.arange(0, {height})[:, None]")
    text.line(f"c = tl.program_id(0) % {text.number(across)} * {columns} + tl.arange(0, {columns})[None, :]")
    text.line(f"inside = (r < {text.number(rows)}) & (c < {text.number(inner)})")
    indices = [*_unravelled(text, "r", [extent for extent, _ in axes[:-1]]), "c"]
    return indices, "inside", dims.ceil_div(rows, height) * across


def _square(text: KernelText, axes: Sequence[Axis], turned: int) -> tuple[list[str], str, Dim]:
    """A tile of the inner axis and of the one along which an operand's elements are neighbours."""
    (inner, _), (other, _) = axes[-1], axes[turned]
    rest = [extent for i, (extent, _) in enumerate(axes[:-1]) if i != turned]
    across, down = dims.ceil_div(inner, TURNED), dims.ceil_div(other, TURNED)
    text.line(f"c = tl.program_id(0) % {text.number(across)} * {TURNED} + tl.arange(0, {TURNED})[None, :]")
    text.line(f"rest = tl.program_id(0) // {text.number(across)}")
    text.line(f"r = rest % {text.number(down)} * {TURNED} + tl.arange(0, {TURNED})[:, None]")
    text.line(f"rest = rest // {text.number(down)}")
    text.line(f"inside = (r < {text.number(other)}) & (c < {text.number(inner)})")
    indices = _unravelled(text, "rest", rest)
    indices.insert(turned, "r")
    return [*indices, "c"], "inside", dims.product([across, down, *rest])


def _turned_axis(axes: Sequence[Axis]) -> int | None:
    """The axis along which an operand that is not contiguous along the inner one is."""
    _, inner = axes[-1]
    for stream, step in enumerate(inner):
        if step not in (0, 1):
            for i, (extent, strides) in enumerate(axes[:-1]):
                if strides[stream] == 1 and not (isinstance(extent, int) and extent < TURNED // 2):
                    return i
    return None


def _unravelled(text: KernelText, index: str, extents: Sequence[Dim]) -> list[str]:
    """Names of the indices along axes of which `index` counts the points."""
    names: list[str] = []
    for extent in reversed(extents[1:]):
        names.insert(0, text.let("i", f"{index} % {text.number(extent)}"))
        index = text.let("i", f"{index} // {text.number(extent)}")
    return [index, *names] if extents else []


def emit_copy(lowering: Lowering, source: Walked, target: Walked, extents: Shape) -> None:
    """Copy `extents` elements of a type that can be copied between two walks."""
    root = expr.arg(0, BITS[lowering.buffers[source.buffer].dtype.itemsize])
    emit_walk(lowering, "copy", root, [source], target, extents, bits=True)

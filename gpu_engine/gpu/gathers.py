"""Gather, GatherElements and GatherND: elements read where indices say.

Negative indices count from the end. A kernel raises no error: where an index lies outside its axis the result is 0,
and nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.walks import Tile, write_inside, write_tile
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT32, INT64, DType, can_copy
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops import Gather, GatherElements, GatherND
from gpu_engine.plan.axes import Axis, Shape, collapsed, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
PROGRAM = "tl.program_id(0)"


def lower_gather(lowering: Lowering, op: Gather, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, indices = node.inputs
    if not _can_gather(x, indices):
        return False
    extent, inner = x.shape[op.axis], dims.product(x.shape[op.axis + 1 :])
    extents = (dims.product(x.shape[: op.axis]), dims.product(indices.shape), inner)
    text = KernelText(lowering, "gather", bits=True)
    tile = write_tile(text, _axes(extents), x.dtype.itemsize, PROGRAM, flat=True)
    outer, which, column = _spread(extents, tile.indices)
    last = f"tl.minimum({which}, {text.number(extents[1])} - 1)"
    place, known = _checked(text, _index(text, inputs[1], indices.dtype, last), extent)
    row = text.let("row", _sum(text, [(outer, extent), (place, 1)]))
    source = _sum(text, [(row, inner), (column, 1)])
    _move(text, inputs[0], outputs[0], tile, extents, source, known)
    text.launch([tile.programs], inputs, outputs)
    return True


def lower_gather_elements(
    lowering: Lowering, op: GatherElements, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    x, indices = node.inputs
    if not _can_gather(x, indices):
        return False
    own = contiguous_strides(x.shape)
    kept = [0 if axis == op.axis else step for axis, step in enumerate(own)]
    axes = collapsed(indices.shape, [contiguous_strides(indices.shape), kept]) or [(1, [1, 0])]
    text = KernelText(lowering, "gather_elements", bits=True)
    narrow = min(x.dtype.itemsize, indices.dtype.itemsize)
    tile = write_tile(text, [(extent, [step]) for extent, (step, _) in axes], narrow, PROGRAM, flat=True)
    here, base = (
        _sum(text, list(zip(tile.indices, [steps[k] for _, steps in axes], strict=True))) for k in range(2)
    )  # fmt: skip
    here = tile.flat or here

    def body(mask: str | None) -> None:
        place, known = _checked(text, _index(text, inputs[1], indices.dtype, here, mask), x.shape[op.axis])
        source = f"{base} + {_sum(text, [(place, own[op.axis])])}"
        known = known if mask is None else f"{mask} & {known}"
        text.store(outputs[0], here, text.load(inputs[0], source, known, "0"), mask)

    write_inside(text, tile, body)
    text.launch([tile.programs], inputs, outputs)
    return True


def lower_gather_nd(lowering: Lowering, op: GatherND, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, indices = node.inputs
    depth = indices.shape[-1]
    if not _can_gather(x, indices) or not isinstance(depth, int) or not depth:
        return False
    own, start = contiguous_strides(x.shape), op.batch_dims
    batch, picked = dims.product(x.shape[:start]), indices.shape[start:-1]
    extents = (batch, dims.product(picked), dims.product(x.shape[start + depth :]))
    text = KernelText(lowering, "gather_nd", bits=True)
    tile = write_tile(text, _axes(extents), x.dtype.itemsize, PROGRAM, flat=True)
    group, which, column = _spread(extents, tile.indices)
    rows = dims.product(extents[:2])
    row = text.let("row", f"tl.minimum({_sum(text, [(group, extents[1]), (which, 1)])}, {text.number(rows)} - 1)")
    terms = [(group, dims.product(x.shape[start:])), (column, 1)]
    checks = []
    for i in range(depth):
        raw = _index(text, inputs[1], indices.dtype, f"{row} * {depth} + {i}")
        place, known = _checked(text, raw, x.shape[start + i])
        terms.append((place, own[start + i]))
        checks.append(known)
    _move(text, inputs[0], outputs[0], tile, extents, _sum(text, terms), " & ".join(checks) or None)
    text.launch([tile.programs], inputs, outputs)
    return True


def _can_gather(x: Value, indices: Value) -> bool:
    return can_copy(x.dtype) and indices.dtype in (INT32, INT64)


def _axes(extents: Shape) -> list[Axis]:
    """Axes of a result as it lies in memory, without those of one element."""
    kept = [extent for extent in extents if extent != 1] or [1]
    return [(extent, [step]) for extent, step in zip(kept, contiguous_strides(tuple(kept)), strict=True)]


def _spread(extents: Shape, indices: Sequence[str]) -> list[str]:
    """The index along every axis: "0" where it has one element."""
    names = iter(indices)
    return ["0" if extent == 1 else next(names) for extent in extents]


def _sum(text: KernelText, terms: Sequence[tuple[str, Dim]]) -> str:
    """The sum of indices times numbers."""
    parts = [
        index if step == 1 else f"{index} * {text.number(step)}"
        for index, step in terms
        if index != "0" and step != 0
    ]  # fmt: skip
    return " + ".join(parts) or "0"


def _index(text: KernelText, buffer: int, dtype: DType, place: str, mask: str | None = None) -> str:
    """The name of signed indices."""
    tail = "" if mask is None else f", mask={mask}, other=0"
    return text.let("k", f"tl.load({text.buffer(buffer)} + ({place}){tail}).to(tl.{dtype}, bitcast=True)")


def _checked(text: KernelText, raw: str, extent: Dim) -> tuple[str, str]:
    """(places along an axis as int32, whether they are inside it)."""
    end = text.parameter(extent, hint=False)
    wrapped = text.let("k", f"tl.where({raw} < 0, {raw} + {end}, {raw})")
    known = text.let("known", f"({wrapped} >= 0) & ({wrapped} < {end})")
    return text.let("k", f"tl.where({known}, {wrapped}, 0).to(tl.int32)"), known


def _move(
    text: KernelText, x: int, out: int, tile: Tile, extents: Shape, source: str, known: str | None
) -> None:  # fmt: skip
    """Lines that copy a tile of the result, which lies in memory as `extents` say."""
    steps = [step for _, (step,) in _axes(extents)]
    target = tile.flat or _sum(text, list(zip(tile.indices, steps, strict=True)))
    shape = f"[{', '.join(map(str, tile.shape))}]"

    source = f"tl.broadcast_to({source}, {shape})"
    known = None if known is None else text.let("known", f"tl.broadcast_to({known}, {shape})")

    def body(mask: str | None) -> None:
        masks = " & ".join(part for part in (mask, known) if part is not None) or None
        value = text.load(x, source, masks, None if masks is None else "0")
        text.store(out, target, f"tl.broadcast_to({value}, {shape})", mask)

    write_inside(text, tile, body)

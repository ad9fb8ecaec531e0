"""How each operation carries the rows of a batch from its operands to its results.

A rule names the result's axis along which the rows lie, or says why there is none. No rule: the batch is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.ir.dims import Dim, Sym, floor_div, product, symbol, symbols
from gpu_engine.ir.graph import Node, Op, Value
from gpu_engine.ir.ops import (
    ArgReduce,
    Attention,
    Concat,
    Conv,
    ConvTranspose,
    Expand,
    Gather,
    GatherElements,
    GatherND,
    LayerNorm,
    LocalResponseNorm,
    Map,
    MatMul,
    Pad,
    Pool,
    Recurrent,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.image import keeps_axis
from gpu_engine.ir.ops.trees import Trees
from gpu_engine.ir.parameters import op_dims
from gpu_engine.passes.operands import operand_shape


@dataclass(frozen=True)
class Free:
    """The same whatever the batch and its size are."""


@dataclass(frozen=True)
class Rows:
    """`axis` is N equal blocks, block i made from row i alone; None: the contents are, in row-major order."""

    axis: int | None


@dataclass(frozen=True)
class Lost:
    """Rows are mixed, out of place, or counted; `reason` names the node that did it."""

    reason: str


State = Free | Rows | Lost
FREE = Free()
Shape = tuple[Dim, ...]
Operand = tuple[Shape, int | None]
"""(shape, the axis of its rows, or None if it is free)."""


class Mixed(Exception):
    """Why an operation loses the batch."""


def node_states(node: Node, states: Sequence[State], name: str) -> tuple[State, ...]:
    """The states of the node's outputs from those of its operands; `name` is the batch symbol."""
    lost = next((state for state in states if isinstance(state, Lost)), None)
    if lost is not None:
        return (lost,) * len(node.outputs)
    try:
        axes = result_axes(node, states, name)
        return tuple(_checked(value, axis, name) for value, axis in zip(node.outputs, axes, strict=True))
    except Mixed as error:
        return (Lost(f"{node.source} {error}"),) * len(node.outputs)


def result_axes(node: Node, states: Sequence[State], name: str) -> tuple[State, ...]:
    """The outputs' states before their shapes are checked; raises Mixed."""
    if not getattr(node.op, "deterministic", True):
        raise Mixed("is random or runs a body of its own")
    if isinstance(node.op, Reshape):
        return (_reshaped(node, states[0], name),)
    if all(state == FREE for state in states):
        return (_expanded(node, name),) if isinstance(node.op, Expand) else _free(node, name)
    axes = [state.axis if isinstance(state, Rows) else None for state in states]
    if any(isinstance(state, Rows) and state.axis is None for state in states):
        raise Mixed("finds no axis of its operand along which the rows of the batch lie")
    if not isinstance(node.op, Expand | Slice | Resize) and counts(node.op, name):
        raise Mixed(f"has a parameter that depends on the batch {name!r}")
    found = carried(node, [(value.shape, axis) for value, axis in zip(node.inputs, axes, strict=True)], name)
    return tuple(Rows(axis) for axis in found) if isinstance(found, tuple) else (Rows(found),)


def _free(node: Node, name: str) -> tuple[State, ...]:
    if counts(node.op, name):
        raise Mixed(f"makes a tensor of the batch {name!r} itself, not of its rows")
    return (FREE,) * len(node.outputs)


def carried(node: Node, operands: list[Operand], name: str) -> int | tuple[int, ...]:
    """The axis of the rows in the result, or in each of them; at least one operand has rows."""
    op, (shape, axis) = node.op, operands[0]
    match op:
        case Map():
            return aligned(operands, node.outputs[0].shape)
        case Reduce():
            at = aligned(operands, operand_shape(node.inputs))
            if at in op.axes:
                raise Mixed("folds the rows of the batch into one")
            return at if op.keepdims else at - sum(other < at for other in op.axes)
        case ArgReduce():
            return without_axis(axis, op.axis, op.keepdims)
        case Softmax():
            return apart(axis, (op.axis,), "normalises over the rows of the batch")
        case LocalResponseNorm():
            return apart(axis, (op.axis,), "normalises over the rows of the batch")
        case LayerNorm():
            at = aligned(operands, shape)
            return apart(at, range(op.axis, len(shape)), "normalises over the rows of the batch")
        case Transpose():
            assert axis is not None
            return op.perm.index(axis)
        case Expand():
            return aligned(operands, op.shape)
        case Concat():
            if any(place == op.axis for _, place in operands):
                raise Mixed("joins tensors along the rows of the batch")
            return aligned(operands, node.outputs[0].shape, every=True)
        case Slice():
            return sliced(op, shape, axis, name)
        case Pad():
            return padded(op, operands)
        case Gather() | GatherElements() | GatherND():
            return gathered(op, operands)
        case MatMul() | Conv() | ConvTranspose():
            result = node.outputs[0].shape
            at = multiplied(op, operands[:2], len(result))
            return aligned([(result, at), *operands[2:]], result)
        case Attention():
            return attended(op, operands, node.outputs[0].shape)
        case Pool():
            return apart(axis, range(2, len(shape)), "pools over the rows of the batch")
        case Resize():
            return resized(op, shape, axis)
        case Recurrent():
            return recurred(op, operands)
        case Trees():
            return apart(axis, (1,), "reads features along the rows of the batch")
        case Array():
            return (kept_apart(op, operands),) * len(node.outputs)
    raise Mixed(f"is not known to keep the rows of the batch apart ({type(op).__name__})")


def aligned(operands: Sequence[Operand], result: Shape, every: bool = False) -> int:
    """The axis of the result for operands that broadcast to it; with `every`, no operand may be free."""
    places = {len(result) - len(shape) + axis for shape, axis in operands if axis is not None}
    if len(places) != 1:
        raise Mixed("combines operands whose rows of the batch lie along different axes")
    (at,) = places
    for shape, axis in operands:
        own = at - len(result) + len(shape)
        extent = shape[own] if own >= 0 else 1
        if extent != result[at] and (axis is not None or extent != 1):
            raise Mixed(f"combines {extent} with {result[at]} elements along the axis of the batch")
        if axis is None and every:
            raise Mixed("joins a tensor that has no rows of the batch to one that has")
        if axis is None and extent != 1:
            raise Mixed("combines every row of the batch with another row of a tensor that is not batched")
    return at


def apart(axis: int | None, others: Sequence[int], what: str) -> int:
    """`axis`, which must be none of `others`; and operand 0 must have it."""
    if axis is None:
        raise Mixed("takes the rows of the batch as a parameter")
    if axis in others:
        raise Mixed(what)
    return axis


def without_axis(axis: int | None, folded: int, keepdims: bool) -> int:
    at = apart(axis, (folded,), "folds the rows of the batch into one")
    return at if keepdims else at - (folded < at)


def sliced(op: Slice, shape: Shape, axis: int | None, name: str) -> int:
    at = apart(axis, (), "")
    if any(name in symbols(start) for start in op.starts):
        raise Mixed(f"starts at a place that depends on the batch {name!r}")
    if op.starts[at] != 0 or op.steps[at] != 1 or op.extents[at] != shape[at]:
        raise Mixed("takes some rows of the batch only")
    return at


def padded(op: Pad, operands: list[Operand]) -> int:
    if any(axis is not None for _, axis in operands[1:]):
        raise Mixed("takes the rows of the batch as a parameter")
    at = apart(operands[0][1], (), "")
    if op.before[at] != 0 or op.after[at] != 0:
        raise Mixed("pads the axis of the batch")
    return at


def gathered(op: Gather | GatherElements | GatherND, operands: list[Operand]) -> int:
    (shape, axis), (indices, at) = operands
    match op:
        case Gather() if axis is None and at is not None:
            return op.axis + at
        case Gather() if axis is not None and at is None and axis != op.axis:
            return axis if axis < op.axis else axis - 1 + len(indices)
        case GatherElements() if axis is not None and axis == at != op.axis and shape[axis] == indices[axis]:
            return axis
        case GatherND() if axis is None and at is not None and op.batch_dims <= at < len(indices) - 1:
            return at
        case GatherND() if axis is not None and axis == at and at < op.batch_dims and shape[axis] == indices[axis]:
            return axis
    raise Mixed("gathers across the rows of the batch")


def multiplied(op: MatMul | Conv | ConvTranspose, operands: list[Operand], rank: int) -> int:
    """The axis of the product's rows; at least one of all operands has rows, perhaps only an epilogue's."""
    (x, axis), (w, at) = operands
    if not isinstance(op, MatMul):
        if at is not None:
            raise Mixed("convolves with weights that depend on the batch")
        if axis != 0:
            raise Mixed("convolves over the rows of the batch")
        return 0
    summed, rows = (len(x) - 2, len(x) - 1) if op.transpose_a else (len(x) - 1, len(x) - 2)
    inner, columns = (len(w) - 1, len(w) - 2) if op.transpose_b else (len(w) - 2, len(w) - 1)
    if axis == summed or at == inner:
        raise Mixed("sums over the rows of the batch")
    if axis == rows or at == columns:
        if axis is not None and at is not None:
            raise Mixed("multiplies every row of the batch with every other")
        return rank - 2 if axis == rows else rank - 1
    lead = [(shape[:-2], place) for shape, place in operands]
    return aligned(lead, _lead_shape(lead, rank - 2))


def _lead_shape(operands: list[Operand], rank: int) -> Shape:
    """The leading axes of a product: along the rows of the batch, those of the operands that have them."""
    result: list[Dim] = [1] * rank
    for shape, axis in operands:
        if axis is not None:
            result[rank - len(shape) + axis] = shape[axis]
    return tuple(result)


def attended(op: Attention, operands: list[Operand], result: Shape) -> int:
    (q, axis), *others = operands
    if axis == len(q) - 2 and not op.causal:
        if any(place is not None for _, place in others[:2]):
            raise Mixed("attends to other rows of the batch")
        return aligned([(result, len(result) - 2), *others[2:]], result)
    if any(place is not None and place >= len(shape) - 2 for shape, place in operands):
        raise Mixed("attends to other rows of the batch")
    lead = [(shape[:-2], place) for shape, place in operands]
    return aligned(lead, result[:-2])


def resized(op: Resize, shape: Shape, axis: int | None) -> int:
    at = apart(axis, (), "")
    if not keeps_axis(op, at, shape[at]):
        raise Mixed("resizes the axis of the batch")
    return at


def kept_apart(op: Array, operands: list[Operand]) -> int:
    (shape, axis), *others = operands
    if op.mixes is None:
        raise Mixed(f"is not known to keep the rows of the batch apart ({type(op).__name__})")
    at = apart(axis, op.mixes, "works along the rows of the batch")
    if any(place != at or extents[at] != shape[at] for extents, place in others[: op.aligned - 1]):
        raise Mixed("combines operands whose rows of the batch lie along different axes")
    if any(place is not None for _, place in others[op.aligned - 1 :]):
        raise Mixed("takes the rows of the batch as a parameter")
    return at


def recurred(op: Recurrent, operands: list[Operand]) -> tuple[int, ...]:
    """Rows of the batch along the axis of the rows of a recurrent network: [T, B, ...] and states [D, B, H]."""
    wanted = {"lengths": 0, "initial_h": 1, "initial_c": 1}
    if "scale" in op.present:
        raise Mixed("quantises its state over all rows of the batch")
    if operands[0][1] != 1 or operands[1][1] is not None:
        raise Mixed("runs along the rows of the batch")
    for name, (shape, axis) in zip(op.present, operands[2:], strict=True):
        if axis != wanted.get(name) or (axis is not None and shape[axis] != operands[0][0][1]):
            raise Mixed(f"has a {name} that does not follow the rows of the batch")
    return (2, 1, 1) if op.kind == "lstm" else (2, 1)


def _reshaped(node: Node, state: State, name: str) -> State:
    """Rows stay contiguous blocks under any shape; they show as an axis if what lies before them stays."""
    if not isinstance(state, Rows):
        return state
    before, after = node.inputs[0].shape, node.outputs[0].shape
    lead = product(before[: state.axis or 0])
    for axis, extent in enumerate(after):
        if multiple(extent, symbol(name)) is not None and product(after[:axis]) == lead:
            return Rows(axis)
    if lead == 1:
        return Rows(None)
    raise Mixed("merges the rows of the batch with what lies before them")


def _expanded(node: Node, name: str) -> State:
    """A free operand repeated for every row."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    axes = [axis for axis, extent in enumerate(after) if name in symbols(extent)]
    if not axes:
        return FREE
    own = axes[0] - len(after) + len(before)
    if len(axes) > 1 or (own >= 0 and before[own] != 1):
        raise Mixed(f"broadcasts to extents that depend on the batch {name!r}")
    return Rows(axes[0])


def _checked(value: Value, state: State, name: str) -> State:
    """The state if the shape bears it out: whole blocks along the axis of the rows, no trace of the batch elsewhere."""
    own = state.axis if isinstance(state, Rows) else None
    if own is not None and multiple(value.shape[own], symbol(name)) is None:
        raise Mixed(f"has {value.shape[own]} elements along the axis of the batch {name!r}")
    if isinstance(state, Rows) and own is None:
        return state
    if any(name in symbols(extent) for axis, extent in enumerate(value.shape) if axis != own):
        raise Mixed(f"makes {value.type}, whose extents depend on the batch {name!r} beside its rows")
    return state


def multiple(extent: Dim, batch: Sym) -> Dim | None:
    """k of an extent k * batch, if k does not depend on the batch."""
    factor = floor_div(extent, batch)
    exact = factor * batch == extent and not symbols(factor) & symbols(batch)
    return factor if exact else None


def counts(op: Op, name: str) -> bool:
    """Whether a parameter of the operation depends on the batch."""
    return any(name in symbols(extent) for extent in op_dims(op))

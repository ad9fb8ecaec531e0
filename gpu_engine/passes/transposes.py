"""Transposes: past pointwise maps and slices, into matrix products, out of detours through merged axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gpu_engine.ir.dims import Dim, product
from gpu_engine.ir.graph import Builder, Graph, Node, Value
from gpu_engine.ir.ops import Map, MatMul, Reshape, Slice, Transpose
from gpu_engine.passes.counting import Uses, only_user, rewrite_counting

Perm = tuple[int, ...]


def clean_transposes(graph: Graph) -> Graph:
    """The graph with fewer and later transposes; what they cancel or fold into is left to `simplify`."""
    return rewrite_counting(graph, _moved)


def _moved(node: Node, builder: Builder, uses: Uses) -> tuple[Value] | None:
    match node.op:
        case Map():
            result = _after_map(node, builder, uses)
        case MatMul():
            result = _into_product(node, builder)
        case Slice():
            result = _after_slice(node, builder)
        case Reshape():
            result = _around_unit_axes(node, builder) or _past_merged_axes(node, builder)
        case Transpose():
            result = _composed(node, builder)
        case _:
            return None
    return None if result is None else (result,)


def transposed(value: Value, builder: Builder) -> tuple[Value, Perm] | None:
    """(source, perm) if a Transpose makes `value`."""
    node = builder.producer(value)
    return (node.inputs[0], node.op.perm) if node is not None and isinstance(node.op, Transpose) else None


def emit_transpose(value: Value, perm: Perm, builder: Builder) -> Value:
    """`value` with its axes permuted, composed with the Transpose that makes it; nothing if the two cancel."""
    found = transposed(value, builder)
    if found is not None:
        value, inner = found
        perm = tuple(inner[axis] for axis in perm)
    return value if perm == tuple(range(len(perm))) else builder.emit(Transpose(perm), value)


def swapped(perm: Perm) -> Perm:
    """`perm` with its last two axes exchanged."""
    return (*perm[:-2], perm[-1], perm[-2])


def _composed(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Transpose)
    return (
        None if transposed(node.inputs[0], builder) is None else emit_transpose(node.inputs[0], node.op.perm, builder)
    )


def _after_map(node: Node, builder: Builder, uses: Uses) -> Value | None:
    """Map(Transpose(x), constants) as Transpose(Map(x, constants)) if nothing else uses the transposed operands."""
    found = {value: transposed(value, builder) for value in node.inputs}
    perms = {pair[1] for pair in found.values() if pair is not None}
    if len(perms) != 1:
        return None
    (perm,) = perms
    inverse = tuple(sorted(range(len(perm)), key=perm.__getitem__))
    operands = []
    for value in node.inputs:
        pair = found[value]
        if pair is not None and only_user(value, node, uses):
            operands.append(pair[0])
        elif pair is None and (moved := _permuted_constant(value, inverse, builder)) is not None:
            operands.append(moved)
        else:
            return None
    return builder.emit(Transpose(perm), builder.emit(node.op, *operands))


def _permuted_constant(value: Value, perm: Perm, builder: Builder) -> Value | None:
    """A constant operand that broadcasts, for operands whose axes are permuted; 0-d values stay as they are."""
    if not value.rank:
        return value
    if value.constant is None or value.rank > len(perm):
        return None
    full = value.constant.reshape((1,) * (len(perm) - value.rank) + value.constant.shape)
    return builder.constant(full.transpose(perm))


def _into_product(node: Node, builder: Builder) -> Value | None:
    """A MatMul that reads its operands' sources with its own flags."""
    op = node.op
    assert isinstance(op, MatMul)
    a, transpose_a = _unswapped(node.inputs[0], op.transpose_a, builder)
    b, transpose_b = _unswapped(node.inputs[1], op.transpose_b, builder)
    if a is node.inputs[0] and b is node.inputs[1]:
        return None
    changed = dataclasses.replace(op, transpose_a=transpose_a, transpose_b=transpose_b)
    return builder.emit(changed, a, b, *node.inputs[2:])


def _unswapped(value: Value, flag: bool, builder: Builder) -> tuple[Value, bool]:
    """An operand and its flag without a swap of the last two axes, as long as that leaves no dearer transpose."""
    found = transposed(value, builder)
    if found is None:
        return value, flag
    source, perm = found
    rest, last = swapped(perm), len(perm) - 1
    if rest != tuple(range(len(perm))) and (rest[-1] != last or perm[-1] == last):
        return value, flag
    return emit_transpose(source, rest, builder), not flag


def _after_slice(node: Node, builder: Builder) -> Value | None:
    """Slice(Transpose(x)) as Transpose(Slice(x)): only what is kept is moved."""
    op = node.op
    assert isinstance(op, Slice)
    found = transposed(node.inputs[0], builder)
    if found is None:
        return None
    source, perm = found
    inverse = tuple(sorted(range(len(perm)), key=perm.__getitem__))
    moved = Slice(
        tuple(op.starts[axis] for axis in inverse),
        tuple(op.steps[axis] for axis in inverse),
        tuple(op.extents[axis] for axis in inverse),
    )
    return builder.emit(Transpose(perm), builder.emit(moved, source))


def _around_unit_axes(node: Node, builder: Builder) -> Value | None:
    """Reshape(Transpose(x)) that only drops extents of 1 as Transpose(Reshape(x)) of fewer axes."""
    (x,), shape = node.inputs, node.outputs[0].shape
    if transposed(x, builder) is None or len(shape) >= x.rank:
        return None
    kept = _kept_axes(x.shape, shape)
    return None if kept is None else _with_axes(x, kept, builder)


def _with_axes(x: Value, kept: Sequence[int], builder: Builder) -> Value:
    """x without its other axes, whose extents are 1; a Transpose that makes x comes after that."""
    found = transposed(x, builder)
    source, perm = found if found is not None else (x, tuple(range(x.rank)))
    order = sorted(perm[axis] for axis in kept)
    dropped = builder.emit(Reshape(tuple(source.shape[axis] for axis in order)), source)
    return emit_transpose(dropped, tuple(order.index(perm[axis]) for axis in kept), builder)


def _kept_axes(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[int] | None:
    """Which axes of `before` are those of `after`, if the rest are extents of 1."""
    kept: list[int] = []
    for axis, extent in enumerate(before):
        if len(kept) < len(after) and extent == after[len(kept)]:
            kept.append(axis)
        elif extent != 1:
            return None
    return kept if len(kept) == len(after) else None


def _past_merged_axes(node: Node, builder: Builder) -> Value | None:
    """Reshape(Transpose(Reshape(x))) that merges leading axes, leaves them in front and parts them again, but for
    extents of 1 at the very front."""
    shape = node.outputs[0].shape
    outer = transposed(node.inputs[0], builder)
    inner = None if outer is None else builder.producer(outer[0])
    if outer is None or inner is None or not isinstance(inner.op, Reshape):
        return None
    (merged, perm), (x,) = outer, inner.inputs
    extra = max(0, x.rank - len(shape))
    if any(extent != 1 for extent in x.shape[:extra]):
        return None
    own = x.shape[extra:]
    lead, tail = len(own) - merged.rank + 1, merged.rank - 1
    if lead < 1 or perm[0] != 0 or merged.shape[1:] != own[lead:] or len(shape) != len(own):
        return None
    if merged.shape[0] != product(own[:lead]) or shape[:lead] != own[:lead]:
        return None
    full = (*range(lead), *(axis - 1 + lead for axis in perm[1:]))
    if shape != tuple(own[axis] for axis in full) or tail < 1:
        return None
    return emit_transpose(_with_axes(x, range(extra, x.rank), builder) if extra else x, full, builder)

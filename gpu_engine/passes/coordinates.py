"""Gathers at counted coordinates, which move nothing: out[b, h, q, k] = x[b, k] is x under another shape.

Exporters of vectorised mask functions write GatherND at indices that are Concat of broadcast Ranges.
"""

from __future__ import annotations

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Concat, Expand, GatherND, Iota, Reshape, Transpose


def resolve_coordinates(graph: Graph) -> Graph:
    """The graph without GatherNDs whose indices count along the axes that they index."""
    return rewrite(graph, _resolved)


def _resolved(node: Node, builder: Builder) -> tuple[Value] | None:
    if not isinstance(node.op, GatherND) or node.op.batch_dims:
        return None
    x, indices = node.inputs
    joined = builder.producer(indices)
    if joined is None or not isinstance(joined.op, Concat) or joined.op.axis != indices.rank - 1:
        return None
    axes = [counted_axis(part, builder) for part in joined.inputs if part.shape[-1] == 1]
    if len(axes) != len(joined.inputs) or None in axes or len(set(axes)) != len(axes):
        return None
    places = [axis for axis in axes if axis is not None]
    if any(x.shape[i] != indices.shape[axis] for i, axis in enumerate(places)):
        return None
    return (_spread(x, places, indices.shape[:-1], node.outputs[0].shape, builder),)


def _spread(x: Value, places: list[int], grid: tuple[Dim, ...], shape: tuple[Dim, ...], builder: Builder) -> Value:
    """x whose leading axis i becomes axis places[i] of `grid`, broadcast along the others."""
    rest = tuple(range(len(places), x.rank))
    order = tuple(sorted(range(len(places)), key=places.__getitem__))
    ordered = x if order == tuple(range(len(places))) else builder.emit(Transpose((*order, *rest)), x)
    thin = tuple(extent if axis in places else 1 for axis, extent in enumerate(grid))
    placed = builder.emit(Reshape((*thin, *shape[len(grid) :])), ordered)
    return placed if placed.shape == shape else builder.emit(Expand(shape), placed)


def counted_axis(value: Value, builder: Builder) -> int | None:
    """The axis along which `value` counts 0, 1, 2, ... while it is constant along the others; None if it does not."""
    node = builder.producer(value)
    match node.op if node is not None else None:
        case Iota():
            return 0
        case Reshape():
            assert node is not None
            axis = counted_axis(node.inputs[0], builder)
            return None if axis is None else _same_axis(axis, node.inputs[0].shape, value.shape)
        case Expand():
            assert node is not None
            (source,) = node.inputs
            axis = counted_axis(source, builder)
            moved = value.rank - source.rank + (axis or 0)
            return None if axis is None or value.shape[moved] != source.shape[axis] else moved
    return None


def _same_axis(axis: int, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> int | None:
    """Where a Reshape that only adds or drops extents of 1 puts an axis of another extent."""
    old = [i for i, extent in enumerate(before) if extent != 1]
    new = [i for i, extent in enumerate(after) if extent != 1]
    if axis not in old or [before[i] for i in old] != [after[i] for i in new]:
        return None
    return new[old.index(axis)]

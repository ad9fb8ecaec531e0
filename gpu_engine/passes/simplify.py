"""Operations that do nothing, or nothing new: each rule looks at one node and what makes its operands."""

from __future__ import annotations

from collections.abc import Callable

from gpu_engine.ir.dims import Dim, Sym
from gpu_engine.ir.folding import hidden_nbytes, shrunk
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Attention, Concat, Expand, Gather, Map, MatMul, Pad, Reduce, Reshape, Slice, Transpose
from gpu_engine.passes.casts import without_needless_casts
from gpu_engine.passes.operands import emit_fewest, fewest, operand_shape, tidy


def simplify(graph: Graph) -> Graph:
    """The graph without identities, with constants of one element as literals and casts merged."""
    return rewrite(graph, simplified)


def simplified(node: Node, builder: Builder) -> tuple[Value] | None:
    rule = RULES.get(type(node.op))
    result = rule(node, builder) if rule is not None else None
    return None if result is None else (result,)


def _reshape(node: Node, builder: Builder) -> Value | None:
    (x,) = node.inputs
    assert isinstance(node.op, Reshape)
    if x.shape == node.op.shape:
        return x
    inner = builder.producer(x)
    if inner is None or not isinstance(inner.op, Reshape):
        return None
    (source,) = inner.inputs
    return source if source.shape == node.op.shape else builder.emit(node.op, source)


def _transpose(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Transpose)
    perm, (x,) = node.op.perm, node.inputs
    inner = builder.producer(x)
    if inner is not None and isinstance(inner.op, Transpose):
        perm, (x,) = tuple(inner.op.perm[axis] for axis in perm), inner.inputs
    if perm == tuple(range(len(perm))):
        return x
    moved = [axis for axis in perm if x.shape[axis] != 1]
    if moved == sorted(moved):
        return builder.emit(Reshape(tuple(x.shape[axis] for axis in perm)), x)
    return None if perm == node.op.perm else builder.emit(Transpose(perm), x)


def _expand(node: Node, builder: Builder) -> Value | None:
    (x,) = node.inputs
    assert isinstance(node.op, Expand)
    if x.shape == node.op.shape:
        return x
    inner = builder.producer(x)
    return builder.emit(node.op, *inner.inputs) if inner is not None and isinstance(inner.op, Expand) else None


def _concat(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Concat)
    axis = node.op.axis
    kept = [value for value in node.inputs if value.shape[axis] != 0]
    if len(kept) == 1 and kept[0].shape == node.outputs[0].shape:
        return kept[0]
    return builder.emit(node.op, *kept) if 0 < len(kept) < len(node.inputs) else None


def _slice(node: Node, builder: Builder) -> Value | None:
    (x,) = node.inputs
    assert isinstance(node.op, Slice)
    whole = x.shape == node.op.extents and not any(map(nonzero, node.op.starts))
    return x if whole and all(step == 1 for step in node.op.steps) else None


def _pad(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Pad)
    x: Value = node.inputs[0]
    return None if any(map(nonzero, (*node.op.before, *node.op.after))) else x


def _gather(node: Node, builder: Builder) -> Value | None:
    """One slice at a place known to lie inside a known extent: a Slice, which costs less and checks nothing."""
    assert isinstance(node.op, Gather)
    (x, indices), axis = node.inputs, node.op.axis
    extent = x.shape[axis]
    if indices.constant is None or indices.constant.size != 1 or x.known is not None or not isinstance(extent, int):
        return None
    index = int(indices.constant.reshape(()))
    if not -extent <= index < extent:
        return None
    starts: list[Dim] = [0] * x.rank
    starts[axis] = index % extent
    extents = tuple(1 if i == axis else dim for i, dim in enumerate(x.shape))
    one = builder.emit(Slice(tuple(starts), (1,) * x.rank, extents), x)
    return builder.emit(Reshape(node.outputs[0].shape), one)


def _reduce(node: Node, builder: Builder) -> Value | None:
    op = node.op
    assert isinstance(op, Reduce)
    if op.before is not None:
        before, inputs = tidy(without_needless_casts(op.before), node.inputs)
        if before is op.before and inputs == node.inputs:
            return None
        plain = before.op == "arg" and inputs[0].shape == operand_shape(inputs)
        return builder.emit(Reduce(op.kind, op.axes, op.keepdims, None if plain else before, op.after), *inputs)
    (x,) = node.inputs
    if op.after is None and all(x.shape[axis] == 1 for axis in op.axes):
        return builder.emit(Reshape(node.outputs[0].shape), x)
    return None


def _map(node: Node, builder: Builder) -> Value | None:
    assert isinstance(node.op, Map)
    shape = operand_shape(node.inputs)
    inputs = tuple(_operand(value, builder) for value in node.inputs)
    simpler, kept = fewest(without_needless_casts(node.op.expr), inputs)
    if simpler is node.op.expr and kept == node.inputs and not (simpler.op == "arg" and kept[0].shape == shape):
        return None
    return emit_fewest(simpler, kept, shape, builder)


def _operand(value: Value, builder: Builder) -> Value:
    """What broadcasts to the value: the operand of an Expand, a constant without the places that repeat others."""
    if value.constant is None:
        return _unexpanded(value, builder)
    return builder.constant(shrunk(value.constant), value.name) if hidden_nbytes(value.constant) else value


def _unexpanded(value: Value, builder: Builder) -> Value:
    inner = builder.producer(value)
    return inner.inputs[0] if inner is not None and isinstance(inner.op, Expand) else value


def _product(node: Node, builder: Builder) -> Value | None:
    """A product or attention that broadcasts its operands itself, instead of an Expand."""
    inputs = list(node.inputs)
    for i, value in enumerate(node.inputs):
        inputs[i] = _unexpanded(value, builder)
        if inputs[i].rank < 2 or node.op.infer(*(operand.type for operand in inputs))[0] != node.outputs[0].type:
            inputs[i] = value
    return None if tuple(inputs) == node.inputs else builder.emit(node.op, *inputs)


def nonzero(dim: Dim) -> bool:
    return isinstance(dim, Sym) or dim != 0


RULES: dict[type, Callable[[Node, Builder], Value | None]] = {
    Reshape: _reshape, Transpose: _transpose, Expand: _expand, Concat: _concat, Slice: _slice, Pad: _pad,
    Gather: _gather, Reduce: _reduce, Map: _map, MatMul: _product, Attention: _product,
}  # fmt: skip

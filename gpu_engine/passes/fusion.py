"""Pointwise fusion: maps into maps, into the operands and results of reductions, into epilogues.

A map that one kernel alone uses moves into it. Once nothing moves any more, cheap maps over one full operand are
computed again by every user, which costs less than storing what they make. A map is not computed over more elements
than it has, unless it is next to nothing.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING, compute_dtype, is_integer
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, Value
from gpu_engine.ir.ops import Map, Reduce
from gpu_engine.ir.ops.reduction import fuse_after
from gpu_engine.passes.counting import Uses, only_user, rewrite_counting
from gpu_engine.passes.epilogues import into_epilogue, past_reshape
from gpu_engine.passes.operands import Operands, fits, inlined, operand_shape, same_extents, tidy

CHEAP = frozenset(
    {"add", "sub", "mul", "neg", "abs", "min", "max", "lt", "le", "eq", "where", "and", "or", "not", "cast"}
)
CHEAP_OPERATIONS, TRIVIAL_OPERATIONS, MAX_ROUNDS = 3, 2, 6


def fuse_pointwise(graph: Graph) -> Graph:
    """The graph with as few pointwise kernels, and as few stored intermediate results, as the rules above allow."""
    for repeat in (False, True):
        for _ in range(MAX_ROUNDS):
            count = len(graph.nodes)
            shared = _pointwise_only(graph) if repeat else frozenset()
            graph = rewrite_counting(graph, partial(_fused, shared=shared))
            if len(graph.nodes) == count:
                break
    return graph


def _pointwise_only(graph: Graph) -> frozenset[Value]:
    """The values that are used by maps and reductions over as many elements and by nothing else."""
    found: set[Value] = set()
    others = set(graph.outputs)
    for node in graph.nodes:
        shape = operand_shape(node.inputs) if isinstance(node.op, Map | Reduce) else None
        for value in node.inputs:
            (found if shape is not None and same_extents(value.shape, shape) else others).add(value)
    return frozenset(found - others)


def _fused(node: Node, builder: Builder, uses: Uses, shared: frozenset[Value]) -> tuple[Value] | None:
    match node.op:
        case Map():
            grown = _grown((node.op.expr, node.inputs), node, builder, uses, shared)
            result = _after_reduction(grown, node, builder, uses) or into_epilogue(grown, node, builder, uses)
            result = result or past_reshape(grown, node, builder, uses)
            if result is None and grown[1] != node.inputs:
                result = builder.emit(Map(grown[0]), *grown[1])
        case Reduce():
            before = node.op.before or expr.arg(0, node.inputs[0].dtype)
            grown = _grown((before, node.inputs), node, builder, uses, shared)
            changed = grown[1] != node.inputs
            result = builder.emit(dataclasses.replace(node.op, before=grown[0]), *grown[1]) if changed else None
        case _:
            return None
    return None if result is None else (result,)


def _grown(operands: Operands, node: Node, builder: Builder, uses: Uses, shared: frozenset[Value]) -> Operands:
    """The expression of `node` with the maps that make its operands drawn in, one after the other."""
    shape = operand_shape(operands[1])
    for value in dict.fromkeys(operands[1]):
        inner = builder.producer(value)
        if inner is None or not isinstance(inner.op, Map) or not _worthwhile(value, inner, node, shape, uses, shared):
            continue
        candidate = tidy(*inlined(*operands, {value: (inner.op.expr, inner.inputs)}))
        if fits(candidate) and operand_shape(candidate[1]) == shape:
            operands = candidate
    return operands


def _worthwhile(
    value: Value, inner: Node, node: Node, shape: tuple[Dim, ...], uses: Uses, shared: frozenset[Value]
) -> bool:
    assert isinstance(inner.op, Map)
    root = inner.op.expr
    if _wraps(root) or any(operand.dtype == STRING for operand in (value, *inner.inputs)):
        return False
    alone, whole = only_user(value, node, uses), same_extents(value.shape, shape)
    if alone and whole:
        return True
    if alone or value in shared:
        full = sum(same_extents(operand.shape, value.shape) for operand in inner.inputs)
        return is_cheap(root, TRIVIAL_OPERATIONS) if alone else full <= 1 and is_cheap(root, CHEAP_OPERATIONS)
    return False


def _wraps(root: Expr) -> bool:
    """Whether storing the result cuts off bits that the expression still has: integers computed in a wider type."""
    return is_integer(root.dtype) and compute_dtype(root.dtype) != root.dtype and root.op not in ("cast", "arg")


def is_cheap(root: Expr, limit: int) -> bool:
    operations = [node for node in expr.walk(root) if node.args]
    return len(operations) <= limit and all(node.op in CHEAP for node in operations)


def _after_reduction(operands: Operands, node: Node, builder: Builder, uses: Uses) -> Value | None:
    """A map of a reduction's result alone as the reduction's `after`."""
    root, inputs = operands
    made = builder.producer(inputs[0]) if len(inputs) == 1 else None
    if made is None or not isinstance(made.op, Reduce) or not only_user(inputs[0], node, uses):
        return None
    op = fuse_after(made.op, root)
    cut = made.op.after is not None and _wraps(made.op.after)
    fused = op.after is not None and fits((op.after, inputs)) and not cut
    return builder.emit(op, *made.inputs) if fused else None

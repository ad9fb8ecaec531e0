"""Comparisons whose outcome is known because an operand counts from 0 up."""

from __future__ import annotations

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BOOL
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite
from gpu_engine.ir.ops import Map
from gpu_engine.passes.coordinates import counted_axis
from gpu_engine.passes.operands import emit_fewest, operand_shape


def decide_comparisons(graph: Graph) -> Graph:
    """The graph without tests whether a count is negative (masks of exported attention have them)."""
    return rewrite(graph, _decided)


def _decided(node: Node, builder: Builder) -> tuple[Value] | None:
    if not isinstance(node.op, Map):
        return None
    outcomes = {test: _outcome(test, node.inputs, builder) for test in expr.walk(node.op.expr)}
    known = {test: expr.const(outcome, BOOL) for test, outcome in outcomes.items() if outcome is not None}
    if not known:
        return None
    return (emit_fewest(expr.replace(node.op.expr, known), node.inputs, operand_shape(node.inputs), builder),)


def _outcome(test: Expr, inputs: tuple[Value, ...], builder: Builder) -> bool | None:
    """Whether the comparison always holds or never does; None if it depends."""
    match test:
        case Expr(op="le", args=(Expr(op="const", value=bound), Expr(op="arg", value=index))) if bound <= 0:
            outcome = True
        case Expr(op="lt", args=(Expr(op="const", value=bound), Expr(op="arg", value=index))) if bound < 0:
            outcome = True
        case Expr(op="lt", args=(Expr(op="arg", value=index), Expr(op="const", value=bound))) if bound <= 0:
            outcome = False
        case _:
            return None
    return outcome if counted_axis(inputs[index], builder) is not None else None

"""Operand lists of expressions: one slot per distinct value, one-element constants as literals, nothing unused."""

from __future__ import annotations

from collections.abc import Mapping

from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Expand, Map
from gpu_engine.ir.ops.pointwise import broadcast_shapes

Operands = tuple[Expr, tuple[Value, ...]]
MAX_OPERANDS, MAX_NODES = 8, 200


def literal(value: Value) -> Expr | None:
    """The constant expression of a value whose elements are all the same, where that is seen at once."""
    array = value.constant
    if array is None or value.dtype == STRING or not array.size:
        return None
    return expr.const(array[(0,) * array.ndim], value.dtype) if array.size == 1 or not any(array.strides) else None


def tidy(root: Expr, inputs: tuple[Value, ...]) -> Operands:
    """The same function of as few operands as give the same shape."""
    tidied, kept = fewest(root, inputs)
    same = kept == inputs or (bool(kept) and operand_shape(kept) == operand_shape(inputs))
    return (tidied, kept) if same else (root, inputs)


def fewest(root: Expr, inputs: tuple[Value, ...]) -> Operands:
    """The same function of the operands that it depends on: perhaps none, perhaps of a shape that broadcasts."""
    used = sorted({node.value for node in expr.walk(root) if node.op == "arg"})
    kept: dict[Value, Expr] = {}
    replaced: dict[int, Expr] = {}
    for index in used:
        value = inputs[index]
        constant = literal(value)
        if constant is None:
            constant = kept.setdefault(value, expr.arg(len(kept), value.dtype))
        replaced[index] = constant
    if tuple(kept) == inputs:
        return root, inputs
    simpler = expr.substitute(root, replaced)
    return _dense(simpler, kept)


def _dense(root: Expr, kept: Mapping[Value, Expr]) -> Operands:
    """`root` over those of `kept` that simplification has left in it."""
    used = sorted({node.value for node in expr.walk(root) if node.op == "arg"})
    values = tuple(kept)
    if len(used) == len(values):
        return root, values
    places = {old: expr.arg(new, values[old].dtype) for new, old in enumerate(used)}
    return expr.substitute(root, places), tuple(values[old] for old in used)


def emit_fewest(root: Expr, inputs: tuple[Value, ...], shape: tuple[Dim, ...], builder: Builder) -> Value:
    """The Map of the fewest operands, computed once and broadcast to `shape` where those alone do not give it."""
    simpler, kept = fewest(root, inputs)
    if not kept:
        result = builder.constant(expr.evaluate(simpler, []))
    elif simpler.op == "arg":
        result = kept[0]
    else:
        result = builder.emit(Map(simpler), *kept)
    return result if result.shape == shape else builder.emit(Expand(shape), result)


def inlined(outer: Expr, outer_inputs: tuple[Value, ...], made: Mapping[Value, Operands]) -> Operands:
    """`outer` with every operand that `made` defines replaced by its definition."""
    slots: dict[Value, Expr] = {}

    def slot(value: Value) -> Expr:
        return slots.setdefault(value, expr.arg(len(slots), value.dtype))

    replaced = {}
    for index, value in enumerate(outer_inputs):
        if value in made:
            inner, inner_inputs = made[value]
            replaced[index] = expr.substitute(inner, {i: slot(operand) for i, operand in enumerate(inner_inputs)})
        else:
            replaced[index] = slot(value)
    return expr.substitute(outer, replaced), tuple(slots)


def operand_shape(inputs: tuple[Value, ...]) -> tuple[Dim, ...]:
    return broadcast_shapes(*(value.shape for value in inputs))


def same_extents(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    """Whether the shapes are equal but for leading extents of 1."""
    return strip(a) == strip(b)


def strip(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def fits(operands: Operands) -> bool:
    """Whether a kernel of this expression stays small enough to compile quickly and to keep its values in registers."""
    root, inputs = operands
    return len(inputs) <= MAX_OPERANDS and len(expr.walk(root)) <= MAX_NODES

"""Pointwise maps of a product as the product's epilogue; maps from behind a Reshape into what the Reshape is of."""

from __future__ import annotations

import dataclasses

from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Node, Value
from gpu_engine.ir.ops import Conv, ConvTranspose, Map, MatMul, Reshape
from gpu_engine.passes.counting import Uses, only_user
from gpu_engine.passes.operands import Operands, fits, inlined, operand_shape, tidy

Product = Conv | ConvTranspose | MatMul


def into_epilogue(operands: Operands, node: Node, builder: Builder, uses: Uses) -> Value | None:
    """The map `operands` of `node` as part of a product that only `node` uses, the last made one if there are more."""
    shape = node.outputs[0].shape
    found = []
    for value in dict.fromkeys(operands[1]):
        made = builder.producer(value)
        if made is None or value.shape != shape or not only_user(value, node, uses):
            continue
        if isinstance(made.op, Product):
            found.append((made, operands, value))
        elif (moved := before_reshape(operands, made, builder, uses)) and isinstance(moved[0].op, Product):
            found.append(moved)
    if len(found) > 1:
        found.sort(key=lambda candidate: builder.nodes.index(candidate[0]))
    for made, mapped, value in reversed(found):
        result = _with_epilogue(made, mapped, value, builder)
        if result is not None:
            return result if result.shape == shape else builder.emit(Reshape(shape), result)
    return None


def _with_epilogue(made: Node, operands: Operands, value: Value, builder: Builder) -> Value | None:
    """The product of `made` whose epilogue ends in the map of `value` and other operands."""
    op = made.op
    assert isinstance(op, Product)
    factors, extras = made.inputs[:2], made.inputs[2:]
    product = Value(dataclasses.replace(op, epilogue=None).infer(*(factor.type for factor in factors))[0])
    inner = op.epilogue or expr.arg(0, product.dtype)
    root, inputs = tidy(*inlined(operands[0], operands[1], {value: (inner, (product, *extras))}))
    if product not in inputs or not fits((root, inputs)):
        return None
    rest = tuple(operand for operand in inputs if operand is not product)
    order = {operand: i for i, operand in enumerate((product, *rest))}
    places = {i: expr.arg(order[operand], operand.dtype) for i, operand in enumerate(inputs)}
    epilogue = expr.substitute(root, places)
    if any(operand.rank > product.rank for operand in rest):
        return None
    return builder.emit(dataclasses.replace(op, epilogue=epilogue), *factors, *rest)


def past_reshape(operands: Operands, node: Node, builder: Builder, uses: Uses) -> Value | None:
    """Map(Reshape(Map(x))) as Reshape(Map(x))."""
    for value in dict.fromkeys(operands[1]):
        made = builder.producer(value)
        alone = made is not None and value.shape == node.outputs[0].shape and only_user(value, node, uses)
        moved = before_reshape(operands, made, builder, uses) if made is not None and alone else None
        if moved is None or not isinstance(moved[0].op, Map):
            continue
        inner, (root, inputs), source = moved
        merged = tidy(*inlined(root, inputs, {source: (moved[0].op.expr, inner.inputs)}))
        if fits(merged) and operand_shape(merged[1]) == source.shape:
            return builder.emit(Reshape(value.shape), builder.emit(Map(merged[0]), *merged[1]))
    return None


def before_reshape(
    operands: Operands, reshape: Node, builder: Builder, uses: Uses
) -> tuple[Node, Operands, Value] | None:
    """(node, map, its result) for a map of the reshaped result of a node, the other operands fitted to that result."""
    source = reshape.inputs[0] if isinstance(reshape.op, Reshape) else None
    made = None if source is None else builder.producer(source)
    if source is None or made is None or not isinstance(made.op, Product | Map):
        return None
    if not only_user(source, reshape, uses):
        return None
    outer, inner = reshape.outputs[0].shape, source.shape
    moved = []
    for value in operands[1]:
        if value is reshape.outputs[0]:
            moved.append(source)
            continue
        fitted = _fitted_shape(value.shape, outer, inner)
        if fitted is None:
            return None
        moved.append(value if fitted == value.shape else builder.emit(Reshape(fitted), value))
    return made, (operands[0], tuple(moved)), source


def _fitted_shape(shape: tuple[Dim, ...], outer: tuple[Dim, ...], inner: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """The shape in which an operand that broadcasts to `outer` broadcasts to `inner`, the same elements elsewhere."""
    if outer[len(outer) - len(shape) :] == inner[max(0, len(inner) - len(shape)) :]:
        return shape
    old = [axis for axis, extent in enumerate(outer) if extent != 1]
    new = [axis for axis, extent in enumerate(inner) if extent != 1]
    if [outer[axis] for axis in old] != [inner[axis] for axis in new]:
        return None
    full = (1,) * (len(outer) - len(shape)) + shape
    fitted: list[Dim] = [1] * len(inner)
    for before, after in zip(old, new, strict=True):
        fitted[after] = full[before]
    return tuple(fitted)

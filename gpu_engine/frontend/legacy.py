"""Opset upgrades: nodes of opsets before 7 rewritten in the forms of opset 7."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.model import ModelNode
from gpu_engine.ir.dtypes import ONNX_NUMBER, STRING

OLDEST_OPSET = 7
DROPPED = ("consumed_inputs", "is_test", "output_sequence")
"""Attributes that say nothing about inference."""
BROADCASTING = {"Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"}
DEFAULTS: Mapping[tuple[str, int], Mapping[str, Any]] = {
    ("Concat", 4): {"axis": 1},
    ("Selu", 6): {"alpha": 1.6732, "gamma": 1.0507},
}
"""Defaults that held before an opset."""
Ranks = Sequence[int | None]


def upgrade(node: ModelNode, version: int, ranks: Ranks) -> tuple[ModelNode, ...]:
    """Nodes in opset 7's forms that do what `node` of opset `version` < 7 does; `ranks` are its inputs' ranks.

    Dropout and BatchNormalization run as in inference whatever their is_test says.
    """
    attributes = {name: value for name, value in node.attributes.items() if name not in DROPPED}
    for (name, until), defaults in DEFAULTS.items():
        if node.op_type == name and version < until:
            attributes = {**defaults, **attributes}
    node = replace(node, attributes=attributes)
    if node.op_type in BROADCASTING:
        return _broadcasting(node, ranks)
    rule = RULES.get(node.op_type)
    return rule(node, ranks) if rule else (node,)


def _broadcasting(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    """`axis` says which axis of the first operand the first axis of the second one meets."""
    attributes = dict(node.attributes)
    axis, broadcast = attributes.pop("axis", None), attributes.pop("broadcast", 0)
    node = replace(node, attributes=attributes)
    if not broadcast or axis is None:
        return (node,)
    left, right = ranks
    if left is None or right is None:
        raise InvalidModel(f"{node.op_type} with an axis needs tensors")
    trailing = left - (axis + left if axis < 0 else axis) - right
    return _with_trailing_axes(node, right, trailing)


def _prelu(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    """A slope of one axis belongs to the channels."""
    left, right = ranks
    if right != 1 or left is None:
        return (node,)
    return _with_trailing_axes(node, 1, left - 2)


def _with_trailing_axes(node: ModelNode, rank: int, count: int) -> tuple[ModelNode, ...]:
    """The node behind an Unsqueeze that gives its second input `count` more axes at the end."""
    if count < 0:
        raise InvalidModel(f"{node.op_type}: the second input has too many axes")
    if count == 0:
        return (node,)
    name = f"{node.outputs[0]}/{node.inputs[1]}"
    axes = tuple(range(rank, rank + count))
    unsqueeze = ModelNode("Unsqueeze", "", (node.inputs[1],), (name,), {"axes": axes}, node.name)
    return unsqueeze, replace(node, inputs=(node.inputs[0], name, *node.inputs[2:]))


def _gemm(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    return (replace(node, attributes={k: v for k, v in node.attributes.items() if k != "broadcast"}),)


def _cast(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    """`to` was an element type's name."""
    to = node.attributes.get("to")
    if not isinstance(to, str):
        return (node,)
    numbers = {str(dtype).upper(): number for dtype, number in ONNX_NUMBER.items() if dtype != STRING}
    numbers |= {"FLOAT": 1, "STRING": 8, "DOUBLE": 11}
    if to.upper() not in numbers:
        raise InvalidModel(f"Cast to {to!r}")
    return (replace(node, attributes={"to": numbers[to.upper()]}),)


def _pad(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    renamed = {"pads" if name == "paddings" else name: value for name, value in node.attributes.items()}
    return (replace(node, attributes=renamed),)


def _reshape(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    """The shape was an attribute."""
    if "shape" not in node.attributes:
        return (node,)
    name = f"{node.outputs[0]}/shape"
    value = np.array(node.attributes["shape"], np.int64)
    constant = ModelNode("Constant", "", (), (name,), {"value": value}, node.name)
    return constant, replace(node, inputs=(node.inputs[0], name), attributes={})


def _upsample(node: ModelNode, ranks: Ranks) -> tuple[ModelNode, ...]:
    attributes = dict(node.attributes)
    if "height_scale" not in attributes or "width_scale" not in attributes:
        return (node,)
    scales = (1.0, 1.0, attributes.pop("height_scale"), attributes.pop("width_scale"))
    return (replace(node, attributes={**attributes, "scales": scales}),)


RULES: Mapping[str, Callable[[ModelNode, Ranks], tuple[ModelNode, ...]]] = {
    "Cast": _cast,
    "Gemm": _gemm,
    "PRelu": _prelu,
    "Pad": _pad,
    "Reshape": _reshape,
    "Upsample": _upsample,
}

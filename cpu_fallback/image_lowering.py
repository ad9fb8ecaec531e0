"""Lowerings of operations over images whose channels are the last axis."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_fallback.channels_last import LastConv, LastConvTranspose, LastPool
from cpu_fallback.conv_lowering import Layer, Operand, emit_conv, emit_transposed
from cpu_fallback.epilogues import Finish, finish_of
from cpu_fallback.native import host
from cpu_fallback.pooling import pool_call
from gpu_engine.ir.graph import Node
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_last_conv(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    finish = _finish(op, node, inputs)
    weights = node.inputs[1].constant
    if finish is None or weights is None:
        return False
    emit_conv(_layer(lowering, node, inputs, outputs, finish, planar=op.planar), op.form, weights)
    return True


def lower_last_conv_transpose(
    lowering: Lowering, op: LastConvTranspose, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:
    finish = _finish(op, node, inputs)
    weights = node.inputs[1].constant
    if finish is None or weights is None:
        return False
    emit_transposed(_layer(lowering, node, inputs, outputs, finish), op.form, weights)
    return True


def lower_last_pool(lowering: Lowering, op: LastPool, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    call = pool_call(op.form, (inputs[0], node.inputs[0].shape), (outputs[0], node.outputs[0].shape), host())
    if call is None:
        return False
    lowering.emit(call, inputs, outputs)
    return True


def _finish(op: LastConv | LastConvTranspose, node: Node, inputs: Sequence[int]) -> Finish | None:
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    return finish_of(op.epilogue, extras, node.outputs[0].shape, host())


def _layer(
    lowering: Lowering, node: Node, inputs: Buffers, outputs: Buffers, finish: Finish, *, planar: bool = False
) -> Layer:  # fmt: skip
    x, out = Operand(inputs[0], node.inputs[0].shape), Operand(outputs[0], node.outputs[0].shape)
    return Layer(lowering, host(), x, out, finish, planar)

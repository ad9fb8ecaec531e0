"""Lowerings of operations over images whose channels are the last axis."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_fallback.conv_lowering import Layer, Operand, emit_conv, emit_transposed
from cpu_fallback.epilogues import Finish, finish_of, operand_kind
from cpu_fallback.gemm import emit_product
from cpu_fallback.native import host
from cpu_fallback.pooling import pool_call
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node, TensorType, Value
from gpu_engine.ir.ops import MatMul
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
FEW_PIXELS, SOME_PIXELS, MANY_CHANNELS = 64, 256, 1024
"""1x1 convolutions of so few pixels, or of some and many channels, are matrix products (benchmarks/conv.py)."""


def lower_last_conv(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if is_product(op, node) and _emit_rows(lowering, op, node, inputs, outputs):
        return True
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
    x, out = node.inputs[0], node.outputs[0]
    call = pool_call(op.form, (inputs[0], x.shape), (outputs[0], out.shape), host(), x.dtype)
    if call is None:
        return False
    lowering.emit(call, inputs, outputs)
    return True


def is_product(op: LastConv, node: Node) -> bool:
    """Whether this is a product of float32 matrices that a row for every pixel makes, and faster as such: parts of its
    depth stay in the first cache."""
    x, w = node.inputs[:2]
    unit = all(extent == 1 for extent in (*w.shape[2:], *op.strides)) and not any((*op.before, *op.after))
    inside = x.shape[2:] if op.planar else x.shape[1:-1]
    if not unit or op.group > 1 or not x.dtype == w.dtype == FLOAT32:
        return False
    if all(extent == 1 for extent in inside):
        return True
    pixels, result = dims.product(inside), node.outputs[0].shape
    if op.planar or any(operand_kind(value.shape, result) is None for value in node.inputs[2:]):
        return False
    limit = SOME_PIXELS if max(map(dims.number, w.shape[:2])) >= MANY_CHANNELS else FEW_PIXELS
    return isinstance(pixels, int) and pixels <= limit


def _emit_rows(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A convolution that `is_product`, as one."""
    weights, rank = node.inputs[1].constant, node.outputs[0].rank
    if weights is None:
        return False

    def flat(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        if len(shape) < rank:
            return shape
        return (shape[0], dims.product(shape[1:])) if op.planar else (dims.product(shape[:-1]), shape[-1])

    x, *extras = (Value(TensorType(v.dtype, flat(v.shape))) for v in (node.inputs[0], *node.inputs[2:]))
    product = MatMul(transpose_b=True, epilogue=op.epilogue)
    shape, matrix = node.outputs[0].shape, weights.reshape(weights.shape[0], -1)
    result = Value(TensorType(node.outputs[0].dtype, (dims.product(shape[:-1]), shape[-1])))
    known = Value(TensorType(FLOAT32, matrix.shape), matrix)
    rows = Node(product, (x, known, *extras), (result,), node.source)
    buffers = tuple(lowering.alias(b, value.shape) for b, value in zip(inputs, rows.inputs, strict=True))
    return emit_product(lowering, product, rows, buffers, (lowering.alias(outputs[0], result.shape),), host())


def _finish(op: LastConv | LastConvTranspose, node: Node, inputs: Sequence[int]) -> Finish | None:
    extras = [(buffer, value.shape) for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True)]
    return finish_of(op.epilogue, extras, node.outputs[0].shape, host())


def _layer(
    lowering: Lowering, node: Node, inputs: Buffers, outputs: Buffers, finish: Finish, *, planar: bool = False
) -> Layer:  # fmt: skip
    x, out = Operand(inputs[0], node.inputs[0].shape), Operand(outputs[0], node.outputs[0].shape)
    return Layer(lowering, host(), x, out, finish, planar)

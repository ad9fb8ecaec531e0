"""Lowerings of operations over images whose channels are the last axis."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_fallback.channels_last import LastConv, LastConvTranspose, LastPool
from cpu_fallback.conv_lowering import Layer, Operand, emit_conv, emit_transposed
from cpu_fallback.epilogues import Finish, finish_of
from cpu_fallback.gemm import emit_product
from cpu_fallback.native import host
from cpu_fallback.pooling import pool_call
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node, TensorType, Value
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_last_conv(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if _has_single_pixels(op, node) and _emit_rows(lowering, op, node, inputs, outputs):
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


def _has_single_pixels(op: LastConv, node: Node) -> bool:
    """Whether every image is one pixel, as gates behind a global pool see it, and all products are of float32."""
    x, w = node.inputs[:2]
    inside = (x.shape[2:] if op.planar else x.shape[1:-1], w.shape[2:], node.outputs[0].shape[1:-1])
    unit = all(extent == 1 for extents in inside for extent in extents) and not any((*op.before, *op.after))
    return unit and op.group == 1 and x.dtype == w.dtype == FLOAT32


def _emit_rows(lowering: Lowering, op: LastConv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A convolution of single pixels as a product of matrices whose rows are the images."""
    weights, rank = node.inputs[1].constant, node.outputs[0].rank
    if weights is None:
        return False

    def flat(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return shape if len(shape) < rank else (shape[0], dims.product(shape[1:]))

    x, w, *extras = (Value(TensorType(value.dtype, flat(value.shape))) for value in node.inputs)
    product = MatMul(transpose_b=True, epilogue=op.epilogue)
    result = Value(TensorType(node.outputs[0].dtype, flat(node.outputs[0].shape)))
    known = Value(w.type, weights.reshape(weights.shape[0], -1))
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

"""Windows as native maps: one operand for every tap, each a strided walk over a padded copy of the input.

Depthwise convolutions and pools are sums or maxima over the taps of a window, so they are pointwise kernels whose
operands are the same buffer from different offsets on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.copies import Padding, emit_pad
from cpu_fallback.maps import Walked, walk_call
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, is_float, limits
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Conv, Pool
from gpu_engine.ir.ops.pooling import pool_counts, window_sizes
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
TAP_LIMIT = 64


def lower_depthwise(lowering: Lowering, op: Conv, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A convolution of every channel on its own, the epilogue in the same map; False if it is no such convolution."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    taps = list(product(*(range(int(extent)) for extent in w.shape[2:])))  # type: ignore[arg-type]
    if w.shape[:2] != (op.group, 1) or x.dtype not in (FLOAT32, FLOAT64) or not 0 < len(taps) <= TAP_LIMIT:
        return False
    source, shape, pads = _padded(lowering, inputs[0], x.shape, op.before, op.after)
    operands = _tap_walks(source, x.dtype, shape, taps, op.strides, op.dilations)
    steps = (0, len(taps), *(0 for _ in op.strides))
    operands += [Walked(inputs[1], x.dtype, steps, i * x.dtype.itemsize) for i in range(len(taps))]
    terms = [expr.arg(i, x.dtype) * expr.arg(len(taps) + i, x.dtype) for i in range(len(taps))]
    root = reduce(lambda a, b: a + b, terms)
    if op.epilogue is not None:
        root = expr.substitute(op.epilogue, _epilogue_places(op.epilogue, root, len(operands)))
    for buffer, value in zip(inputs[2:], node.inputs[2:], strict=True):
        operands.append(Walked(buffer, value.dtype, broadcast_strides(value.shape, out.shape)))
    return _emit(lowering, root, operands, node, outputs, pads, 0.0, inputs[1:])


def _epilogue_places(epilogue: Expr, total: Expr, first: int) -> dict[int, Expr]:
    """The product becomes `total`, extra operands are numbered from `first`."""
    used = {node.value: node.dtype for node in expr.walk(epilogue) if node.op == "arg"}
    return {i: total if i == 0 else expr.arg(first + i - 1, dtype) for i, dtype in used.items()}


def lower_pool(lowering: Lowering, op: Pool, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, out = node.inputs[0], node.outputs[0]
    taps = list(product(*map(range, op.kernel)))
    if not 0 < len(taps) <= TAP_LIMIT or not (is_float(x.dtype) or op.kind == "max") or x.dtype.kind == "b":
        return False
    counts = pool_counts(op, x.shape[2:])
    after = tuple(
        _overhang(op, i, extent, count) for i, (extent, count) in enumerate(zip(x.shape[2:], counts, strict=True))
    )
    fill = 0 if op.kind != "max" else -float("inf") if is_float(x.dtype) else limits(x.dtype)[0]
    source, shape, pads = _padded(lowering, inputs[0], x.shape, op.before, after)
    operands = _tap_walks(source, x.dtype, shape, taps, op.strides, op.dilations)
    terms = [expr.arg(i, x.dtype) for i in range(len(taps))]
    root = reduce(expr.maximum, terms) if op.kind == "max" else reduce(lambda a, b: a + b, terms)
    if op.kind == "average" and pads is None:
        root = root / float(len(taps))
    elif op.kind == "average":
        sizes = lowering.buffer(FLOAT32, out.shape[2:])
        lowering.emit(ArrayCall(write_window_sizes, op), inputs, (sizes,))
        operands.append(Walked(sizes, FLOAT32, broadcast_strides(out.shape[2:], out.shape)))
        root = root / expr.cast(expr.arg(len(taps), FLOAT32), x.dtype)
    extra = tuple(operand.buffer for operand in operands[len(taps) :])
    return _emit(lowering, root, operands, node, outputs, pads, fill, extra)


def _overhang(op: Pool, i: int, extent: Dim, count: Dim) -> Dim:
    """How far behind x the last window reaches, or the padding if that is further."""
    if not op.ceil_mode:
        return op.after[i]
    reach = (count - 1) * op.strides[i] + (op.kernel[i] - 1) * op.dilations[i] + 1
    return dims.maximum(op.after[i], reach - extent - op.before[i])


def write_window_sizes(op: Pool, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    """What an average divides by."""
    outputs[0][...] = window_sizes(op, inputs[0].shape[2:], outputs[0].shape)


def _padded(lowering: Lowering, x: int, shape: Shape, before: Shape, after: Shape) -> tuple[int, Shape, Padding | None]:
    """(buffer to read windows from, its shape, what must be padded first or None)."""
    if all(pad == 0 for pad in (*before, *after)):
        return x, shape, None
    padding = Padding((0, 0, *before), (0, 0, *after))
    full = padding.grown(shape)
    return lowering.buffer(lowering.buffers[x].dtype, full), full, padding


def _tap_walks(
    buffer: int, dtype: Any, shape: Shape, taps: Sequence[tuple[int, ...]], strides: Shape, dilations: Shape
) -> list[Walked]:
    own = contiguous_strides(shape)
    walk = (*own[:2], *(step * stride for step, stride in zip(own[2:], strides, strict=True)))
    moves = [
        [k * dilation * step * dtype.itemsize for k in range(1 + max(tap[i] for tap in taps))]
        for i, (dilation, step) in enumerate(zip(dilations, own[2:], strict=True))
    ]
    return [Walked(buffer, dtype, walk, sum((moves[i][k] for i, k in enumerate(tap)), 0)) for tap in taps]


def _emit(
    lowering: Lowering,
    root: Expr,
    operands: Sequence[Walked],
    node: Node,
    outputs: Buffers,
    pads: Padding | None,
    fill: float,
    extra: Buffers,
) -> bool:
    """The steps, or False if the expression has no native form; operand 0 is the buffer of windows."""
    x, out, source = node.inputs[0], node.outputs[0], operands[0].buffer
    call = walk_call(root, operands, Walked(outputs[0], out.dtype, contiguous_strides(out.shape)), out.shape)
    if call is None:
        return False
    if pads is not None:
        value = lowering.constant(np.array(fill, x.dtype))
        emit_pad(lowering, lowering.number(x), value, source, x.shape, pads)
    lowering.emit(call, (source, *extra), outputs)
    return True

"""Causal convolution with a carried state."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.convolution import with_bias
from gpu_engine.frontend.registry import emit_map, operator, scalar
from gpu_engine.ir import ops
from gpu_engine.ir.expr import sigmoid
from gpu_engine.ir.graph import Builder, Value


@operator("CausalConvWithState", since=27)
def causal_conv_with_state(
    b: Builder,
    x: Value,
    w: Value,
    bias: Value | None = None,
    past_state: Value | None = None,
    *,
    activation: str = "none",
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__CausalConvWithState.html"""
    channels = w.shape[0] if isinstance(w.shape[0], int) else x.shape[1]
    if x.rank != 3 or w.rank != 3 or not isinstance(channels, int):
        raise InvalidModel(f"{x.type} with weights {w.type}: the channels must be known")
    carried = w.shape[2] - 1
    if past_state is None:
        longer = b.emit(ops.Pad((0, 0, carried), (0, 0, 0)), x, scalar(b, 0, x.dtype))
    else:
        longer = b.emit(ops.Concat(2), past_state, x)
    y = with_bias(b, b.emit(ops.Conv((1,), (0,), (0,), (1,), channels), longer, w), bias)
    if activation in ("silu", "swish"):
        y = emit_map(b, lambda e: e * sigmoid(e), y)
    elif activation != "none":
        raise InvalidModel(f"activation {activation!r} is not one of none, silu, swish")
    state = ops.Slice((0, 0, longer.shape[2] - carried), (1, 1, 1), (x.shape[0], channels, carried))
    return y, b.emit(state, longer)

"""The dynamically quantised LSTM of ONNX Runtime's own domain."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.integer import integer_matmul
from gpu_engine.frontend.operators.quantization import dynamic_quantize_linear
from gpu_engine.frontend.operators.recurrent import activation_exprs, directions_of, recur, split_bias
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, ops
from gpu_engine.ir.expr import cast
from gpu_engine.ir.graph import Builder, Value


@operator("DynamicQuantizeLSTM", since=1, domain="com.microsoft")
def dynamic_quantize_lstm(
    b: Builder,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    sequence_lens: Value | None = None,
    initial_h: Value | None = None,
    initial_c: Value | None = None,
    p: Value | None = None,
    w_scale: Value | None = None,
    w_zero_point: Value | None = None,
    r_scale: Value | None = None,
    r_zero_point: Value | None = None,
    *,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    input_forget: int = 0,
) -> Sequence[Value]:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeLSTM

    W [D, I, 4*H] and R [D, H, 4*H] are int8 or uint8, with one scale and zero point per direction or per column. x is
    quantised once, over all steps and rows; the state anew at every step.
    """
    assert w_scale is not None and w_zero_point is not None and r_scale is not None and r_zero_point is not None
    reverse = directions_of(direction)
    functions = activation_exprs(x.dtype, "lstm", len(reverse), activations, activation_alpha, activation_beta)
    products = _input_products(b, x, w, w_scale, w_zero_point)
    if bias is not None:
        width = 4 * hidden_size if hidden_size else r.shape[2]
        if not isinstance(width, int):
            raise InvalidModel(f"hidden_size must be known when the model is compiled: {r.type}")
        outside, _ = split_bias(b, bias, width, 0)
        products = emit_map(b, lambda e, c: e + c, products, outside)
    op = ops.Recurrent("lstm", reverse, functions, clip=clip, input_forget=bool(input_forget))
    states = {
        "lengths": sequence_lens,
        "initial_h": initial_h,
        "initial_c": initial_c,
        "peepholes": p,
        "scale": r_scale,
        "zero": r_zero_point,
    }
    given = {name: value for name, value in states.items() if value is not None}
    return recur(b, op, products, b.emit(ops.Transpose((0, 2, 1)), r), given)


def _input_products(b: Builder, x: Value, w: Value, scale: Value, zero: Value) -> Value:
    """x [T, B, I] times w [D, I, 4*H] as [T, B, D * 4*H]."""
    directions, inner, width = w.shape
    columns = b.emit(ops.Reshape((inner, directions * width)), b.emit(ops.Transpose((1, 0, 2)), w))
    whole, x_scale, x_zero = dynamic_quantize_linear(b, x)
    product = integer_matmul(b, whole, columns, x_zero, _per_column(b, zero, w))
    return emit_map(b, lambda e, s, t: cast(e, x.dtype) * (s * t), product, x_scale, _per_column(b, scale, w))


def _per_column(b: Builder, value: Value, w: Value) -> Value:
    """[D] or [D, 4*H] as [D * 4*H]."""
    directions, _, width = w.shape
    apart = b.emit(ops.Reshape((directions, value.shape[1] if value.rank > 1 else 1)), value)
    return b.emit(ops.Reshape((dims.product((directions, width)),)), b.emit(ops.Expand((directions, width)), apart))

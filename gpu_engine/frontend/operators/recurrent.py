"""Recurrent layers: one product of all inputs with their weights, then a Recurrent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import dims, expr, ops
from gpu_engine.ir.dtypes import DType, compute_dtype
from gpu_engine.ir.expr import Expr, exp, log, maximum, minimum, sigmoid, tanh, where
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops.recurrent import GATES, OPTIONAL

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
DEFAULTS = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}
ACTIVATIONS: Mapping[str, tuple[Callable[..., Expr], tuple[float, ...]]] = {
    "relu": (lambda x: maximum(x, 0), ()),
    "tanh": (tanh, ()),
    "sigmoid": (sigmoid, ()),
    "softsign": (lambda x: x / (1 + abs(x)), ()),
    "softplus": (lambda x: maximum(x, 0) + log(1 + exp(-abs(x))), ()),
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "scaledtanh": (lambda x, a, b: a * tanh(b * x), (1.0, 1.0)),
    "hardsigmoid": (lambda x, a, b: expr.clip(a * x + b, 0, 1), (0.2, 0.5)),
    "leakyrelu": (lambda x, a: where(x < 0, a * x, x), (0.01,)),
    "thresholdedrelu": (lambda x, a: where(x < a, 0.0, x), (1.0,)),
    "elu": (lambda x, a: where(x < 0, a * (exp(minimum(x, 0)) - 1), x), (1.0,)),
}
"""The activation functions by their lower-case names, with the defaults of alpha and beta where they take these."""


@operator("LSTM", since=1)
def lstm(
    b: Builder,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    sequence_lens: Value | None = None,
    initial_h: Value | None = None,
    initial_c: Value | None = None,
    p: Value | None = None,
    *,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__LSTM.html"""
    reverse = directions_of(direction)
    functions = activation_exprs(x.dtype, "lstm", len(reverse), activations, activation_alpha, activation_beta)
    op = ops.Recurrent("lstm", reverse, functions, clip=clip, input_forget=bool(input_forget))
    states = {"lengths": sequence_lens, "initial_h": initial_h, "initial_c": initial_c, "peepholes": p}
    return emit_recurrent(b, op, x, w, r, bias, states, layout, hidden_size)


@operator("GRU", since=1)
def gru(
    b: Builder,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    sequence_lens: Value | None = None,
    initial_h: Value | None = None,
    *,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    linear_before_reset: int = 0,
    layout: int = 0,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__GRU.html"""
    reverse = directions_of(direction)
    functions = activation_exprs(x.dtype, "gru", len(reverse), activations, activation_alpha, activation_beta)
    op = ops.Recurrent("gru", reverse, functions, clip=clip, linear_before_reset=bool(linear_before_reset))
    return emit_recurrent(b, op, x, w, r, bias, {"lengths": sequence_lens, "initial_h": initial_h}, layout, hidden_size)


@operator("RNN", since=1)
def rnn(
    b: Builder,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    sequence_lens: Value | None = None,
    initial_h: Value | None = None,
    *,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    layout: int = 0,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__RNN.html"""
    reverse = directions_of(direction)
    functions = activation_exprs(x.dtype, "rnn", len(reverse), activations, activation_alpha, activation_beta)
    op = ops.Recurrent("rnn", reverse, functions, clip=clip)
    return emit_recurrent(b, op, x, w, r, bias, {"lengths": sequence_lens, "initial_h": initial_h}, layout, hidden_size)


def activation_exprs(
    dtype: DType, kind: str, directions: int, names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> tuple[tuple[Expr, ...], ...]:
    """The functions of every direction; alphas and betas go, in order, to those that take them."""
    width = len(DEFAULTS[kind])
    names = names or DEFAULTS[kind] * directions
    if len(names) < width * directions:
        raise InvalidModel(f"activations {list(names)} for {directions} directions of {width} each")
    left, right = list(alphas), list(betas)
    found = []
    for name in names[: width * directions]:
        if name.lower() not in ACTIVATIONS:
            raise InvalidModel(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
        function, defaults = ACTIVATIONS[name.lower()]
        taken = [given.pop(0) if given else default for given, default in zip((left, right), defaults, strict=False)]
        found.append(function(expr.arg(0, compute_dtype(dtype)), *taken))
    return tuple(tuple(found[i : i + width]) for i in range(0, len(found), width))


def directions_of(direction: str) -> tuple[bool, ...]:
    """For each direction, whether it runs backwards."""
    if direction not in DIRECTIONS:
        raise InvalidModel(f"direction {direction!r} is not one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS[direction]


def emit_recurrent(
    b: Builder,
    op: ops.Recurrent,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None,
    states: Mapping[str, Value | None],
    layout: int,
    hidden_size: int,
) -> Sequence[Value]:
    """The outputs of `op` without its optional operands: x [T, B, I] (or [B, T, I] in layout 1), w [D, G*H, I],
    r [D, G*H, H], bias [D, 2*G*H]; `states` are optional operands by name."""
    hidden = r.shape[2] if r.rank == 3 and isinstance(r.shape[2], int) else hidden_size
    if not isinstance(hidden, int) or hidden < 1:
        raise InvalidModel(f"the hidden size in {r.type} must be known")
    width = GATES[op.kind] * hidden
    r = b.emit(ops.Reshape((len(op.reverse), width, hidden)), r)
    given = {name: value for name, value in states.items() if value is not None}
    if layout:
        x, *initial = (b.emit(ops.Transpose((1, 0, 2)), v) for v in (x, *_named(given, "initial")))
        given |= dict(zip([name for name in given if name.startswith("initial")], initial, strict=True))
    weights = b.emit(ops.Reshape((len(op.reverse) * width, w.shape[2])), w)
    products = b.emit(ops.MatMul(transpose_b=True), x, weights)
    if bias is not None:
        bias = b.emit(ops.Reshape((len(op.reverse), 2 * width)), bias)
        outside, inside = split_bias(b, bias, width, hidden if op.linear_before_reset else 0)
        products = emit_map(b, lambda e, c: e + c, products, outside)
        given |= {"bias": inside} if inside is not None else {}
    return in_layout(b, recur(b, op, products, r, given), layout)


def _named(given: Mapping[str, Value], prefix: str) -> list[Value]:
    return [value for name, value in given.items() if name.startswith(prefix)]


def recur(b: Builder, op: ops.Recurrent, products: Value, r: Value, given: Mapping[str, Value]) -> Sequence[Value]:
    """`op` over the products of the inputs, with the optional operands that are `given` by name."""
    present = tuple(name for name in OPTIONAL if name in given)
    return b.emit_all(replace(op, present=present), products, r, *(given[name] for name in present))


def in_layout(b: Builder, results: Sequence[Value], layout: int) -> Sequence[Value]:
    """The results in layout 0, or with the rows first in layout 1."""
    if not layout:
        return results
    sequence, *states = results
    return (
        b.emit(ops.Transpose((2, 0, 1, 3)), sequence),
        *(b.emit(ops.Transpose((1, 0, 2)), state) for state in states),
    )


def split_bias(b: Builder, bias: Value, width: int, inside: int) -> tuple[Value, Value | None]:
    """bias [D, 2 * width] as the sum of its halves, [D * width], but for the last `inside` of each second half, which
    are returned apart, [D, inside]."""
    directions = bias.shape[0]
    left, outer, inner = (
        b.emit(ops.Slice((0, start), (1, 1), (directions, extent)), bias)
        for start, extent in ((0, width), (width, width - inside), (2 * width - inside, inside))
    )
    if inside:
        zeros = emit_map(b, lambda e: e - e, inner)
        outer = b.emit(ops.Concat(1), outer, zeros)
    total = emit_map(b, lambda e, c: e + c, left, outer)
    return b.emit(ops.Reshape((dims.product(total.shape),)), total), inner if inside else None

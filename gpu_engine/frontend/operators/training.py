"""Optimizer steps of the preview training domain; Gradient, which needs the graph's derivative, is not here."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir.expr import Expr, cast, const, power, sqrt, where
from gpu_engine.ir.graph import Builder, Value

DOMAIN = "ai.onnx.preview.training"


@operator("Adagrad", since=1, domain=DOMAIN)
def adagrad(
    b: Builder,
    rate: Value,
    step: Value,
    *inputs: Value,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxpreviewtraining_Adagrad.html"""
    variables, gradients, squares = _runs(inputs, 3)

    def squared(x: Expr, g: Expr, h: Expr) -> Expr:
        g = norm_coefficient * x + g
        return h + g * g

    def moved(x: Expr, g: Expr, h: Expr, r: Expr, t: Expr) -> Expr:
        scaled = cast(r, x.dtype) / (1 + cast(t, x.dtype) * decay_factor)
        return x - scaled * (norm_coefficient * x + g) / (sqrt(h) + epsilon)

    rows = list(zip(variables, gradients, squares, strict=True))
    totals = [emit_map(b, squared, x, g, h) for x, g, h in rows]
    news = [emit_map(b, moved, x, g, h, rate, step) for (x, g, _), h in zip(rows, totals, strict=True)]
    return (*news, *totals)


@operator("Adam", since=1, domain=DOMAIN)
def adam(
    b: Builder,
    rate: Value,
    step: Value,
    *inputs: Value,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxpreviewtraining_Adam.html"""
    variables, gradients, averages, squares = _runs(inputs, 4)

    def averaged(x: Expr, g: Expr, v: Expr) -> Expr:
        return alpha * v + (1 - alpha) * (norm_coefficient * x + g)

    def squared(x: Expr, g: Expr, h: Expr) -> Expr:
        g = norm_coefficient * x + g
        return beta * h + (1 - beta) * g * g

    def moved(x: Expr, v: Expr, h: Expr, r: Expr, t: Expr) -> Expr:
        count = cast(t, x.dtype)
        first, second = (power(const(base, x.dtype), count) for base in (alpha, beta))
        adjusted = where(count > 0, cast(r, x.dtype) * sqrt(1 - second) / (1 - first), cast(r, x.dtype))
        return (1 - norm_coefficient_post) * (x - adjusted * v / (sqrt(h) + epsilon))

    rows = list(zip(variables, gradients, averages, squares, strict=True))
    means = [emit_map(b, averaged, x, g, v) for x, g, v, _ in rows]
    totals = [emit_map(b, squared, x, g, h) for x, g, _, h in rows]
    news = [emit_map(b, moved, x, v, h, rate, step) for x, v, h in zip(variables, means, totals, strict=True)]
    return (*news, *means, *totals)


@operator("Momentum", since=1, domain=DOMAIN)
def momentum(
    b: Builder,
    rate: Value,
    step: Value,
    *inputs: Value,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxpreviewtraining_Momentum.html"""
    if mode not in ("standard", "nesterov"):
        raise InvalidModel(f"mode {mode!r} is not standard or nesterov")
    variables, gradients, moments = _runs(inputs, 3)

    def gathered(x: Expr, g: Expr, v: Expr, t: Expr) -> Expr:
        share = where(t > 0, const(beta, x.dtype), 1.0)
        return alpha * v + share * (norm_coefficient * x + g)

    def moved(x: Expr, g: Expr, v: Expr, r: Expr) -> Expr:
        direction = v if mode == "standard" else norm_coefficient * x + g + alpha * v
        return x - cast(r, x.dtype) * direction

    rows = list(zip(variables, gradients, moments, strict=True))
    totals = [emit_map(b, gathered, x, g, v, step) for x, g, v in rows]
    news = [emit_map(b, moved, x, g, v, rate) for (x, g, _), v in zip(rows, totals, strict=True)]
    return (*news, *totals)


def _runs(inputs: Sequence[Value], parts: int) -> list[Sequence[Value]]:
    """The inputs in `parts` equal runs."""
    if not inputs or len(inputs) % parts:
        raise InvalidModel(f"{len(inputs)} tensors are not {parts} for each variable")
    size = len(inputs) // parts
    return [inputs[i * size : (i + 1) * size] for i in range(parts)]

"""Forms of operators from before opset 7, when broadcasting had to be asked for."""

from __future__ import annotations

from collections.abc import Callable

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators import activation, arithmetic, linear
from gpu_engine.frontend.registry import emit_map, normal_axis, operator
from gpu_engine.ir import expr
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Reshape

BINARY: dict[str, Callable[..., Expr]] = {
    "Add": arithmetic.add, "Sub": arithmetic.sub, "Mul": arithmetic.mul, "Div": arithmetic.div,
    "Pow": arithmetic.pow_, "And": Expr.__and__, "Or": Expr.__or__, "Xor": Expr.__xor__, "Equal": expr.equal,
    "Greater": Expr.__gt__, "Less": Expr.__lt__,
}  # fmt: skip


def _binary(name: str, function: Callable[..., Expr]) -> None:
    def emit(
        b: Builder,
        x: Value,
        y: Value,
        *,
        axis: int | None = None,
        broadcast: int = 0,
        consumed_inputs: tuple[int, ...] = (),
    ) -> Value:
        if broadcast and axis is not None:
            y = aligned(b, y, normal_axis(axis, x.rank), x.rank)
        elif not broadcast and x.rank != y.rank:
            raise InvalidModel(f"{name} of {x.type} and {y.type} without broadcast")
        return emit_map(b, function, x, y)

    emit.__doc__ = f"https://onnx.ai/onnx/operators/onnx__{name}.html (opset 1: broadcast as an attribute)"
    operator(name, since=1)(emit)


for _name, _function in BINARY.items():
    _binary(_name, _function)


def aligned(b: Builder, y: Value, axis: int, rank: int) -> Value:
    """y with its first axis put under axis `axis` of a tensor of `rank` axes."""
    after = rank - axis - y.rank
    if after < 0:
        raise InvalidModel(f"{y.type} does not fit {rank} axes from axis {axis}")
    return b.emit(Reshape((*y.shape, *(1,) * after)), y) if after else y


@operator("PRelu", since=1)
def prelu(b: Builder, x: Value, slope: Value, *, consumed_inputs: tuple[int, ...] = ()) -> Value:
    """https://onnx.ai/onnx/operators/onnx__PRelu.html (opset 6: one slope a channel)"""
    shaped = aligned(b, slope, 1, x.rank) if slope.rank == 1 and x.rank > 1 else slope
    return emit_map(b, activation.prelu, x, shaped)


@operator("Gemm", since=1)
def gemm(
    b: Builder,
    a: Value,
    c: Value,
    bias: Value,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx__Gemm.html (opset 6: broadcast as an attribute)"""
    return linear.gemm(b, a, c, bias, alpha=alpha, beta=beta, transA=transA, transB=transB)

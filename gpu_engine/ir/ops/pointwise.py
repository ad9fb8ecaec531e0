"""Map: one scalar expression per output element over broadcast operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import TensorType


@dataclass(frozen=True)
class Map:
    """`expr` of the operands' elements; operands broadcast as in ONNX (multidirectional, right-aligned)."""

    expr: Expr
    shape_arithmetic = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        for node in expr.walk(self.expr):
            if node.op == "arg" and node.dtype != inputs[node.value].dtype:
                raise InvalidModel(f"operand {node.value} is {inputs[node.value].dtype}, {node.dtype} expected")
        return (TensorType(self.expr.dtype, broadcast_shapes(*(kind.shape for kind in inputs))),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        if any(array.dtype == object for array in arrays):
            return (np.broadcast_to(_evaluate_extents(self.expr, arrays), shape),)
        result = expr.evaluate(self.expr, arrays, xp)
        return (result if result.shape == shape else xp.broadcast_to(result, shape).copy(),)


def broadcast_shapes(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """https://github.com/onnx/onnx/blob/main/docs/Broadcasting.md; InvalidModel where two ints contradict."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(reduce(dims.broadcast, axis) for axis in zip(*padded, strict=True))


def identity_cast(source: Any, target: Any) -> Map:
    """The Map that converts one operand."""
    return Map(expr.cast(expr.arg(0, source), target))


def _floor(x: Any) -> Dim:
    return x if isinstance(x, dims.Sym) else int(np.floor(x))


def _ceil(x: Any) -> Dim:
    return x if isinstance(x, dims.Sym) else int(np.ceil(x))


def _quotient(a: Any, b: Any) -> Any:
    divisor = _whole(b)
    if isinstance(divisor, int) and divisor <= 0:
        raise dims.Undecided(f"{a} / {divisor}")
    return dims.floor_div(_whole(a), divisor)


def _whole(x: Any) -> Dim:
    """x as an extent; Undecided if it is a fraction."""
    if isinstance(x, dims.Sym):
        return x
    whole = int(x)
    if float(x) != whole:
        raise dims.Undecided(str(x))
    return whole


def _scaled(a: Any, b: Any) -> Dim:
    return _whole(a) * _whole(b)


def _exact_quotient(a: Any, b: Any) -> Dim:
    quotient: Dim = _quotient(a, b)
    if quotient * _whole(b) != _whole(a):
        raise dims.Undecided(f"{a} / {b}")
    return quotient


EXTENT_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: _whole(a) + _whole(b), "sub": lambda a, b: _whole(a) - _whole(b), "mul": _scaled,
    "neg": lambda a: -_whole(a), "min": lambda a, b: dims.minimum(_whole(a), _whole(b)),
    "max": lambda a, b: dims.maximum(_whole(a), _whole(b)), "floor": _floor, "ceil": _ceil,
    "mod": lambda a, b: dims.modulo(_whole(a), _whole(b)), "eq": lambda a, b: dims.equal(_whole(a), _whole(b)),
    "le": lambda a, b: dims.less_equal(_whole(a), _whole(b)),
    "lt": lambda a, b: dims.less_equal(_whole(a) + 1, _whole(b)), "where": lambda c, a, b: a if c else b,
    "not": lambda a: not a, "and": lambda a, b: a and b, "or": lambda a, b: a or b,
}  # fmt: skip


def _evaluate_extents(root: Expr, arrays: tuple[Any, ...]) -> Any:
    """The expression over object arrays of symbolic extents, exactly; Undecided where it depends on their values."""
    values: dict[Expr, Any] = {}
    for node in expr.walk(root):
        operands = [values[child] for child in node.args]
        if node.op == "arg":
            values[node] = arrays[node.value]
        elif node.op == "const":
            values[node] = np.asarray(node.value.item(), object)
        elif node.op == "cast":
            values[node] = operands[0]
        else:
            function = EXTENT_FUNCTIONS.get(node.op)
            if node.op == "div":
                function = _exact_quotient if node.dtype.kind == "f" else _quotient
            if function is None:
                raise dims.Undecided(node.op)
            values[node] = np.frompyfunc(function, len(operands), 1)(*operands)
    return np.asarray(values[root], object)

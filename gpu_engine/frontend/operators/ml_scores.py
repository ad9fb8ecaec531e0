"""What classical models do with their scores: transforms, and labels for classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_array, emit_map
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import INT64, STRING
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, Reduce, Softmax

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
"""In the order of TreeEnsemble's numbers for them."""


def transformed(b: Builder, scores: Value, transform: str) -> Value:
    """Scores [..., classes] after a post_transform."""
    match transform:
        case "NONE":
            return scores
        case "SOFTMAX":
            return b.emit(Softmax(scores.rank - 1), scores)
        case "LOGISTIC":
            return emit_map(b, expr.sigmoid, scores)
        case "SOFTMAX_ZERO":
            return _softmax_zero(b, scores)
        case "PROBIT":
            return emit_map(b, _probit, scores)
    raise InvalidModel(f"the post_transform {transform} is not one of {', '.join(TRANSFORMS)}")


def _softmax_zero(b: Builder, scores: Value) -> Value:
    """Softmax whose scores of zero stay zero."""
    peak = b.emit(Reduce("max", (scores.rank - 1,), True), scores)
    grown = emit_map(
        b, lambda v, most: expr.where(abs(v) > 1e-7, expr.exp(v - most), v * expr.exp(-most)), scores, peak
    )
    total = b.emit(Reduce("sum", (scores.rank - 1,), True), grown)
    return emit_map(b, lambda v, s: expr.where(expr.equal(s, 0), 0.5, v / s), grown, total)


def _probit(x: Expr) -> Expr:
    """sqrt(2) times the inverse error function of 2 x - 1, by Winitzki's approximation as the specification's authors
    chose it."""
    centred = 2 * x - 1
    logarithm = expr.log((1 - centred) * (1 + centred))
    half = 2 / (np.pi * 0.147) + 0.5 * logarithm
    root = expr.sqrt(expr.sqrt(half * half - logarithm * (1 / 0.147)) - half)
    return 1.41421356 * expr.where(centred < 0, -root, root)


def labels_of(b: Builder, winners: Value, integers: Sequence[int] | None, strings: Sequence[str] | None) -> Value:
    """The label of each winning class (an int64 index): an integer, a string, or the index itself."""
    if strings:
        kind = TensorType(STRING, winners.shape)
        table = b.constant(np.array([*strings, None], object)[:-1])
        return emit_array(b, _pick, lambda b, *_: kind, (winners, table), {}, host=True, mixes=())[0]
    if not integers:
        return winners
    first, step = integers[0], integers[1] - integers[0] if len(integers) > 1 else 0
    if list(integers) == [first + step * i for i in range(len(integers))] and abs(first) + abs(step) < 1 << 31:
        return winners if (first, step) == (0, 1) else emit_map(b, lambda i: i * step + first, winners)
    return b.emit(Gather(0), b.constant(np.array(integers, INT64)), winners)


def _pick(xp: Any, indices: Any, table: Any) -> Any:
    return table[indices]

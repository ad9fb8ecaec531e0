"""Linear models of the domain ai.onnx.ml."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.conversion import convert
from gpu_engine.frontend.operators.ml_features import ML, wide_enough
from gpu_engine.frontend.operators.ml_scores import labels_of, transformed
from gpu_engine.frontend.operators.movement import concat
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.expr import cast
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import ArgReduce, MatMul, Reshape


@operator("LinearRegressor", since=1, domain=ML)
def linear_regressor(
    b: Builder,
    x: Value,
    *,
    coefficients: tuple[float, ...],
    intercepts: tuple[float, ...] = (),
    post_transform: str = "NONE",
    targets: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_LinearRegressor.html"""
    return transformed(b, scored(b, x, coefficients, intercepts, targets), post_transform)


def scored(b: Builder, x: Value, coefficients: Sequence[float], intercepts: Sequence[float], targets: int) -> Value:
    """x [N, features] (or [features]) times coefficients [targets, features], plus intercepts: float32 [N, targets]."""
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    wide = wide_enough(x.dtype)
    if len(coefficients) % targets or rows.rank != 2:
        raise InvalidModel(f"{len(coefficients)} coefficients of {targets} targets for {x.type}")
    weights = b.constant(np.array(coefficients, wide).reshape(targets, -1))
    product = b.emit(MatMul(transpose_b=True), convert(b, rows, wide), weights)
    if not intercepts:
        return convert(b, product, FLOAT32)
    return emit_map(b, lambda e, i: cast(e + i, FLOAT32), product, b.constant(np.array(intercepts, wide)))


@operator("LinearClassifier", since=1, domain=ML)
def linear_classifier(
    b: Builder,
    x: Value,
    *,
    classlabels_ints: tuple[int, ...] = (),
    classlabels_strings: tuple[str, ...] = (),
    coefficients: tuple[float, ...],
    intercepts: tuple[float, ...] = (),
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Value, Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_LinearClassifier.html

    One set of coefficients for two labels scores the second one; the first gets the opposite.
    """
    labels = len(classlabels_ints or classlabels_strings)
    features = x.shape[-1]
    classes = len(coefficients) // features if isinstance(features, int) else len(intercepts) or labels
    scores = scored(b, x, coefficients, intercepts, max(classes, 1))
    if classes == 1 and labels == 2:
        scores = concat(b, emit_map(b, lambda e: -e, scores), scores, axis=1)
    result = transformed(b, scores, post_transform)
    if classes == 1 and labels < 2:
        above = 0 if post_transform == "NONE" else 0.5
        winners = emit_map(b, lambda e: cast(expr.where(e < above, 0, 1), INT64), result)
        winners = b.emit(Reshape((winners.shape[0],)), winners)
        return labels_of(b, winners, (0, *classlabels_ints) if classlabels_ints else None, None), result
    winners = b.emit(ArgReduce("max", 1, False, False), result)
    return labels_of(b, winners, classlabels_ints, classlabels_strings), result

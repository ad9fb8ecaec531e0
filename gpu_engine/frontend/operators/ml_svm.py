"""Support vector machines of the domain ai.onnx.ml."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.conversion import convert
from gpu_engine.frontend.operators.ml_features import ML
from gpu_engine.frontend.operators.ml_scores import labels_of, transformed
from gpu_engine.frontend.operators.movement import concat
from gpu_engine.frontend.registry import emit_array, emit_map, operator
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import ArgReduce, MatMul, Reduce, Reshape

Floats = tuple[float, ...]
COUPLING_ROUNDS, COUPLING_ERROR = 100, 0.005
"""As in libsvm's multiclass_probability."""


def kernel_matrix(b: Builder, x: Value, vectors: Any, kind: str, parameters: Floats) -> Value:
    """The kernel of every row of x [N, features] with every row of `vectors` [V, features]: [N, V]."""
    gamma, offset, degree = parameters or (0.0, 0.0, 0.0)
    if kind == "RBF":
        apart = b.emit(Reshape((x.shape[0], 1, x.shape[1])), x)
        gap = expr.arg(0, FLOAT32) - expr.arg(1, FLOAT32)
        near = expr.exp(expr.arg(0, FLOAT32) * -gamma)
        return b.emit(Reduce("sum", (2,), False, gap * gap, near), apart, b.constant(vectors[None]))
    product = b.emit(MatMul(transpose_b=True), x, b.constant(vectors))
    match kind:
        case "LINEAR":
            return product
        case "POLY":
            return emit_map(b, lambda e: (e * gamma + offset) ** degree, product)
        case "SIGMOID":
            return emit_map(b, lambda e: expr.tanh(e * gamma + offset), product)
    raise InvalidModel(f"support vector machines have no kernel {kind}")


def float_rows(b: Builder, x: Value) -> Value:
    """x as float32 [N, features]."""
    return convert(b, x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x), FLOAT32)


@operator("SVMRegressor", since=1, domain=ML)
def svm_regressor(
    b: Builder,
    x: Value,
    *,
    coefficients: Floats = (),
    kernel_params: Floats = (),
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: Floats = (0.0,),
    support_vectors: Floats = (),
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_SVMRegressor.html"""
    rows, weights = float_rows(b, x), np.array(coefficients, FLOAT32)
    if n_supports:
        vectors = np.array(support_vectors, FLOAT32).reshape(n_supports, -1)
        rows = kernel_matrix(b, rows, vectors, kernel_type, kernel_params)
    scores = b.emit(MatMul(), rows, b.constant(weights.reshape(-1, 1)))
    scores = emit_map(b, lambda s: s + rho[0], scores)
    if one_class:
        return emit_map(b, lambda s: expr.where(s > 0, 1, s * 0 - 1), scores)
    return transformed(b, scores, post_transform)


@operator("SVMClassifier", since=1, domain=ML)
def svm_classifier(
    b: Builder,
    x: Value,
    *,
    classlabels_ints: tuple[int, ...] = (),
    classlabels_strings: tuple[str, ...] = (),
    coefficients: Floats = (),
    kernel_params: Floats = (),
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: Floats = (),
    prob_b: Floats = (),
    rho: Floats = (),
    support_vectors: Floats = (),
    vectors_per_class: tuple[int, ...] = (),
) -> tuple[Value, Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_SVMClassifier.html"""
    rows, classes = float_rows(b, x), max(len(classlabels_ints or classlabels_strings), 1)
    if not sum(vectors_per_class):
        weights = np.array(coefficients, FLOAT32).reshape(classes, -1)
        scores = emit_map(b, lambda s: s + rho[0], b.emit(MatMul(transpose_b=True), rows, b.constant(weights)))
        winners = b.emit(ArgReduce("max", 1, False, False), scores)
        return labels_of(b, winners, classlabels_ints, classlabels_strings), transformed(b, scores, post_transform)
    vectors = np.array(support_vectors, FLOAT32).reshape(sum(vectors_per_class), -1)
    kernels = kernel_matrix(b, rows, vectors, kernel_type, kernel_params)
    duels = b.emit(MatMul(), kernels, b.constant(duel_weights(coefficients, vectors_per_class)))
    duels = emit_map(b, lambda s, r: s + r, duels, b.constant(np.array(rho, FLOAT32)))
    winners = b.emit(ArgReduce("max", 1, False, False), votes(b, duels, classes))
    scores = duels if not prob_a else probabilities(b, duels, classes, prob_a, prob_b)
    if len(rho) == 1 and not prob_a:
        scores = concat(b, emit_map(b, lambda s: -s, scores), scores, axis=1)
    return labels_of(b, winners, classlabels_ints, classlabels_strings), transformed(b, scores, post_transform)


def duel_weights(coefficients: Sequence[float], counts: Sequence[int]) -> Any:
    """[V, pairs]: what each support vector weighs in the duel of each pair of classes."""
    table = np.array(coefficients, FLOAT32).reshape(len(counts) - 1, -1)
    ends = np.cumsum(counts)
    starts = ends - np.array(counts)
    columns = []
    for i, j in combinations(range(len(counts)), 2):
        column = np.zeros(table.shape[1], FLOAT32)
        column[starts[i] : ends[i]] = table[j - 1, starts[i] : ends[i]]
        column[starts[j] : ends[j]] = table[i, starts[j] : ends[j]]
        columns.append(column)
    return np.stack(columns, 1)


def votes(b: Builder, duels: Value, classes: int) -> Value:
    """How many duels [N, pairs] each class wins: [N, classes]."""
    pairs = list(combinations(range(classes), 2))
    gain, base = np.zeros((len(pairs), classes), FLOAT32), np.zeros(classes, FLOAT32)
    for number, (i, j) in enumerate(pairs):
        gain[number, i], gain[number, j] = 1, -1
        base[j] += 1
    won = emit_map(b, lambda s: cast(s > 0, FLOAT32), duels)
    return emit_map(b, lambda v, c: v + c, b.emit(MatMul(), won, b.constant(gain)), b.constant(base))


def probabilities(b: Builder, duels: Value, classes: int, a: Floats, c: Floats) -> Value:
    """The probability of each class [N, classes] from the scores of all duels, by pairwise coupling."""

    def first_wins(s: Expr, slope: Expr, offset: Expr) -> Expr:
        return expr.clip(1 - expr.sigmoid(s * slope + offset), 1e-7, 1 - 1e-7)

    chances = emit_map(b, first_wins, duels, *(b.constant(np.array(v, FLOAT32)) for v in (a, c)))
    kind = TensorType(FLOAT32, (duels.shape[0], classes))
    return emit_array(b, coupled, lambda b, *_, **__: kind, (chances,), {"classes": classes}, mixes=(1,))[0]


def coupled(xp: Any, chances: Any, *, classes: int) -> Any:
    """Wu, Lin and Weng's second approach (https://www.csie.ntu.edu.tw/~cjlin/papers/svmprob/svmprob.pdf), as libsvm
    iterates it: a row stops when its error is small."""
    n = chances.shape[0]
    duels = xp.zeros((n, classes, classes), np.float64)
    for number, (i, j) in enumerate(combinations(range(classes), 2)):
        duels[:, i, j], duels[:, j, i] = chances[:, number], 1 - chances[:, number]
    q = -duels * duels.swapaxes(1, 2)
    for t in range(classes):
        q[:, t, t] = (duels[:, :, t] ** 2).sum(1)
    p = xp.full((n, classes), 1 / classes)
    for _ in range(max(COUPLING_ROUNDS, classes)):
        products = (q * p[:, None, :]).sum(2)
        mean = (p * products).sum(1)
        active = xp.abs(products - mean[:, None]).max(1) >= COUPLING_ERROR / classes
        following = p.copy()
        for t in range(classes):
            step = (mean - products[:, t]) / q[:, t, t]
            following[:, t] += step
            mean = (mean + step * (step * q[:, t, t] + 2 * products[:, t])) / (1 + step) ** 2
            products = (products + step[:, None] * q[:, t, :]) / (1 + step)[:, None]
            following = following / (1 + step)[:, None]
        p = xp.where(active[:, None], following, p)
    return p

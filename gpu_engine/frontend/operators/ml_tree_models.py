"""The operators of the domain ai.onnx.ml that are tree ensembles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.ml_features import ML
from gpu_engine.frontend.operators.ml_scores import TRANSFORMS, labels_of, transformed
from gpu_engine.frontend.operators.ml_trees import MODES, Forest, emit_scores, forest_of_nodes, without_members
from gpu_engine.frontend.operators.movement import concat, cut
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, INT64
from gpu_engine.ir.expr import cast
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import ArgReduce, Reshape

Array = NDArray[Any]
Ints = tuple[int, ...]
Floats = tuple[float, ...]
Strings = tuple[str, ...]
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
"""In the order of TreeEnsemble's numbers for them."""


def table(floats: Floats, tensor: Array | None) -> Array:
    """A list of numbers that comes as an attribute of floats or as a tensor."""
    return np.array(floats, FLOAT32) if tensor is None else tensor.ravel()


def based(b: Builder, scores: Value, base: Array) -> Value:
    """Scores plus the model's base values, if there are any."""
    return emit_map(b, lambda s, v: s + v, scores, b.constant(base.astype(scores.dtype))) if base.size else scores


@operator("TreeEnsembleRegressor", since=1, domain=ML)
def tree_ensemble_regressor(
    b: Builder,
    x: Value,
    *,
    aggregate_function: str = "SUM",
    base_values: Floats = (),
    base_values_as_tensor: Array | None = None,
    n_targets: int = 1,
    nodes_falsenodeids: Ints = (),
    nodes_featureids: Ints = (),
    nodes_hitrates: Floats = (),
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Ints = (),
    nodes_modes: Strings = (),
    nodes_nodeids: Ints = (),
    nodes_treeids: Ints = (),
    nodes_truenodeids: Ints = (),
    nodes_values: Floats = (),
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
    target_ids: Ints = (),
    target_nodeids: Ints = (),
    target_treeids: Ints = (),
    target_weights: Floats = (),
    target_weights_as_tensor: Array | None = None,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsembleRegressor.html"""
    if aggregate_function not in AGGREGATES:
        raise InvalidModel(f"trees do not aggregate by {aggregate_function}")
    nodes = {
        "treeids": nodes_treeids, "nodeids": nodes_nodeids, "modes": nodes_modes, "featureids": nodes_featureids,
        "truenodeids": nodes_truenodeids, "falsenodeids": nodes_falsenodeids,
        "missing_value_tracks_true": nodes_missing_value_tracks_true,
    }  # fmt: skip
    leaves = (target_treeids, target_nodeids, target_ids)
    weights = table(target_weights, target_weights_as_tensor)
    forest = forest_of_nodes(nodes, table(nodes_values, nodes_values_as_tensor), leaves, weights, n_targets)
    scores = emit_scores(b, forest, x, aggregate_function)
    scores = based(b, scores, table(base_values, base_values_as_tensor))
    return transformed(b, emit_map(b, lambda s: cast(s, FLOAT32), scores), post_transform)


@operator("TreeEnsembleClassifier", since=1, domain=ML)
def tree_ensemble_classifier(
    b: Builder,
    x: Value,
    *,
    base_values: Floats = (),
    base_values_as_tensor: Array | None = None,
    class_ids: Ints = (),
    class_nodeids: Ints = (),
    class_treeids: Ints = (),
    class_weights: Floats = (),
    class_weights_as_tensor: Array | None = None,
    classlabels_int64s: Ints = (),
    classlabels_strings: Strings = (),
    nodes_falsenodeids: Ints = (),
    nodes_featureids: Ints = (),
    nodes_hitrates: Floats = (),
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Ints = (),
    nodes_modes: Strings = (),
    nodes_nodeids: Ints = (),
    nodes_treeids: Ints = (),
    nodes_truenodeids: Ints = (),
    nodes_values: Floats = (),
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
) -> tuple[Value, Value]:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsembleClassifier.html"""
    nodes = {
        "treeids": nodes_treeids, "nodeids": nodes_nodeids, "modes": nodes_modes, "featureids": nodes_featureids,
        "truenodeids": nodes_truenodeids, "falsenodeids": nodes_falsenodeids,
        "missing_value_tracks_true": nodes_missing_value_tracks_true,
    }  # fmt: skip
    classes = max(len(classlabels_int64s or classlabels_strings), 1)
    leaves = (class_treeids, class_nodeids, class_ids)
    weights = table(class_weights, class_weights_as_tensor)
    forest = forest_of_nodes(nodes, table(nodes_values, nodes_values_as_tensor), leaves, weights, classes)
    scores, base = emit_scores(b, forest, x, "SUM"), table(base_values, base_values_as_tensor)
    if classes == 2 and len(set(class_ids)) == 1:
        winners, result = _one_scored_class(b, scores, class_ids[0], weights, base, post_transform)
    else:
        result = emit_map(b, lambda s: cast(s, FLOAT32), based(b, scores, base))
        winners = b.emit(ArgReduce("max", 1, False, False), result)
        result = transformed(b, result, post_transform)
    return labels_of(b, winners, classlabels_int64s, classlabels_strings), result


def _one_scored_class(
    b: Builder, scores: Value, scored: int, weights: Array, base: Array, transform: str
) -> tuple[Value, Value]:
    """The winner and both scores where the trees score only one of two classes, as onnxruntime defines them: weights
    that are never negative are a probability, others a margin around 0."""
    offset = float(base[-1]) if base.size else 0.0
    is_probability = bool((weights >= 0).all())
    score = emit_map(b, lambda s: cast(s + offset, FLOAT32), cut(b, scores, {1: (scored, 1, 1)}))
    other = emit_map(b, (lambda s: 1 - s) if is_probability else (lambda s: -s), score)
    winners = emit_map(b, lambda s: cast(s > (0.5 if is_probability else 0), INT64), score)
    result = transformed(b, concat(b, other, score, axis=1), transform)
    return b.emit(Reshape((winners.shape[0],)), winners), result


@operator("TreeEnsemble", since=5, domain=ML)
def tree_ensemble(
    b: Builder,
    x: Value,
    *,
    aggregate_function: int = 1,
    leaf_targetids: Ints,
    leaf_weights: Array,
    membership_values: Array | None = None,
    n_targets: int = 1,
    nodes_falseleafs: Ints,
    nodes_falsenodeids: Ints,
    nodes_featureids: Ints,
    nodes_hitrates: Array | None = None,
    nodes_missing_value_tracks_true: Ints = (),
    nodes_modes: Array,
    nodes_splits: Array,
    nodes_trueleafs: Ints,
    nodes_truenodeids: Ints,
    post_transform: int = 0,
    tree_roots: Ints,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsemble.html"""
    inner, leaves = len(nodes_featureids), len(leaf_weights)
    if not (0 <= aggregate_function < 4 and 0 <= post_transform < 5):
        raise InvalidModel(f"TreeEnsemble with aggregate {aggregate_function} and transform {post_transform}")
    own = np.arange(inner, inner + leaves)
    yes = np.array(nodes_truenodeids) + inner * np.array(nodes_trueleafs)
    no = np.array(nodes_falsenodeids) + inner * np.array(nodes_falseleafs)
    weights, given = np.zeros((leaves, n_targets), FLOAT64), np.zeros((leaves, n_targets), bool)
    weights[np.arange(leaves), list(leaf_targetids)] = leaf_weights
    given[np.arange(leaves), list(leaf_targetids)] = True
    missing = nodes_missing_value_tracks_true or (0,) * inner
    forest = Forest(
        feature=np.concatenate((np.array(nodes_featureids), np.zeros(leaves))).astype(np.int64),
        threshold=np.concatenate((nodes_splits, np.zeros(leaves, nodes_splits.dtype))),
        mode=np.concatenate((nodes_modes, np.zeros(leaves))).astype(np.int8),
        yes=np.concatenate((yes, own)),
        no=np.concatenate((no, own)),
        missing=np.concatenate((missing, np.zeros(leaves))).astype(bool),
        row=np.concatenate((np.zeros(inner, np.int64), np.arange(leaves))),
        roots=np.array(tree_roots, np.int64),
        weights=weights,
        given=given,
    )
    if (forest.mode == MODES.index("MEMBER")).any():
        forest = without_members(forest, np.zeros(0) if membership_values is None else membership_values)
    scores = emit_scores(b, forest, x, AGGREGATES[aggregate_function])
    return transformed(b, emit_map(b, lambda s: cast(s, x.dtype), scores), TRANSFORMS[post_transform])

"""Operators on strings and those of ai.onnx.ml against onnxruntime or the specification's words."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

import gpu_engine
from gpu_engine.errors import InvalidModel
from tests.one_node import FORMS, Array, model_of, onnxruntime_of, run, same

RNG = np.random.default_rng(3)
ML = "ai.onnx.ml"


def texts(*values: str) -> Array:
    return np.array([*values, None], object)[:-1]


def agrees(
    name: str, inputs: dict[str, Array], version: int, outputs: int = 1, rtol: float = 1e-5, **attributes: Any
) -> None:
    """Every form of the node gives what onnxruntime gives; scores may differ in their last digits."""
    expected = onnxruntime_of(model_of(name, inputs, attributes, version, outputs), inputs)
    for form in FORMS:
        found = run(name, inputs, version, outputs, form=form, **attributes)
        for actual, wanted in zip([found] if outputs == 1 else found, expected, strict=True):
            if wanted.dtype == object:
                assert actual.tolist() == wanted.tolist()
            else:
                same(actual, wanted, rtol, 1e-6)


def forest(
    trees: int, depth: int, features: int, targets: int, signed: bool, mode: str = "BRANCH_LEQ"
) -> dict[str, Any]:
    """Complete trees with random tests; every leaf scores every target but the last tree's, which score one."""
    nodes: dict[str, list[Any]] = {key: [] for key in ("treeids", "nodeids", "featureids", "modes", "values")}
    nodes |= {key: [] for key in ("truenodeids", "falsenodeids", "missing_value_tracks_true")}
    leaves: dict[str, list[Any]] = {key: [] for key in ("treeids", "nodeids", "ids", "weights")}
    for tree, node in itertools.product(range(trees), range(2 ** (depth + 1) - 1)):
        is_leaf = node >= 2**depth - 1
        row = {
            "treeids": tree, "nodeids": node, "featureids": int(RNG.integers(features)),
            "modes": "LEAF" if is_leaf else mode, "values": float(np.float32(RNG.normal())),
            "truenodeids": 0 if is_leaf else 2 * node + 1, "falsenodeids": 0 if is_leaf else 2 * node + 2,
            "missing_value_tracks_true": int(RNG.integers(2)),
        }  # fmt: skip
        for key, value in row.items():
            nodes[key].append(value)
        for target in range(targets if is_leaf else 0):
            weight = float(RNG.normal() if signed else RNG.random() / trees)
            for key, value in {"treeids": tree, "nodeids": node, "ids": target, "weights": weight}.items():
                leaves[key].append(value)
    return {"nodes": nodes, "leaves": leaves}


def with_missing(rows: int, features: int) -> Array:
    x = RNG.standard_normal((rows, features)).astype(np.float32)
    x[RNG.random(x.shape) < 0.1] = np.nan
    return x


@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("mode", ["BRANCH_LEQ", "BRANCH_GT", "BRANCH_EQ"])
def test_regression_by_trees(aggregate: str, mode: str) -> None:
    made = forest(5, 3, 4, 2, True, mode)
    attributes = {f"nodes_{key}": value for key, value in made["nodes"].items()}
    attributes |= {f"target_{key}": value for key, value in made["leaves"].items()}
    agrees(
        f"{ML}::TreeEnsembleRegressor", {"X": with_missing(20, 4)}, 3, n_targets=2, aggregate_function=aggregate,
        base_values=[0.5, -0.5], **attributes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "classes, scored, signed, transform",
    [
        (3, 3, True, "NONE"),
        (3, 3, True, "SOFTMAX"),
        (3, 3, False, "LOGISTIC"),
        (2, 2, False, "SOFTMAX"),
        (2, 1, False, "NONE"),
        (2, 1, True, "NONE"),
        (2, 1, True, "LOGISTIC"),
    ],
)
def test_classification_by_trees(classes: int, scored: int, signed: bool, transform: str) -> None:
    """onnxruntime calls the second of two scored classes the winner whenever its score is positive: not compared."""
    made, x = forest(7, 3, 4, scored, signed), with_missing(30, 4)
    attributes: dict[str, Any] = {f"nodes_{key}": value for key, value in made["nodes"].items()}
    attributes |= {f"class_{key}": value for key, value in made["leaves"].items()} | {"post_transform": transform}
    attributes["classlabels_strings"] = ["no", "yes", "perhaps"][:classes]
    name = f"{ML}::TreeEnsembleClassifier"
    labels, scores = onnxruntime_of(model_of(name, {"X": x}, attributes, 3, 2), {"X": x})
    for form in FORMS:
        found = run(name, {"X": x}, 3, 2, form=form, **attributes)
        same(found[1], scores, 1e-5, 1e-6)
        winners = [attributes["classlabels_strings"][i] for i in scores.argmax(1)]
        assert found[0].tolist() == winners and (scored == 2 or winners == labels.tolist())


def test_batches_of_tree_scores_are_proven_and_zip_maps_are_dicts() -> None:
    made = forest(5, 3, 4, 3, False)
    attributes: dict[str, Any] = {f"nodes_{key}": value for key, value in made["nodes"].items()}
    attributes |= {f"class_{key}": value for key, value in made["leaves"].items()}
    x = with_missing(6, 4)
    model = model_of(f"{ML}::TreeEnsembleClassifier", {"X": x}, attributes | {"classlabels_int64s": [4, 5, 6]}, 3, 2)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    model.graph.node.append(onnx.helper.make_node("ZipMap", ["y1"], ["maps"], domain=ML, classlabels_int64s=[4, 5, 6]))
    model.graph.output.append(onnx.ValueInfoProto(name="maps"))
    with gpu_engine.compile(model, device="cpu", hint="throughput") as engine:
        assert engine.plan.batching.symbol == "rows", engine.plan.batching.refused
        whole = engine.run({"X": x})
        assert [max(row, key=row.get) for row in whole["maps"]] == whole["y0"].tolist()
        futures = [engine.submit({"X": x[i : i + 1]}) for i in range(6)]
        for i, future in enumerate(futures):
            same(future.result()["y1"], whole["y1"][i : i + 1])
            assert future.result()["maps"][0] == whole["maps"][i]


def test_membership_in_sets() -> None:
    tensor = onnx.numpy_helper.from_array
    x = np.array([[1.2], [3.0], [0], [np.nan], [7]], np.float32)
    found = run(
        f"{ML}::TreeEnsemble", {"X": x}, 5, n_targets=2, tree_roots=[0], nodes_featureids=[0, 0],
        nodes_modes=tensor(np.array([6, 0], np.uint8)), nodes_splits=tensor(np.array([0, 2.5], np.float32)),
        nodes_truenodeids=[0, 1], nodes_trueleafs=[1, 1], nodes_falsenodeids=[1, 2], nodes_falseleafs=[0, 1],
        nodes_missing_value_tracks_true=[1, 0], leaf_targetids=[0, 1, 0],
        leaf_weights=tensor(np.array([1, 10, 100], np.float32)),
        membership_values=tensor(np.array([3, 7, np.nan], np.float32)),
    )  # fmt: skip
    assert found.tolist() == [[0, 10], [1, 0], [0, 10], [1, 0], [1, 0]]


def test_what_is_no_tree_is_refused() -> None:
    leaves = {"target_treeids": [0], "target_nodeids": [2], "target_ids": [0], "target_weights": [1.0]}
    for place, target, reason in ((1, 1, "cycle"), (2, 0, "root"), (0, 99, "no node 99")):
        made = forest(1, 2, 2, 1, True)["nodes"]
        made["truenodeids"][place] = target
        attributes = {f"nodes_{key}": value for key, value in made.items()}
        with pytest.raises(InvalidModel, match=reason):
            run(f"{ML}::TreeEnsembleRegressor", {"X": with_missing(2, 2)}, 3, **attributes, **leaves)
    tensor = onnx.numpy_helper.from_array
    with pytest.raises(InvalidModel, match="cycle"):
        run(
            f"{ML}::TreeEnsemble", {"X": with_missing(2, 2)}, 5, tree_roots=[0], nodes_featureids=[0],
            nodes_modes=tensor(np.zeros(1, np.uint8)), nodes_splits=tensor(np.zeros(1, np.float32)),
            nodes_truenodeids=[0], nodes_trueleafs=[0], nodes_falsenodeids=[0], nodes_falseleafs=[1],
            leaf_targetids=[0], leaf_weights=tensor(np.ones(1, np.float32)), n_targets=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nodes_truenodeids": [7]}, "names node"),
        ({"nodes_falsenodeids": [-3]}, "names node"),
        ({"tree_roots": [9]}, "names node"),
        ({"tree_roots": [-1]}, "names node"),
        ({"nodes_featureids": [-1]}, "feature"),
        ({"nodes_featureids": [2]}, "feature"),
        ({"nodes_missing_value_tracks_true": [1, 0, 1]}, "length"),
        ({"nodes_featureids": [0, 1]}, "length"),
    ],
)
def test_tables_that_name_what_is_not_there(changed: dict[str, Any], message: str) -> None:
    tensor = onnx.numpy_helper.from_array
    attributes = {
        "tree_roots": [0], "nodes_featureids": [0], "nodes_modes": tensor(np.zeros(1, np.uint8)),
        "nodes_splits": tensor(np.zeros(1, np.float32)), "nodes_truenodeids": [0], "nodes_trueleafs": [1],
        "nodes_falsenodeids": [1], "nodes_falseleafs": [1], "leaf_targetids": [0, 0],
        "leaf_weights": tensor(np.ones(2, np.float32)), "n_targets": 1,
    }  # fmt: skip
    with pytest.raises(InvalidModel, match=message):
        run(f"{ML}::TreeEnsemble", {"X": with_missing(2, 2)}, 5, **(attributes | changed))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
def test_linear_models(dtype: Any) -> None:
    x = (3 * RNG.standard_normal((5, 4))).astype(dtype)
    weights = {"coefficients": RNG.normal(size=12).tolist(), "intercepts": RNG.normal(size=3).tolist()}
    agrees(f"{ML}::LinearRegressor", {"X": x.astype(np.float32)}, 1, targets=3, **weights)
    for transform in ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"):
        settings = {"post_transform": transform, "classlabels_ints": [7, 8, 9]}
        agrees(f"{ML}::LinearClassifier", {"X": x}, 1, 2, 1e-4, **settings, **weights)
    agrees(f"{ML}::Scaler", {"X": x}, 1, offset=[1.0, 2, 3, 4], scale=[0.5, 1, 2, 4])
    for norm in ("MAX", "L1", "L2"):
        agrees(f"{ML}::Normalizer", {"X": np.abs(x)}, 1, norm=norm)
    agrees(f"{ML}::Binarizer", {"X": x.astype(np.float32)}, 1, threshold=0.5)


@pytest.mark.parametrize("kernel", ["LINEAR", "POLY", "RBF", "SIGMOID"])
@pytest.mark.parametrize("classes", [2, 3])
def test_support_vectors(kernel: str, classes: int) -> None:
    x, pairs = RNG.standard_normal((6, 4)).astype(np.float32), classes * (classes - 1) // 2
    counts = [3, 2, 4][:classes]
    attributes: dict[str, Any] = {
        "kernel_type": kernel, "kernel_params": [0.3, 0.1, 2.0], "rho": RNG.normal(size=pairs).tolist(),
        "support_vectors": RNG.normal(size=sum(counts) * 4).tolist(),
    }  # fmt: skip
    weights = RNG.normal(size=(classes - 1) * sum(counts)).tolist()
    chances = {"prob_a": RNG.normal(size=pairs).tolist(), "prob_b": RNG.normal(size=pairs).tolist()}
    for extra in ({}, chances):
        agrees(
            f"{ML}::SVMClassifier", {"X": x}, 1, 2, 1e-4, coefficients=weights, vectors_per_class=counts,
            classlabels_ints=list(range(classes)), **attributes, **extra,
        )  # fmt: skip
    attributes |= {"rho": [0.25], "n_supports": sum(counts), "coefficients": weights[: sum(counts)]}
    for one_class in (0, 1):
        agrees(f"{ML}::SVMRegressor", {"X": x}, 1, 1, 1e-4, one_class=one_class, **attributes)


def test_labels_and_categories() -> None:
    words, numbers = texts("b", "zz", "a"), np.array([5, 9, -1])
    agrees(f"{ML}::LabelEncoder", {"X": words}, 2, keys_strings=["a", "b"], values_int64s=[1, 2], default_int64=-7)
    agrees(f"{ML}::LabelEncoder", {"X": numbers}, 2, keys_int64s=[5, -1], values_strings=["x", "y"], default_string="?")
    floats = np.array([np.nan, 1, 2, 3], np.float32)
    table = {"keys_floats": [1.0, np.nan, 2.0], "values_floats": [10.0, 20.0, 30.0], "default_float": -1.0}
    agrees(f"{ML}::LabelEncoder", {"X": floats}, 4, **table)
    last = run(f"{ML}::LabelEncoder", {"X": numbers}, 2, keys_int64s=[5, 5, 9], values_int64s=[1, 2, 3])
    assert last.tolist() == [2, 3, -1]
    category = {"cats_int64s": [5, 9], "cats_strings": ["b", "zz"]}
    agrees(f"{ML}::CategoryMapper", {"X": words}, 1, default_int64=-3, **category)
    agrees(f"{ML}::CategoryMapper", {"X": numbers}, 1, default_string="none", **category)
    agrees(f"{ML}::OneHotEncoder", {"X": words}, 1, cats_strings=["a", "b"], zeros=1)
    agrees(f"{ML}::OneHotEncoder", {"X": numbers.astype(np.float32)}, 1, cats_int64s=[9, 5], zeros=1)
    with pytest.raises(ValueError, match="no category for 'zz'"):
        run(f"{ML}::OneHotEncoder", {"X": words}, 1, cats_strings=["a", "b"], zeros=0)


def test_features() -> None:
    x = np.array([[1, np.nan, 3], [np.nan, 5, -1]], np.float32)
    agrees(f"{ML}::Imputer", {"X": x}, 1, imputed_value_floats=[7.0, 8, 9], replaced_value_float=float("nan"))
    whole = np.array([[1, -1, 3]], np.int64)
    agrees(f"{ML}::Imputer", {"X": whole}, 1, imputed_value_int64s=[9], replaced_value_int64=-1)
    agrees(f"{ML}::ArrayFeatureExtractor", {"X": x, "Y": np.array([[2, 0]])}, 1)
    agrees(f"{ML}::FeatureVectorizer", {"A": x, "B": x[:, :1]}, 1, inputdimensions=[3, 1])


def test_strings() -> None:
    both = {"x": texts("a", "", "é"), "y": texts("1")}
    assert run("StringConcat", both).tolist() == ["a1", "1", "é1"]
    parts, counts = run("StringSplit", {"x": texts("a,b,,c", "", "d")}, outputs=2, delimiter=",", maxsplit=2)
    assert parts.tolist() == [["a", "b", ",c"], ["", "", ""], ["d", "", ""]] and counts.tolist() == [3, 1, 1]
    parts, counts = run("StringSplit", {"x": texts("  a  b ", "")}, outputs=2)
    assert parts.tolist() == [["a", "b"], ["", ""]] and counts.tolist() == [2, 0]
    assert run("RegexFullMatch", {"x": texts("ab12", "ab", "1ab1")}, pattern=r"[a-z]+\d*").tolist() == [
        True,
        True,
        False,
    ]
    assert run("Equal", {"x": texts("a", "b"), "y": texts("b", "b")}).tolist() == [False, True]
    chosen = run("Where", {"c": np.array([True, False]), "x": texts("a", "b"), "y": texts("z")})
    assert chosen.tolist() == ["a", "z"]


@pytest.mark.parametrize("sensitive", [0, 1])
@pytest.mark.parametrize("action", ["NONE", "LOWER", "UPPER"])
def test_normalized_strings(sensitive: int, action: str) -> None:
    words = texts("Monday", "tuesday", "MONDAY", "Wednesday")
    settings: dict[str, Any] = {
        "is_case_sensitive": sensitive,
        "case_change_action": action,
        "stopwords": ["monday", "Tuesday"],
    }
    agrees("StringNormalizer", {"X": words}, 10, locale="C", **settings)
    assert run("StringNormalizer", {"X": texts("a")[None]}, 10, stopwords=["a"]).tolist() == [[""]]


@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
@pytest.mark.parametrize("shortest, longest, skips", [(1, 1, 0), (2, 2, 0), (1, 2, 3), (2, 3, 1)])
def test_n_grams(mode: str, shortest: int, longest: int, skips: int) -> None:
    pool = {
        "ngram_counts": [0, 4, 10],
        "ngram_indexes": list(range(8)),
        "pool_int64s": [2, 3, 5, 4, 5, 6, 7, 8, 6, 7, 2, 3, 5],
    }
    agrees(
        "TfIdfVectorizer", {"X": RNG.integers(2, 9, (3, 12))}, 9, mode=mode, min_gram_length=shortest,
        max_gram_length=longest, max_skip_count=skips, weights=[float(w) for w in range(1, 9)], **pool,
    )  # fmt: skip

"""Tree ensembles and places of extremes on the CPU device: bit for bit what the reference gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpu_engine
from cpu_fallback.calls import Native
from cpu_fallback.checks import is_verdict
from cpu_fallback.native import host
from cpu_fallback.trees import lower_trees
from gpu_engine.errors import InputError
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, INT64, UINT8, UINT64, DType
from gpu_engine.ir.ops import ArgReduce
from gpu_engine.ir.ops.trees import MODES, Trees
from tests.cpu_execution import check_op
from tests.node_runner import run_node
from tests.one_node import model_of, onnxruntime_of

Array = Any
N = dims.symbol("N")
AGGREGATES = ("SUM", "AVERAGE", "MIN", "MAX")


def depth_of(yes: Array, no: Array, roots: Array) -> int:
    depth, places = 0, np.unique(roots)
    while (places := np.unique([(yes[p], no[p]) for p in places if yes[p] != p or no[p] != p])).size:
        depth += 1
    return depth


def forest(seed: int, trees: int, targets: int, modes: tuple[str, ...], features: int, threshold: DType) -> list[Array]:
    """Random tables: trees of uneven depth, small whole thresholds (so that values meet them), some NaN, leaves that
    lack targets."""
    random = np.random.default_rng(seed)
    nodes: list[list[int]] = []
    roots = []
    for _ in range(trees):
        roots.append(len(nodes))
        nodes.append([])
        waiting, inner = [roots[-1]], int(random.integers(12))
        while waiting:
            place = waiting.pop(int(random.integers(len(waiting))))
            if inner:
                inner -= 1
                children = [len(nodes), len(nodes) + 1]
                nodes += [[], []]
                nodes[place] = children
                waiting += children
            else:
                nodes[place] = [place, place]
    yes, no = np.array(nodes, np.int64).T
    count, leaf = len(nodes), yes == np.arange(len(nodes))
    row = np.zeros(count, np.int64)
    row[leaf] = random.permutation(int(leaf.sum()))
    levels = random.integers(-3, 4, count).astype(threshold)
    levels[random.random(count) < 0.05] = np.nan
    mode = np.array([MODES.index(modes[i]) for i in random.integers(len(modes), size=count)], np.int8)
    given = random.random((int(leaf.sum()), targets)) < 0.7
    weights = np.where(given, random.standard_normal(given.shape), 0)
    feature = np.where(leaf, 0, random.integers(features, size=count))
    missing = random.random(count) < (0.5 if seed % 2 else 0)
    return [feature, levels, mode, yes, no, missing, row, np.array(roots, np.int64), weights, given]


def rows_of(seed: int, rows: int, features: int, dtype: DType) -> Array:
    x = np.random.default_rng(seed).integers(0 if dtype.kind == "u" else -4, 5, (rows, features)).astype(dtype)
    if dtype.kind == "f":
        x[np.random.default_rng(seed + 1).random(x.shape) < 0.1] = np.nan
        x[np.random.default_rng(seed + 2).random(x.shape) < 0.02] = np.inf
    return x


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    trees=st.integers(1, 19),
    targets=st.integers(1, 11),
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=6, unique=True),
    aggregate=st.sampled_from(AGGREGATES),
    rows=st.integers(0, 33),
    dtypes=st.sampled_from(
        ((FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (FLOAT64, FLOAT32), (INT64, FLOAT32), (UINT8, FLOAT64))
    ),
    threads=st.integers(1, 3),
)
def test_random_forests(
    seed: int,
    trees: int,
    targets: int,
    modes: list[str],
    aggregate: str,
    rows: int,
    dtypes: tuple[DType, DType],
    threads: int,
) -> None:
    order = tuple(sorted(modes, key=MODES.index))
    tables = forest(seed, trees, targets, order, 5, dtypes[1])
    op = Trees(order, depth_of(tables[3], tables[4], tables[7]), aggregate)
    x = rows_of(seed, rows, 5, dtypes[0])
    found = run_node(
        lambda lowering, op, node, inputs, outputs, _: lower_trees(lowering, op, node, inputs, outputs),
        op, [x, *tables], host(), threads=threads, constants=range(1, 11),
    )  # fmt: skip
    with np.errstate(invalid="ignore"):
        (expected,) = op.evaluate(np, x, *tables)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", (FLOAT16, BFLOAT16), ids=str)
def test_other_dtypes_run_the_reference(dtype: DType) -> None:
    tables = forest(1, 3, 2, ("LEQ",), 4, FLOAT32)
    check_op(
        Trees(("LEQ",), depth_of(tables[3], tables[4], tables[7]), "SUM"),
        [rows_of(0, 7, 4, FLOAT32).astype(dtype), *tables],
        native=False,
    )


@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT8, INT32, UINT8, UINT64), ids=str)
@pytest.mark.parametrize("kind", ("min", "max"))
@pytest.mark.parametrize("last", (False, True))
def test_places_of_extremes(dtype: DType, kind: str, last: bool) -> None:
    random = np.random.default_rng(5)
    for shape, axis in (
        ((3, 7, 5), 1),
        ((3, 7, 5), 2),
        ((3, 7, 5), 0),
        ((1, 1), 1),
        ((9, 0), 0),
        ((0, 4), 1),
        ((66, 3), 1),
    ):
        x = random.integers(0, 3, shape).astype(dtype)
        if dtype.kind == "f" or dtype == BFLOAT16:
            x[random.random(shape) < 0.15] = np.nan
            x[random.random(shape) < 0.1] = -np.inf
        op = ArgReduce(kind, axis, False, last)
        check_op(op, [x])
        check_op(ArgReduce(kind, axis, True, last), [x], shapes=((N, *shape[1:]),), native=axis > 0)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    shape=st.tuples(st.integers(1, 12), st.integers(0, 4), st.integers(1, 6)),
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=6, unique=True),
    aggregate=st.sampled_from(AGGREGATES),
    transform=st.sampled_from(("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO")),
    based=st.booleans(),
    rows=st.integers(1, 17),
)
def test_random_models_agree_with_onnxruntime(
    seed: int,
    shape: tuple[int, int, int],
    modes: list[str],
    aggregate: str,
    transform: str,
    based: bool,
    rows: int,
) -> None:
    """Regression: every mode, aggregate, transform and base values, with missing values. ONNX Runtime leaves a single
    score as it is, lets a missing value pass NEQ whatever the model says, and adds no base value to a target that no
    leaf scored."""
    trees, depth, targets = shape
    assume(targets > 1 or transform == "NONE")
    random = np.random.default_rng(seed)
    nodes, leaves = random_trees(random, trees, depth, targets, modes, 1.0 if based else 0.6)
    attributes = {f"nodes_{key}": value for key, value in nodes.items()}
    attributes |= {f"target_{key}": value for key, value in leaves.items()}
    attributes |= {"n_targets": targets, "aggregate_function": aggregate, "post_transform": transform}
    attributes |= {"base_values": random.standard_normal(targets).astype(np.float32).tolist()} if based else {}
    x = rows_of(seed, rows, 4, FLOAT32)
    x = np.nan_to_num(x) if "NEQ" in modes else x
    model = model_of("ai.onnx.ml::TreeEnsembleRegressor", {"X": x}, attributes, 3, 1, free=["X"])
    (expected,) = onnxruntime_of(model, {"X": x})
    with gpu_engine.compile(model, device="cpu") as engine:
        assert all(isinstance(step.kernel, Native) or is_verdict(step) for step in engine.plan.steps)
        np.testing.assert_allclose(engine.run(x), expected, 1e-5, 1e-6)


def test_too_few_features_are_refused() -> None:
    nodes, leaves = random_trees(np.random.default_rng(0), 3, 3, 1, ["LEQ"])
    attributes = {f"nodes_{key}": value for key, value in nodes.items()} | {"n_targets": 1}
    attributes |= {f"target_{key}": value for key, value in leaves.items()}
    x = np.zeros((2, 4), np.float32)
    model = model_of("ai.onnx.ml::TreeEnsembleRegressor", {"X": x}, attributes, 3, 1, free=["X"])
    with gpu_engine.compile(model, device="cpu") as engine:
        engine.run(x)
        with pytest.raises(InputError, match="feature 3 of 2"):
            engine.run(x[:, :2].copy())


def random_trees(
    random: np.random.Generator, trees: int, depth: int, targets: int, modes: list[str], share: float = 1.0
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Complete trees; every leaf scores the first target and a share of the others."""
    nodes: dict[str, list[Any]] = {key: [] for key in NODE_LISTS}
    leaves: dict[str, list[Any]] = {key: [] for key in ("treeids", "nodeids", "ids", "weights")}
    inner = 2**depth - 1
    for tree in range(trees):
        for node in range(2 * inner + 1):
            leaf = node >= inner
            mode = "LEAF" if leaf else f"BRANCH_{modes[int(random.integers(len(modes)))]}"
            children = (0, 0) if leaf else (2 * node + 1, 2 * node + 2)
            level, feature, missing = (float(random.integers(-3, 4)), int(random.integers(4)), int(random.integers(2)))
            row = (tree, node, feature, mode, level, *children, 0 if leaf else missing)
            for key, value in zip(NODE_LISTS, row, strict=True):
                nodes[key].append(value)
            for target in range(targets if leaf else 0):
                if target == 0 or random.random() < share:
                    values = (tree, node, target, float(np.float32(random.standard_normal())))
                    for key, value in zip(leaves, values, strict=True):
                        leaves[key].append(value)
    return nodes, leaves


NODE_LISTS = (
    "treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids", "missing_value_tracks_true",
)  # fmt: skip

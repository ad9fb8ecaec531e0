"""Tree ensembles of the domain ai.onnx.ml: all rows walk all trees at once, one level at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import emit_array
from gpu_engine.ir.dtypes import FLOAT64, DType
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Reshape

Array = NDArray[Any]
MODES = ("LEQ", "LT", "GTE", "GT", "EQ", "NEQ", "MEMBER")
"""In the order of TreeEnsemble's numbers for them."""


@dataclass(frozen=True)
class Forest:
    """Trees as one table of nodes. A leaf points at itself; `row` is its row in `weights` [leaves, targets], where
    `given` says which entries the model has at all."""

    feature: Array
    threshold: Array
    mode: Array
    yes: Array
    no: Array
    missing: Array
    row: Array
    roots: Array
    weights: Array
    given: Array


def depth_of(forest: Forest) -> int:
    """How many steps lead from a root to the farthest leaf; InvalidModel if a walk never ends, or a test is below no
    root."""
    own = np.arange(len(forest.feature))
    inner = (forest.yes != own) | (forest.no != own)
    places, depth, reached = np.unique(forest.roots), 0, np.zeros(len(own), bool)
    while True:
        reached[places] = True
        places = places[inner[places]]
        if not places.size:
            break
        places, depth = np.unique(np.concatenate((forest.yes[places], forest.no[places]))), depth + 1
        if depth > len(own):
            raise InvalidModel("a tree has a cycle")
    if not reached[inner].all():
        raise InvalidModel("a tree has nodes below no root")
    return depth


def emit_scores(b: Builder, forest: Forest, x: Value, aggregate: str, dtype: DType) -> Value:
    """The aggregated weights [N, targets] of the leaves that the rows of x [N, features] (or [features]) reach."""
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    kind = TensorType(dtype, (rows.shape[0], forest.weights.shape[1]))
    inner = (forest.yes != np.arange(len(forest.yes))) | (forest.no != np.arange(len(forest.yes)))
    modes = tuple(MODES[i] for i in sorted(set(forest.mode[inner]))) or MODES[:1]
    tables = [getattr(forest, name) for name in TABLES]
    if isinstance(x.shape[-1], int) and forest.feature.max(initial=0) >= x.shape[-1]:
        raise InvalidModel(f"a tree reads feature {forest.feature.max()} of {x.type}")
    attributes = {"modes": modes, "depth": depth_of(forest), "aggregate": aggregate}
    return emit_array(b, walk, lambda b, *_, **__: kind, (rows, *map(b.constant, tables)), attributes, mixes=(1,))[0]


TABLES = ("feature", "threshold", "mode", "yes", "no", "missing", "row", "roots", "weights", "given")


def walk(xp: Any, x: Any, *tables: Any, modes: tuple[str, ...], depth: int, aggregate: str) -> Any:
    feature, threshold, mode, yes, no, missing, row, roots, weights, given = tables
    lines = xp.arange(x.shape[0]).reshape(-1, 1)
    place = xp.broadcast_to(roots, (x.shape[0], roots.shape[0]))
    for _ in range(depth):
        value = x[lines, feature[place]]
        passed = _test(xp, value, threshold[place], mode[place], modes)
        if x.dtype.kind == "f":
            passed = xp.where(xp.isnan(value), missing[place], passed)
        place = xp.where(passed, yes[place], no[place])
    return _aggregated(xp, row[place], weights, given, aggregate)


def _test(xp: Any, value: Any, threshold: Any, mode: Any, modes: tuple[str, ...]) -> Any:
    tests = {
        "LEQ": xp.less_equal, "LT": xp.less, "GTE": xp.greater_equal, "GT": xp.greater, "EQ": xp.equal,
        "NEQ": xp.not_equal,
    }  # fmt: skip
    passed = tests[modes[0]](value, threshold)
    for name in modes[1:]:
        passed = xp.where(mode == MODES.index(name), tests[name](value, threshold), passed)
    return passed


def _aggregated(xp: Any, rows: Any, weights: Any, given: Any, aggregate: str) -> Any:
    """[N, targets] of the leaf rows [N, trees]; a target that no leaf reached has is 0."""
    shape = (rows.shape[0], weights.shape[1])
    if aggregate in ("SUM", "AVERAGE"):
        total = xp.zeros(shape, np.float64)
        for tree in range(rows.shape[1]):
            total += weights[rows[:, tree]]
        return total / rows.shape[1] if aggregate == "AVERAGE" else total
    pick, worst = (xp.minimum, np.inf) if aggregate == "MIN" else (xp.maximum, -np.inf)
    best, reached = xp.full(shape, worst, np.float64), xp.zeros(shape, bool)
    for tree in range(rows.shape[1]):
        here = given[rows[:, tree]]
        best = xp.where(here, pick(best, weights[rows[:, tree]]), best)
        reached = reached | here
    return xp.where(reached, best, 0)


def forest_of_nodes(
    nodes: Mapping[str, Sequence[Any]],
    values: Array,
    leaves: tuple[Sequence[int], Sequence[int], Sequence[int]],
    weights: Array,
    targets: int,
) -> Forest:
    """The forest that parallel lists describe: nodes named by (tree, node), `leaves` the trees, nodes and targets of
    the weights."""
    trees, ids, modes = nodes["treeids"], nodes["nodeids"], nodes["modes"]
    places = {key: i for i, key in enumerate(zip(trees, ids, strict=True))}
    count = len(places)
    own = np.arange(count)
    is_leaf = np.array([mode == "LEAF" for mode in modes], bool)
    if count != len(values) or not count:
        raise InvalidModel(f"{count} nodes of trees and {len(values)} values")
    yes, no = own.copy(), own.copy()
    for i in own[~is_leaf]:
        yes[i] = _place(places, trees[i], nodes["truenodeids"][i])
        no[i] = _place(places, trees[i], nodes["falsenodeids"][i])
    children = np.zeros(count, bool)
    children[yes[~is_leaf]] = children[no[~is_leaf]] = True
    table, given = np.zeros((count, targets), FLOAT64), np.zeros((count, targets), bool)
    for tree, node, target, weight in zip(*leaves, weights, strict=True):
        if not 0 <= target < targets:
            raise InvalidModel(f"a leaf scores target {target} of {targets}")
        table[_place(places, tree, node), target] += weight
        given[_place(places, tree, node), target] = True
    missing = nodes.get("missing_value_tracks_true") or [0] * count
    return Forest(
        feature=np.where(is_leaf, 0, np.array(nodes["featureids"], np.int64)),
        threshold=np.asarray(values),
        mode=np.array([_mode(mode) for mode in modes], np.int8),
        yes=yes,
        no=no,
        missing=np.array(missing, bool),
        row=own,
        roots=own[~children],
        weights=table,
        given=given,
    )


def _place(places: Mapping[tuple[int, int], int], tree: int, node: int) -> int:
    if (tree, node) not in places:
        raise InvalidModel(f"tree {tree} has no node {node}")
    return places[tree, node]


def _mode(name: str) -> int:
    if name == "LEAF":
        return 0
    if name.removeprefix("BRANCH_") not in MODES[:6]:
        raise InvalidModel(f"trees do not branch by {name}")
    return MODES.index(name.removeprefix("BRANCH_"))


def without_members(forest: Forest, members: Array) -> Forest:
    """Each test for membership in a set as a chain of tests for equality with its members.

    `members` lists the sets of the MEMBER nodes in their order, each ended by NaN.
    """
    ends = np.flatnonzero(np.isnan(members))
    nodes = np.flatnonzero(forest.mode == MODES.index("MEMBER"))
    if len(nodes) != len(ends):
        raise InvalidModel(f"{len(ends)} sets for {len(nodes)} tests of membership")
    columns = {name: list(getattr(forest, name)) for name in TABLES[:7]}
    for node, start, end in zip(nodes, (0, *(ends[:-1] + 1)), ends, strict=True):
        place = int(node)
        chosen = members[start:end] if end > start else members[end : end + 1]
        for number, member in enumerate(chosen):
            columns["threshold"][place], columns["mode"][place] = member, MODES.index("EQ")
            if number + 1 < len(chosen):
                following = len(columns["mode"])
                for column in columns.values():
                    column.append(column[place])
                columns["no"][place], place = following, following
    arrays = {name: np.array(column, getattr(forest, name).dtype) for name, column in columns.items()}
    return Forest(**arrays, roots=forest.roots, weights=forest.weights, given=forest.given)

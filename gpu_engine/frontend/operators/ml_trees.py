"""Tree ensembles of the domain ai.onnx.ml: the tables that their attributes describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dtypes import FLOAT64
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Reshape
from gpu_engine.ir.ops import trees as branches
from gpu_engine.ir.ops.trees import Trees

Array = NDArray[Any]
MODES = (*branches.MODES, "MEMBER")
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


def emit_scores(b: Builder, forest: Forest, x: Value, aggregate: str) -> Value:
    """The aggregated weights [N, targets], float64, of the leaves that the rows of x [N, features] (or [features])
    reach."""
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    _check_places(forest)
    features = forest.feature.max(initial=0)
    if forest.feature.min(initial=0) < 0 or (isinstance(x.shape[-1], int) and features >= x.shape[-1]):
        raise InvalidModel(f"a tree reads features {forest.feature.min(initial=0)} to {features} of {x.type}")
    own = np.arange(len(forest.yes))
    inner = (forest.yes != own) | (forest.no != own)
    modes = tuple(MODES[i] for i in sorted(set(forest.mode[inner]))) or MODES[:1]
    tables = [b.constant(getattr(forest, name)) for name in TABLES]
    return b.emit(Trees(modes, depth_of(forest), aggregate), rows, *tables)


TABLES = ("feature", "threshold", "mode", "yes", "no", "missing", "row", "roots", "weights", "given")


def _check_places(forest: Forest) -> None:
    """InvalidModel if a table names an entry that another one does not have."""
    nodes = len(forest.feature)
    lengths = {name: len(getattr(forest, name)) for name in TABLES[:7]}
    if set(lengths.values()) != {nodes}:
        raise InvalidModel(f"lists of nodes of trees differ in length: {lengths}")
    if forest.weights.shape != forest.given.shape:
        raise InvalidModel(f"weights of trees {forest.weights.shape} and {forest.given.shape}")
    if not len(forest.weights) or not forest.weights.shape[1]:
        raise InvalidModel("trees without leaves or targets")
    for name, limit in (("yes", nodes), ("no", nodes), ("roots", nodes), ("row", len(forest.weights))):
        places = getattr(forest, name)
        if places.min(initial=0) < 0 or places.max(initial=0) >= limit:
            raise InvalidModel(f"a tree names node {places.min(initial=0)} or {places.max(initial=0)} of {limit}")


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

"""Trees: an ensemble of decision trees; all rows walk all trees at once, one level at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dtypes import FLOAT64
from gpu_engine.ir.graph import TensorType

MODES = ("LEQ", "LT", "GTE", "GT", "EQ", "NEQ")


@dataclass(frozen=True)
class Trees:
    """The aggregated weights [N, targets], float64, of the leaves that the rows of x [N, features] reach.

    Operands behind x, one entry a node: feature int64, threshold, mode int8 (its place in MODES), yes and no int64
    (where to go on: a leaf points at itself), missing bool (whether NaN passes the test), row int64 (of a leaf in
    `weights`); roots int64 [trees]; weights float64 [leaves, targets] and given bool, the entries that the model has.
    No leaf is more than `depth` steps from its root. `aggregate` is SUM, AVERAGE, MIN or MAX; a target that none of
    the leaves reached has is 0.
    """

    modes: tuple[str, ...]
    depth: int
    aggregate: str

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, weights = inputs[0], inputs[9]
        if x.rank != 2 or weights.rank != 2:
            raise InvalidModel(f"trees over {x} with weights {weights}")
        return (TensorType(FLOAT64, (x.shape[0], weights.shape[1])),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, feature, threshold, mode, yes, no, missing, row, roots, weights, given = arrays
        lines = xp.arange(x.shape[0]).reshape(-1, 1)
        place = xp.broadcast_to(roots, (x.shape[0], roots.shape[0]))
        for _ in range(self.depth):
            value = x[lines, feature[place]]
            passed = self._test(xp, value, threshold[place], mode[place])
            if x.dtype.kind == "f":
                passed = xp.where(xp.isnan(value), missing[place], passed)
            place = xp.where(passed, yes[place], no[place])
        return (self._aggregated(xp, row[place], weights, given),)

    def _test(self, xp: Any, value: Any, threshold: Any, mode: Any) -> Any:
        tests = {
            "LEQ": xp.less_equal, "LT": xp.less, "GTE": xp.greater_equal, "GT": xp.greater, "EQ": xp.equal,
            "NEQ": xp.not_equal,
        }  # fmt: skip
        passed = tests[self.modes[0]](value, threshold)
        for name in self.modes[1:]:
            passed = xp.where(mode == MODES.index(name), tests[name](value, threshold), passed)
        return passed

    def _aggregated(self, xp: Any, rows: Any, weights: Any, given: Any) -> Any:
        """[N, targets] of the leaf rows [N, trees]."""
        shape = (rows.shape[0], weights.shape[1])
        if self.aggregate in ("SUM", "AVERAGE"):
            total = xp.zeros(shape, np.float64)
            for tree in range(rows.shape[1]):
                total += weights[rows[:, tree]]
            return total / rows.shape[1] if self.aggregate == "AVERAGE" else total
        pick, worst = (xp.minimum, np.inf) if self.aggregate == "MIN" else (xp.maximum, -np.inf)
        best, reached = xp.full(shape, worst, np.float64), xp.zeros(shape, bool)
        for tree in range(rows.shape[1]):
            here = given[rows[:, tree]]
            best = xp.where(here, pick(best, weights[rows[:, tree]]), best)
            reached = reached | here
        return xp.where(reached, best, 0)

"""Scores of attention to weights, row by row and in place: scaled, masked, exp(score - greatest score).

The weights are not divided by their sum: what they are multiplied with is, later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, lane_count, literal, vector
from cpu_fallback.loops import CONTIGUOUS, Mask, Read, Write, folded, lane_mask, lane_zero, least, splat, vector_loop
from cpu_fallback.native import Target
from cpu_fallback.packing import lanes_of
from cpu_fallback.vector_math import Num, exp2_of_negative
from gpu_engine.ir.dtypes import BOOL, FLOAT32, DType

SIZE = FLOAT32.itemsize
GROUP = 4
"""Vectors of a row that are taken at a time."""


@dataclass(frozen=True)
class Rule:
    """What makes weights of scores: see `ir.ops.Attention`; the dtype of the mask, and how its rows are read."""

    scale: float
    causal: bool
    fill: float
    zero_nan: bool
    mask: DType | None
    access: str


@dataclass(frozen=True)
class Masks:
    """The mask of a block of queries: its first row, bytes from row to row, and from column to column if strided."""

    base: Reg
    row: Reg
    column: Reg | None


@dataclass(frozen=True)
class Scores:
    """A block of scores: bytes from row to row; what every row is to be multiplied with is put at `factors`."""

    base: Reg
    row: Reg
    factors: Reg


@dataclass(frozen=True)
class Weighing:
    """Writes the code of `rule`."""

    rule: Rule
    code: Code
    target: Target

    @property
    def lanes(self) -> int:
        return self.target.vector_nbytes // SIZE

    @property
    def kind(self) -> str:
        return vector(self.lanes, "float")

    def weigh(self, scores: Scores, first: Reg, count: Reg, keys: Reg, used: Reg, masks: Masks | None) -> None:
        """`count` rows, of queries from `first` on: zeros stand behind the keys that a query sees, up to `used`."""
        code = self.code

        def line(index: Reg, _: list[Reg]) -> list[Reg]:
            row = code.at(scores.base, code.binary("mul", index, scores.row))
            seen = keys
            if self.rule.causal:
                seen = least(code, code.binary("add", code.binary("add", first, index), i64(1)), keys)
            mask = None
            if masks is not None:
                own = code.at(masks.base, code.binary("mul", index, masks.row))
                mask = Masks(own, masks.row, masks.column)
            total = self._row(row, seen, mask)
            empty = code.compare("fcmp oeq", total, literal("float", 0))
            factor = code.select(empty, literal("float", 0), code.binary("fdiv", literal("float", 1), total))
            behind = code.binary("and", code.binary("add", seen, i64(self.lanes - 1)), i64(-self.lanes))
            if self.rule.zero_nan:
                lost = code.compare("fcmp uno", total, total)
                behind, factor = code.select(lost, i64(0), behind), code.select(lost, literal("float", 1), factor)
            code.store(factor, self._at(scores.factors, index), SIZE)
            if self.rule.zero_nan or self.rule.causal:
                code.loop(behind, used, i64(self.lanes), lambda i, _: self._clear(row, i))
            return []

        code.loop(i64(0), count, i64(1), line)

    def _clear(self, row: Reg, index: Reg) -> list[Reg]:
        self.code.store(literal(self.kind, 0), self._at(row, index), SIZE)
        return []

    def _at(self, base: Reg, index: Reg) -> Reg:
        return self.code.let("ptr", f"getelementptr float, {base}, {index}")

    def _row(self, row: Reg, seen: Reg, mask: Masks | None) -> Reg:
        """One row; the sum of its weights, NaN if no score is finite."""
        code, scale = self.code, self.rule.scale
        plain = mask is None and scale > 0
        if plain:
            (tops,) = self._walk(row, seen, lambda x: (None, x), "max", -math.inf)
        else:
            (tops,) = self._masked(row, seen, mask)
        top = lane_zero(code, folded(code, tops, lambda a, b: code.select(code.compare("fcmp ogt", a, b), a, b)))
        factor = (scale if plain else 1.0) / math.log(2)
        spread = splat(code, top, self.lanes * GROUP)

        def weight(x: Reg) -> tuple[Reg | None, Reg]:
            shift = Num(code, lanes_of(code, spread, 0, lane_count(x.type)))
            result = exp2_of_negative(Num(code, x) - shift, factor).reg
            return result, result

        (sums,) = self._walk(row, seen, weight, "sum", 0.0)
        return lane_zero(code, folded(code, sums, lambda a, b: code.binary("fadd", a, b)))

    def _walk(
        self, row: Reg, seen: Reg, change: Callable[[Reg], tuple[Reg | None, Reg]], fold: str, neutral: float
    ) -> list[Reg]:
        """Change a row in place, if `change` gives something to store, and fold what else it gives.

        `GROUP` vectors at a time, while there are so many: chains of instructions side by side.
        """
        code = self.code

        def combined(total: Reg, x: Reg) -> Reg:
            if fold == "sum":
                return code.binary("fadd", total, x)
            return code.select(code.compare("fcmp ogt", x, total), x, total)

        def step(index: Reg, totals: list[Reg]) -> list[Reg]:
            place = self._at(row, index)
            stored, x = change(code.load(totals[0].type, place, SIZE))
            if stored is not None:
                code.store(stored, place, SIZE)
            return [combined(totals[0], x)]

        def tail() -> list[Reg]:
            place, mask = self._at(row, whole), lane_mask(code, self.lanes, left)
            stored, x = change(code.load(self.kind, place, SIZE))
            if stored is not None:
                code.store(code.select(mask, stored, literal(self.kind, 0)), place, SIZE)
            return [combined(totals[0], code.select(mask, x, literal(self.kind, neutral)))]

        wide = self.lanes * GROUP
        most, whole = (code.binary("and", seen, i64(-size)) for size in (wide, self.lanes))
        left = code.binary("sub", seen, whole)
        (total,) = code.loop(i64(0), most, i64(wide), step, [literal(vector(wide, "float"), neutral)])
        parts = [lanes_of(code, total, start, self.lanes) for start in range(0, wide, self.lanes)]
        while len(parts) > 1:
            parts = [combined(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        totals = code.loop(most, whole, i64(self.lanes), step, parts)
        return code.either(code.compare("icmp sgt", left, i64(0)), tail, lambda: totals)

    def _masked(self, row: Reg, seen: Reg, mask: Masks | None) -> list[Reg]:
        """A row scaled and masked in place; the greatest score of every lane."""
        code, rule = self.code, self.rule
        lowest = literal(self.kind, -math.inf)
        reads = [Read(row, FLOAT32, CONTIGUOUS)]
        if mask is not None and rule.mask is not None:
            reads.append(Read(mask.base, rule.mask, rule.access, mask.column))

        def body(loaded: list[Reg], inside: Mask, tops: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            x = Num(code, loaded[0])
            if rule.mask is None:
                x = x * rule.scale
            elif rule.mask == BOOL:
                x = Num(code, loaded[1]).select(x * rule.scale, rule.fill)
            else:
                x = x.fma(rule.scale, Num(code, loaded[1]))
            counted = code.select(inside(), x.reg, lowest)
            return [x.reg], [code.select(code.compare("fcmp ogt", counted, tops[0]), counted, tops[0])]

        writes = [Write(row, FLOAT32)]
        return vector_loop(code, self.target, self.lanes, (i64(0), seen), reads, writes, body, [lowest])

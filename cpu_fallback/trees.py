"""Tree ensembles: a few trees walk side by side over one row, without branches, to the depth of the deepest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_fallback.calls import Array, Native
from cpu_fallback.checks import GREATER, emit_relations
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.lanes import COMPUTED, STORED, widened
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target
from cpu_fallback.vector_math import Num
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.trees import MODES, Trees
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
ABREAST = 8
"""Trees that walk at the same time, so that one waits for memory while others go on."""
REGISTER_TARGETS = 8
LEAST, EQUAL, GREATEST, MISSING = 1, 2, 4, 8
PASSING = {"LEQ": 3, "LT": 1, "GTE": 6, "GT": 4, "EQ": 2, "NEQ": 5}
CONDITIONS = {"LEQ": "ole", "LT": "olt", "GTE": "oge", "GT": "ogt", "EQ": "oeq", "NEQ": "one"}


@dataclass(frozen=True)
class TreesKernel:
    """Words: result, x, node records, roots as offsets of records, weights, rows, bytes of a row of x, groups of trees,
    steps to the farthest leaf, targets, trees.

    A record: threshold (of a leaf: the offset of its weights), offset of the feature in a row, offsets of the records
    to go on with if the test passes and if not. All tests are `mode`, which NaN fails; or with `mode` "" a fifth field
    says which outcomes pass. Up to REGISTER_TARGETS `targets` stay in registers, 0 stands for more.
    """

    x: DType
    compared: DType
    mode: str
    targets: int
    aggregate: str

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        out, x, records, roots, weights = words.pointers(5)
        rows, row_nbytes, groups, depth, targets, trees = words.numbers(6)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            source = code.at(x, code.binary("mul", index, row_nbytes))
            place = code.at(out, code.binary("mul", index, code.binary("mul", targets, i64(8))))

            def walk(group: Reg) -> list[Reg]:
                first = code.at(roots, code.binary("mul", group, i64(8 * ABREAST)))
                starts = [code.load("i64", code.at(first, i64(8 * i)), 8) for i in range(ABREAST)]
                ends = code.loop(
                    i64(0), depth, i64(1), lambda _, at: [self._next(code, source, records, one) for one in at], starts
                )
                offsets = [code.load("i32", code.at(records, end), 4) for end in ends]
                return [code.at(weights, code.convert("zext", offset, "i64")) for offset in offsets]

            aggregate = self._in_registers if self.targets else self._in_memory
            aggregate(code, place, walk, groups, targets, trees)
            return []

        code.loop(*thread_share(code, rows, 1), i64(1), row)

    def _next(self, code: Code, source: Reg, records: Reg, place: Reg) -> Reg:
        """Where the walk goes on from the record at offset `place`."""
        record, size = code.at(records, place), self.compared.itemsize
        kind = COMPUTED[self.compared]
        threshold = Num(code, code.load(kind, record, 4))
        feature = code.convert("zext", code.load("i32", code.at(record, i64(size)), 4), "i64")
        yes, no = (code.load("i32", code.at(record, i64(size + 4 * i)), 4) for i in (1, 2))
        value = Num(code, self._value(code, code.at(source, feature), kind))
        if self.mode:
            passed = code.compare(f"fcmp {CONDITIONS[self.mode]}", value.reg, threshold.reg)
        else:
            passing = code.load("i32", code.at(record, i64(size + 12)), 4)
            outcome = literal("i32", MISSING)
            for condition, bit in (("ogt", GREATEST), ("oeq", EQUAL), ("olt", LEAST)):
                found = code.compare(f"fcmp {condition}", value.reg, threshold.reg)
                outcome = code.select(found, literal("i32", bit), outcome)
            passed = code.compare("icmp ne", code.binary("and", passing, outcome), literal("i32", 0))
        return code.convert("zext", code.select(passed, yes, no), "i64")

    def _value(self, code: Code, place: Reg, kind: str) -> Reg:
        loaded = widened(code, code.load(STORED[self.x], place, self.x.itemsize), self.x)
        if self.x.kind == "f":
            return code.convert("fpext", loaded, kind)
        return code.convert("uitofp" if self.x.kind == "u" else "sitofp", loaded, kind)

    def _in_registers(self, code: Code, place: Reg, walk: Any, groups: Reg, _: Reg, trees: Reg) -> None:
        lanes = padded(self.targets)
        kind = vector(lanes, "double")

        def body(group: Reg, total: list[Reg]) -> list[Reg]:
            result = total[0]
            for leaf in walk(group):
                result = self._joined(code, result, code.load(kind, leaf, 8))
            return [result]

        start = literal(kind, self._start())
        (total,) = code.loop(i64(0), groups, i64(1), body, [start])
        result = self._finished(code, total, trees, lanes)
        for lane in range(self.targets):
            one = code.let("double", f"extractelement {result}, i32 {lane}") if lanes > 1 else result
            code.store(one, code.at(place, i64(8 * lane)), 8)

    def _in_memory(self, code: Code, place: Reg, walk: Any, groups: Reg, targets: Reg, trees: Reg) -> None:
        def every(change: Any) -> None:
            def one(target: Reg, _: list[Reg]) -> list[Reg]:
                offset = code.binary("mul", target, i64(8))
                at = code.at(place, offset)
                code.store(change(code.load("double", at, 8), offset), at, 8)
                return []

            code.loop(i64(0), targets, i64(1), one)

        def body(group: Reg, _: list[Reg]) -> list[Reg]:
            leaves = walk(group)

            def joined(total: Reg, offset: Reg) -> Reg:
                for leaf in leaves:
                    total = self._joined(code, total, code.load("double", code.at(leaf, offset), 8))
                return total

            every(joined)
            return []

        every(lambda _, __: literal("double", self._start()))
        code.loop(i64(0), groups, i64(1), body)
        every(lambda total, _: self._finished(code, total, trees, 1))

    def _start(self) -> float:
        return {"MIN": np.inf, "MAX": -np.inf}.get(self.aggregate, 0.0)

    def _joined(self, code: Code, total: Reg, found: Reg) -> Reg:
        if self.aggregate in ("SUM", "AVERAGE"):
            return code.binary("fadd", total, found)
        better = code.compare(f"fcmp {'olt' if self.aggregate == 'MIN' else 'ogt'}", found, total)
        return code.select(better, found, total)

    def _finished(self, code: Code, total: Reg, trees: Reg, lanes: int) -> Reg:
        if self.aggregate == "SUM":
            return total
        if self.aggregate == "AVERAGE":
            count = code.convert("sitofp", trees, "double")
            if lanes > 1:
                first = code.let(total.type, f"insertelement {total.type} poison, {count}, i32 0")
                shuffle = f"shufflevector {first}, {total.type} poison, <{lanes} x i32> zeroinitializer"
                count = code.let(total.type, shuffle)
            return code.binary("fdiv", total, count)
        nobody = code.compare("fcmp oeq", total, literal(total.type, self._start()))
        return code.select(nobody, literal(total.type, 0.0), total)


def padded(targets: int) -> int:
    """Targets as a power of two."""
    return 1 << (targets - 1).bit_length()


def lower_trees(lowering: Lowering, op: Trees, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, tables = node.inputs[0], [value.constant for value in node.inputs[1:]]
    if any(table is None for table in tables):
        return False
    found = {name: np.asarray(table) for name, table in zip(NAMES, tables, strict=True)}
    compared = np.result_type(x.dtype, found["threshold"].dtype)
    if x.dtype not in COMPUTED or x.dtype in (FLOAT16, BFLOAT16, BOOL) or compared not in (FLOAT32, FLOAT64):
        return False
    targets = found["weights"].shape[1]
    weights = _weights(found, op.aggregate, padded(targets) if targets <= REGISTER_TARGETS else targets)
    if weights is None:
        return False
    packed = _records(found, op.modes, compared, x.dtype, 8 * weights.shape[1])
    if packed is None:
        return False
    records, mode = packed
    groups = -(-len(found["roots"]) // ABREAST)
    roots = np.full(groups * ABREAST, len(records) - 1, np.int64)
    roots[: len(found["roots"])] = found["roots"]
    constants = [lowering.constant(array) for array in (records.view(np.uint8), roots * records.itemsize, weights)]
    verdict, features = None, int(found["feature"].max(initial=0))
    if not isinstance(x.shape[1], int):
        text = f"{lowering.source}: its trees read feature {features} of {{0}}"
        verdict = emit_relations(lowering, [(GREATER, x.shape[1], features, text)])
    kernel = TreesKernel(x.dtype, compared, mode, targets if targets <= REGISTER_TARGETS else 0, op.aggregate)
    words = (
        *map(Address, (outputs[0], inputs[0], *constants)), x.shape[0], x.shape[1] * x.dtype.itemsize, groups,
        op.depth, targets, len(found["roots"]),
    )  # fmt: skip
    lowering.emit(Native(kernel, words), (inputs[0], *constants), outputs)
    lowering.steps += [] if verdict is None else [verdict]
    return True


NAMES = ("feature", "threshold", "mode", "yes", "no", "missing", "row", "roots", "weights", "given")


def _weights(found: dict[str, Array], aggregate: str, width: int) -> Array | None:
    """Rows of `width`, and one for leaves that say nothing; None if they do not tell what is given from what is not."""
    weights, given = found["weights"], found["given"]
    neutral = {"MIN": np.inf, "MAX": -np.inf}.get(aggregate, 0.0)
    if neutral and not np.isfinite(weights[given]).all():
        return None
    result = np.full((len(weights) + 1, width), neutral)
    result[:-1, : weights.shape[1]] = np.where(given, weights, neutral) if neutral else weights
    return result if result.nbytes < 1 << 31 else None


def _records(
    found: dict[str, Array], modes: Sequence[str], compared: DType, x: DType, leaf_nbytes: int
) -> tuple[Array, str] | None:
    """The nodes and a last leaf that says nothing, with offsets for places; and the mode that all tests share."""
    count, threshold = len(found["feature"]), found["threshold"].astype(compared)
    own = np.arange(count)
    leaf = (found["yes"] == own) & (found["no"] == own)
    unordered = np.isnan(threshold) & ~leaf
    missing = found["missing"].any() and x.kind == "f"
    mode = modes[0] if len(modes) == 1 and not missing and not unordered.any() else ""
    fields: list[tuple[str, Any]] = [("threshold", compared), *((name, np.uint32) for name in ("feature", "yes", "no"))]
    records = np.zeros(count + 1, fields if mode else [*fields, ("passing", np.uint32)])
    if records.nbytes >= 1 << 31 or x.itemsize * int(found["feature"].max(initial=0)) >= 1 << 31:
        return None
    records["threshold"][:-1] = np.where(unordered, 0, threshold)
    records["feature"][:-1] = np.where(leaf, 0, found["feature"]) * x.itemsize
    for name in ("yes", "no"):
        records[name][:-1] = found[name] * records.itemsize
        records[name][-1] = count * records.itemsize
    if not mode:
        passing = np.array([PASSING[name] for name in MODES])[found["mode"]]
        passing = np.where(
            unordered, np.where(found["mode"] == MODES.index("NEQ"), LEAST | EQUAL | GREATEST, 0), passing
        )
        records["passing"][:-1] = np.where(leaf, 0, passing) | MISSING * found["missing"]
    places = np.append(found["row"], len(found["weights"]))
    ends = np.append(leaf, True)
    raw = records.view(np.uint8).reshape(count + 1, records.itemsize)
    raw[ends, :4] = (places[ends] * leaf_nbytes).astype(np.uint32).view(np.uint8).reshape(-1, 4)
    return records, mode

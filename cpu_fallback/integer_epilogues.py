"""Epilogues of integer convolutions: int32 sums to bytes, int16 or float32 while a tile is in registers.

As `epilogues` has them for float32, with operands and results of any of these types. Callers count offsets in bytes of
int32 elements; those of narrower elements follow from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cpu_fallback.code import Code, Reg, element, i64, literal, vector
from cpu_fallback.epilogues import CHANNEL, COSTS, FULL, LITERAL, SCALAR, UNROLLED, operand_kind, stack
from cpu_fallback.lanes import COMPUTED, STORED, converted, find_operation, is_supported, narrowed, widened
from cpu_fallback.loops import splat
from cpu_fallback.maps import hoisted
from cpu_fallback.native import Target
from cpu_fallback.vector_math import Num
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.words import Address, Word

SUM = expr.arg(0, INT32)
DTYPES = (FLOAT32, INT8, UINT8, INT16, INT32)
ROUNDINGS = {4: "llvm.x86.sse2.cvtps2dq", 8: "llvm.x86.avx.cvt.ps2dq.256"}
"""Instructions that round to nearest, ties to even; what does not fit becomes the least int32."""


@dataclass(frozen=True)
class IntegerEpilogue:
    """What happens to every int32 sum (operand 0) by content; `kinds` and `dtypes` of the operands 1, 2, ..."""

    text: str
    kinds: tuple[str, ...]
    dtypes: tuple[DType, ...]
    expr: Expr = field(compare=False, repr=False)

    @property
    def digest(self) -> str:
        """A name for equal epilogues."""
        content = "\n".join((self.text, *self.kinds, *map(str, self.dtypes)))
        return hashlib.blake2s(content.encode(), digest_size=6).hexdigest()

    @property
    def cost(self) -> int:
        """Roughly the instructions for one vector."""
        return sum(COSTS.get(node.op, 1) for node in expr.walk(self.expr) if node.op not in ("arg", "const"))

    @property
    def dtype(self) -> DType:
        """Of results."""
        return self.expr.dtype

    def of_floats(self) -> tuple[IntegerEpilogue, bool]:
        """The epilogue of the sums as float32 and True, if that is how it begins; else the same and False."""
        real = expr.arg(0, FLOAT32)
        root = expr.replace(self.expr, {expr.cast(SUM, FLOAT32): real})
        if any(node is SUM for node in expr.walk(root)):
            return self, False
        return IntegerEpilogue(expr.text(root), self.kinds, self.dtypes, root), True

    def addresses(self, code: Code, words: Reg, channel: Reg) -> list[Reg]:
        """The operands' addresses for results that begin `channel` bytes of int32 after channel 0."""
        found = []
        for i, (kind, dtype) in enumerate(zip(self.kinds, self.dtypes, strict=True)):
            place = code.at(words, i64(8 * i))
            operand = place if kind == LITERAL else code.load("ptr", place, 8)
            found.append(code.at(operand, narrow(code, channel, dtype)) if kind in (CHANNEL, FULL) else operand)
        return found

    def moved(self, code: Code, operands: Sequence[Reg], nbytes: Reg) -> list[Reg]:
        """The addresses of the operands for a cell `nbytes` of int32 further in the result."""
        triples = zip(self.kinds, self.dtypes, operands, strict=True)
        return [
            code.at(operand, narrow(code, nbytes, dtype)) if kind == FULL else operand
            for kind, dtype, operand in triples
        ]  # fmt: skip

    def apply(self, code: Code, target: Target, lanes: int, value: Reg, operands: Sequence[Reg]) -> Reg:
        """The result in the form in memory for sums and operands in the form for computing."""
        whole = self.whole(code, target, lanes, value, operands)
        if whole is not None:
            return code.convert("trunc", whole, vector(lanes, STORED[self.dtype]))
        return narrowed(code, write_fused(code, self.expr, dict(enumerate((value, *operands))), lanes), self.dtype)

    def whole(self, code: Code, target: Target, lanes: int, value: Reg, operands: Sequence[Reg]) -> Reg | None:
        """The result as int32 where one instruction rounds it: it was clipped just before."""
        root, name = self.expr, ROUNDINGS.get(lanes) if target.x86 else None
        if name is None or root.op != "cast" or clipped(root.args[0]) is None:
            return None
        if root.dtype not in (INT8, UINT8, INT16) or not root.value:
            return None
        real = write_fused(code, root.args[0].args[0], dict(enumerate((value, *operands))), lanes)
        return code.call(vector(lanes, "i32"), name, real)

    def write_tile(self, code: Code, target: Target, tile: Tile, sums: Sequence[Reg], operands: Sequence[Reg]) -> None:
        """Store the epilogue of a tile of sums, row by row; `operands` are addresses for its first cell."""
        writer = _Writer(self, code, target, tile, operands)
        if tile.columns is None:
            writer.vectors(sums)
            return
        full = code.compare("icmp sge", tile.columns, i64(tile.vectors * tile.lanes))
        code.either(full, lambda: writer.vectors(sums), lambda: writer.pieces(sums))


def narrow(code: Code, nbytes: Reg, dtype: DType) -> Reg:
    """Bytes of int32 elements as bytes of as many of `dtype`."""
    shift = {4: 0, 2: 1, 1: 2}[dtype.itemsize]
    if nbytes.name.lstrip("-").isdigit():
        return i64(int(nbytes.name) >> shift)
    return code.binary("ashr", nbytes, i64(shift)) if shift else nbytes


PLAIN = IntegerEpilogue(str(SUM), (), (), SUM)
"""Sums as they are."""


@dataclass(frozen=True)
class Tile:
    """Results in memory: `count` of at most `rows` rows of `columns` elements in `vectors` vectors; whole vectors if
    `columns` is None. `row` is what lies between rows in bytes of int32."""

    base: Reg
    row: Reg
    count: Reg
    columns: Reg | None
    rows: int
    vectors: int
    lanes: int


@dataclass(frozen=True)
class _Writer:
    """One tile while its results are written."""

    epilogue: IntegerEpilogue
    code: Code
    target: Target
    tile: Tile
    operands: Sequence[Reg]

    def vectors(self, sums: Sequence[Reg]) -> list[Reg]:
        code, tile = self.code, self.tile
        loaded = self._shared()
        if self.epilogue.cost > 2 * UNROLLED:
            stage = self._staged(sums)

            def row(index: Reg, _: list[Reg]) -> list[Reg]:
                here = code.at(stage, code.binary("mul", index, i64(4 * tile.lanes * tile.vectors)))
                places = [code.at(here, i64(4 * tile.lanes * v)) for v in range(tile.vectors)]
                found = [code.load(sums[0].type, place, 4) for place in places]
                self._row(found, loaded, code.binary("mul", index, tile.row))
                return []

            code.loop(i64(0), tile.count, i64(1), row)
            return []
        done = code.fresh_label("done")
        offset = i64(0)
        for r in range(tile.rows):
            if r:
                following = code.fresh_label("row")
                code.branch_if(code.compare("icmp sgt", tile.count, i64(r)), following, done)
                code.start(following)
                offset = code.binary("add", offset, tile.row) if r > 1 else tile.row
            self._row(sums[r * tile.vectors : (r + 1) * tile.vectors], loaded, offset)
        code.branch(done)
        code.start(done)
        return []

    def pieces(self, sums: Sequence[Reg]) -> list[Reg]:
        """A tile whose last vector is not full: by fours, then one by one."""
        code, tile = self.code, self.tile
        assert tile.columns is not None
        stage, columns = self._staged(sums), tile.columns
        whole = code.binary("and", columns, i64(-4))

        def cell(row: Reg, column: Reg, lanes: int) -> list[Reg]:
            inner = code.binary("shl", column, i64(2))
            offset = code.binary("mul", row, tile.row)
            own = code.at(code.at(stage, code.binary("mul", row, i64(4 * tile.lanes * tile.vectors))), inner)
            values = []
            for kind, dtype, operand in zip(self.epilogue.kinds, self.epilogue.dtypes, self.operands, strict=True):
                at = code.at(operand, narrow(code, offset, dtype)) if kind == FULL else operand
                at = code.at(at, narrow(code, inner, dtype)) if kind in (FULL, CHANNEL) else at
                values.append(self._load(at, dtype, lanes, single=kind in (SCALAR, LITERAL)))
            place = code.at(tile.base, narrow(code, code.binary("add", offset, inner), self.epilogue.dtype))
            total = code.load(vector(lanes, element(sums[0].type)), own, 4)
            result = self.epilogue.apply(code, self.target, lanes, total, values)
            code.store(result, place, self.epilogue.dtype.itemsize)
            return []

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(i64(0), whole, i64(4), lambda column, _: cell(index, column, 4))
            code.loop(whole, columns, i64(1), lambda column, _: cell(index, column, 1))
            return []

        code.loop(i64(0), tile.count, i64(1), row)
        return []

    def _staged(self, sums: Sequence[Reg]) -> Reg:
        code, lanes = self.code, self.tile.lanes
        stage = stack(code, len(sums) * lanes * 4)
        for i, value in enumerate(sums):
            code.store(value, code.at(stage, i64(i * lanes * 4)), 4)
        return stage

    def _load(self, place: Reg, dtype: DType, lanes: int, *, single: bool = False) -> Reg:
        """An operand in the form for computing, one element in every lane if `single`."""
        code = self.code
        if single:
            found = splat(code, code.load(STORED[dtype], place, dtype.itemsize), lanes)
        else:
            found = code.load(vector(lanes, STORED[dtype]), place, dtype.itemsize)
        return widened(code, found, dtype)

    def _shared(self) -> dict[tuple[int, int], Reg]:
        """The operands that are the same for every row, by number and vector."""
        loaded, tile = {}, self.tile
        for i, (kind, dtype) in enumerate(zip(self.epilogue.kinds, self.epilogue.dtypes, strict=True)):
            for v in range(tile.vectors):
                if kind == CHANNEL:
                    place = self.code.at(self.operands[i], i64(v * tile.lanes * dtype.itemsize))
                    loaded[i, v] = self._load(place, dtype, tile.lanes)
                elif kind != FULL:
                    loaded[i, v] = loaded[i, 0] if v else self._load(self.operands[i], dtype, tile.lanes, single=True)
        return loaded

    def _row(self, sums: Sequence[Reg], loaded: dict[tuple[int, int], Reg], offset: Reg) -> None:
        """One row, `offset` bytes of int32 from the first."""
        code, tile, epilogue = self.code, self.tile, self.epilogue
        base = code.at(tile.base, narrow(code, offset, epilogue.dtype))
        given = [self._values(loaded, v, offset) for v in range(len(sums))]
        if epilogue.dtype == INT16 and tile.lanes == 8 and len(sums) == 2:
            both = [
                epilogue.whole(code, self.target, tile.lanes, value, values)
                for value, values in zip(sums, given, strict=True)
            ]
            if both[0] is not None and both[1] is not None:
                code.store(_packed(code, both[0], both[1]), base, INT16.itemsize)
                return
        for v, (value, values) in enumerate(zip(sums, given, strict=True)):
            result = epilogue.apply(code, self.target, tile.lanes, value, values)
            code.store(result, code.at(base, i64(v * tile.lanes * epilogue.dtype.itemsize)), epilogue.dtype.itemsize)

    def _values(self, loaded: dict[tuple[int, int], Reg], v: int, offset: Reg) -> list[Reg]:
        """The operands beside vector v of a row."""
        code, values = self.code, []
        for i, (kind, dtype) in enumerate(zip(self.epilogue.kinds, self.epilogue.dtypes, strict=True)):
            if kind == FULL:
                line = code.at(self.operands[i], narrow(code, offset, dtype))
                place = code.at(line, i64(v * self.tile.lanes * dtype.itemsize))
                values.append(self._load(place, dtype, self.tile.lanes))
            else:
                values.append(loaded[i, v])
        return values


def _packed(code: Code, a: Reg, b: Reg) -> Reg:
    """Two vectors of eight int32 that fit int16, side by side."""
    quarters = code.convert("bitcast", code.call(vector(16, "i16"), "llvm.x86.avx2.packssdw", a, b), vector(4, "i64"))
    ordered = code.let(
        quarters.type, f"shufflevector {quarters}, {quarters.type} poison, <4 x i32> <i32 0, i32 2, i32 1, i32 3>"
    )  # fmt: skip
    return code.convert("bitcast", ordered, vector(16, "i16"))


def clipped(x: Expr) -> Expr | None:
    """The maximum with the lower bound, if `x` is a float rounded after it was clipped between literals."""
    if x.op != "round" or x.dtype != FLOAT32 or x.args[0].op != "min":
        return None
    lower, high = x.args[0].args
    return lower if lower.op == "max" and all(bound.op in ("const", "arg") for bound in (high, lower.args[1])) else None


def write_fused(code: Code, root: Expr, operands: Mapping[int, Reg], lanes: int) -> Reg:
    """`lanes.write_expr` with products and sums in one instruction, rounded once, and bounds for NaN where clipped."""
    nodes = expr.walk(root)
    bounds = {lower for node in nodes if (lower := clipped(node)) is not None}
    if root.op == "min" and root.args[0].op == "max":
        bounds.add(root.args[0])
    values: dict[Expr, Num] = {}
    for node in nodes:
        if node.op == "arg":
            values[node] = Num(code, operands[node.value])
        elif node.op == "const":
            values[node] = Num(code, literal(vector(lanes, COMPUTED[node.dtype]), node.value.item()))
        elif node.op == "cast":
            values[node] = converted(values[node.args[0]], node.args[0].dtype, node.dtype, node.value)
        elif node.op == "add" and node.dtype == FLOAT32 and any(child.op == "mul" for child in node.args):
            product, addend = node.args if node.args[0].op == "mul" else node.args[::-1]
            values[node] = values[product.args[0]].fma(values[product.args[1]], values[addend])
        elif node in bounds:
            x, low = (values[child] for child in node.args)
            values[node] = x.test("ogt", low).select(x, low)
        else:
            operation = find_operation(node.op, node.args[-1].dtype)
            assert operation is not None
            values[node] = operation(*(values[child] for child in node.args))
    return values[root].reg


@dataclass(frozen=True)
class IntegerFinish:
    """An epilogue with its operands: argument words, and the buffers among them."""

    epilogue: IntegerEpilogue
    words: tuple[Word, ...]
    buffers: tuple[int, ...]


def integer_finish(
    root: Expr | None, operands: Sequence[tuple[int, Shape, DType]], result: Shape, target: Target
) -> IntegerFinish | None:
    """The epilogue of int32 sums [..., channels] with operands (buffer, shape, dtype); None if tiles cannot run it."""
    root = SUM if root is None else root
    kinds = [operand_kind(shape, result) for _, shape, _ in operands]
    known = tuple(kind for kind in kinds if kind is not None)
    dtypes = tuple(dtype for _, _, dtype in operands)
    given = {node.value for node in expr.walk(root) if node.op == "arg"}
    if len(known) != len(kinds) or root.dtype not in DTYPES or any(dtype not in DTYPES for dtype in dtypes):
        return None
    if not is_supported(root, target) or 0 not in given:
        return None
    root, literals = hoisted(root, len(operands) + 1)
    types = dtypes + tuple(_literal_dtype(root, len(operands) + 1 + i) for i in range(len(literals)))
    buffers = tuple(buffer for buffer, _, _ in operands)
    epilogue = IntegerEpilogue(expr.text(root), known + (LITERAL,) * len(literals), types, root)
    return IntegerFinish(epilogue, (*map(Address, buffers), *literals), buffers)


def _literal_dtype(root: Expr, index: int) -> DType:
    return next(node.dtype for node in expr.walk(root) if node.op == "arg" and node.value == index)

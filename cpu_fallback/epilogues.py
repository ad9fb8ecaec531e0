"""Epilogues: an Expr applied to a tile of sums while it is in registers, or just after.

Operands beyond the sums are one element, one element for every channel, or a tensor of the result's own shape. Unusual
numbers in an expression are operands too, so that layers which differ in a learned number share their kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpu_fallback.code import Code, Reg, i64, vector
from cpu_fallback.lanes import is_supported, write_expr
from cpu_fallback.loops import least, literal_zero, splat
from cpu_fallback.maps import hoisted
from cpu_fallback.native import Target
from cpu_fallback.packing import joined, lanes_of
from cpu_fallback.vector_math import mangled
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape
from gpu_engine.plan.words import Address, Word

SCALAR, CHANNEL, FULL, LITERAL = "scalar", "channel", "full", "literal"
COSTS = {"div": 4, "sqrt": 4, "exp": 20, "log": 25, "tanh": 25, "erf": 40, "sin": 40, "cos": 40, "pow": 60}
UNROLLED = 10
"""Costs of expressions up to which every vector of a tile gets code of its own."""
GROUP = 4
"""Vectors that a costly expression takes at a time: its chains are long, and a scheduler holds few instructions."""
SUM = expr.arg(0, FLOAT32)


@dataclass(frozen=True)
class Epilogue:
    """What happens to every sum (operand 0) by content; `kinds` of the operands 1, 2, ..."""

    text: str = str(SUM)
    kinds: tuple[str, ...] = ()
    expr: Expr = field(default=SUM, compare=False, repr=False)

    @property
    def digest(self) -> str:
        """A name for equal epilogues."""
        content = "\n".join((self.text, *self.kinds))
        return hashlib.blake2s(content.encode(), digest_size=6).hexdigest()

    @property
    def cost(self) -> int:
        """Roughly the instructions for one vector."""
        operations = [node for node in expr.walk(self.expr) if node.op not in ("arg", "const")]
        return sum(COSTS.get(node.op, 1) for node in operations)

    def apply(self, code: Code, lanes: int, value: Reg, operands: Sequence[Reg]) -> Reg:
        """The result for sums `value` and operands in registers of as many lanes."""
        return write_expr(code, self.expr, dict(enumerate((value, *operands))), lanes)

    def addresses(self, code: Code, words: Reg, channel: Reg) -> list[Reg]:
        """The operands' addresses for results that begin `channel` bytes after channel 0, from their argument words; a
        literal lies among the words itself."""
        found = []
        for i, kind in enumerate(self.kinds):
            place = code.at(words, i64(8 * i))
            operand = place if kind == LITERAL else code.load("ptr", place, 8)
            found.append(code.at(operand, channel) if kind in (CHANNEL, FULL) else operand)
        return found

    def moved(self, code: Code, operands: Sequence[Reg], nbytes: Reg) -> list[Reg]:
        """The addresses of the operands for a cell `nbytes` further in the result."""
        pairs = zip(self.kinds, operands, strict=True)
        return [code.at(operand, nbytes) if kind == FULL else operand for kind, operand in pairs]

    def followed(self, operands: Sequence[Reg]) -> list[Reg]:
        """Those of the addresses that are read as the result is written, row by row."""
        return [operand for kind, operand in zip(self.kinds, operands, strict=True) if kind == FULL]

    def write_tile(self, code: Code, place: Place, sums: Sequence[Reg], operands: Sequence[Reg]) -> None:
        """Store the epilogue of a tile of sums, row by row; `operands` are addresses for its first cell."""
        if place.columns is not None and place.mask is None:
            full = code.compare("icmp sge", place.columns, i64(place.vectors * place.lanes))
            code.either(
                full,
                lambda: self._write_vectors(code, place, sums, operands),
                lambda: self._write_elements(code, place, sums, operands),
            )
        else:
            self._write_vectors(code, place, sums, operands)

    def _write_vectors(self, code: Code, place: Place, sums: Sequence[Reg], operands: Sequence[Reg]) -> list[Reg]:
        if self.cost <= UNROLLED:
            self._write_unrolled(code, place, sums, operands)
            return []
        stage = _staged(code, place, sums)
        loaded = self._load_shared(code, place, operands)
        height = min(place.rows, max(1, GROUP // place.vectors))
        last = code.binary("sub", place.count, i64(1))

        def some(index: Reg, _: list[Reg]) -> list[Reg]:
            lines = [index, *(least(code, code.binary("add", index, i64(i)), last) for i in range(1, height))]
            found = []
            for line in lines:
                here = code.at(stage, code.binary("mul", line, i64(place.row_nbytes)))
                found += [
                    code.load(place.kind, code.at(here, i64(4 * place.lanes * v)), 4) for v in range(place.vectors)
                ]
            self._write_rows(code, place, found, operands, loaded, [code.binary("mul", i, place.row) for i in lines])
            return []

        code.loop(i64(0), place.count, i64(height), some)
        return []

    def _write_unrolled(self, code: Code, place: Place, sums: Sequence[Reg], operands: Sequence[Reg]) -> None:
        loaded = self._load_shared(code, place, operands)
        done = code.fresh_label("done")
        offset = i64(0)
        for r in range(place.rows):
            if r:
                following = code.fresh_label("row")
                code.branch_if(code.compare("icmp sgt", place.count, i64(r)), following, done)
                code.start(following)
                offset = code.binary("add", offset, place.row) if r > 1 else place.row
            found = list(sums[r * place.vectors : (r + 1) * place.vectors])
            self._write_rows(code, place, found, operands, loaded, [offset], 1)
        code.branch(done)
        code.start(done)

    def _load_shared(self, code: Code, place: Place, operands: Sequence[Reg]) -> dict[tuple[int, int], Reg]:
        """The operands that are the same for every row, by number and vector."""
        loaded = {}
        for i, (kind, operand) in enumerate(zip(self.kinds, operands, strict=True)):
            single = kind in (SCALAR, LITERAL)
            spread = splat(code, code.load("float", operand, 4), place.lanes) if single else None
            for v in range(place.vectors):
                if spread is not None:
                    loaded[i, v] = spread
                elif kind == CHANNEL:
                    loaded[i, v] = place.load(code, operand, v)
        return loaded

    def _write_rows(
        self,
        code: Code,
        place: Place,
        sums: Sequence[Reg],
        operands: Sequence[Reg],
        loaded: dict[tuple[int, int], Reg],
        offsets: Sequence[Reg],
        group: int = GROUP,
    ) -> None:
        """Rows at these bytes from the first, so many vectors at a time. A row may come twice: all is read first."""
        cells = [(offset, v) for offset in offsets for v in range(place.vectors)]
        columns = [list(sums)]
        for i, (kind, operand) in enumerate(zip(self.kinds, operands, strict=True)):
            columns.append([
                loaded[i, v] if kind != FULL else place.load(code, code.at(operand, offset), v) for offset, v in cells
            ])  # fmt: skip
        results: list[Reg] = []
        while len(results) < len(cells):
            count = min(group, 1 << ((len(cells) - len(results)).bit_length() - 1))
            part = slice(len(results), len(results) + count)
            value, *others = (joined(code, column[part]) for column in columns)
            whole = self.apply(code, place.lanes * count, value, others)
            results += [lanes_of(code, whole, i * place.lanes, place.lanes) for i in range(count)]
        for (offset, v), result in zip(cells, results, strict=True):
            place.store(code, result, code.at(place.base, offset), v)

    def _write_elements(self, code: Code, place: Place, sums: Sequence[Reg], operands: Sequence[Reg]) -> list[Reg]:
        """One element at a time: for columns that are no whole vectors, where masks are dear."""
        assert place.columns is not None
        columns, stage = place.columns, _staged(code, place, sums)

        def cell(row: Reg, column: Reg) -> list[Reg]:
            inner = code.binary("shl", column, i64(2))
            offset = code.binary("add", code.binary("mul", row, place.row), inner)
            values = []
            for kind, operand in zip(self.kinds, operands, strict=True):
                at = operand
                if kind in (FULL, CHANNEL):
                    at = code.at(operand, offset if kind == FULL else inner)
                values.append(code.load("float", at, 4))
            own = code.at(code.at(stage, code.binary("mul", row, i64(place.row_nbytes))), inner)
            code.store(self.apply(code, 1, code.load("float", own, 4), values), code.at(place.base, offset), 4)
            return []

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(i64(0), columns, i64(1), lambda column, _: cell(index, column))
            return []

        code.loop(i64(0), place.count, i64(1), row)
        return []


@dataclass(frozen=True)
class Place:
    """A tile of memory: `count` of at most `rows` rows, `row` bytes apart, of `columns` float32 in `vectors` vectors.

    Without `columns` all vectors are whole. `mask` are the lanes of the last vector that count, where masks cost
    nothing.
    """

    base: Reg
    row: Reg
    count: Reg
    columns: Reg | None
    rows: int
    vectors: int
    lanes: int
    mask: Reg | None

    @property
    def kind(self) -> str:
        return vector(self.lanes, "float")

    @property
    def row_nbytes(self) -> int:
        return self.vectors * self.lanes * 4

    def _masked(self, v: int) -> bool:
        return self.mask is not None and v == self.vectors - 1

    def load(self, code: Code, address: Reg, v: int) -> Reg:
        """Vector v of the row at `address`."""
        place = code.at(address, i64(4 * self.lanes * v))
        return masked_load(code, self.kind, place, self.mask) if self._masked(v) else code.load(self.kind, place, 4)

    def store(self, code: Code, value: Reg, address: Reg, v: int) -> None:
        place = code.at(address, i64(4 * self.lanes * v))
        if self._masked(v):
            masked_store(code, value, place, self.mask)
        else:
            code.store(value, place, 4)


def masked_load(code: Code, kind: str, place: Reg, mask: Reg | None) -> Reg:
    assert mask is not None
    name = f"llvm.masked.load.{mangled(kind)}.p0"
    return code.call(kind, name, place, Reg("4", "i32"), mask, literal_zero(kind))


def masked_store(code: Code, value: Reg, place: Reg, mask: Reg | None) -> None:
    assert mask is not None
    code.call("void", f"llvm.masked.store.{mangled(value.type)}.p0", value, place, Reg("4", "i32"), mask)


def _staged(code: Code, place: Place, sums: Sequence[Reg]) -> Reg:
    """The sums on the stack, row by row."""
    stage = stack(code, len(sums) * place.lanes * 4)
    for i, value in enumerate(sums):
        code.store(value, code.at(stage, i64(i * place.lanes * 4)), 4)
    return stage


def stack(code: Code, nbytes: int) -> Reg:
    """Uninitialised, aligned memory of the whole call."""
    name = code.fresh_label("%stack")
    code.allocations.append(f"  {name} = alloca [{nbytes} x i8], align 64")
    return Reg(name, "ptr")


class Finish(NamedTuple):
    """An epilogue with its operands: argument words, and the buffers among them."""

    epilogue: Epilogue
    words: tuple[Word, ...]
    buffers: tuple[int, ...]

    def shifted(self, nbytes: Dim) -> tuple[Word, ...]:
        """The words for results that begin `nbytes` into the tensor."""
        return tuple(
            Address(word.buffer, nbytes) if isinstance(word, Address) and kind == FULL else word
            for kind, word in zip(self.epilogue.kinds, self.words, strict=True)
        )


def finish_of(root: Expr | None, operands: Sequence[tuple[int, Shape]], result: Shape, target: Target) -> Finish | None:
    """The epilogue of a result [..., channels] with operands (buffer, shape); None if it cannot run on tiles."""
    if root is None:
        return Finish(Epilogue(), (), ())
    used = {node.value: node.dtype for node in expr.walk(root) if node.op == "arg"}
    kinds = [operand_kind(shape, result) for _, shape in operands]
    if root.dtype != FLOAT32 or any(dtype != FLOAT32 for dtype in used.values()) or not is_supported(root, target):
        return None
    known = tuple(kind for kind in kinds if kind is not None)
    if len(known) != len(kinds):
        return None
    root, literals = hoisted(root, len(operands) + 1)
    buffers = tuple(buffer for buffer, _ in operands)
    epilogue = Epilogue(expr.text(root), known + (LITERAL,) * len(literals), root)
    return Finish(epilogue, (*map(Address, buffers), *literals), buffers)


def operand_kind(shape: Shape, result: Shape) -> str | None:
    """How an operand of an epilogue lies beside the result [..., channels]; None if it broadcasts in another way."""
    if all(extent == 1 for extent in shape):
        return SCALAR
    if shape == result:
        return FULL
    return CHANNEL if shape[-1] == result[-1] and all(extent == 1 for extent in shape[:-1]) else None

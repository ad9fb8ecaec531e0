"""A block of rows of A times a panel of B: tiles below each other, the depth in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_fallback import packing
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.loops import least
from cpu_fallback.native import Target, attributes
from cpu_fallback.tiles import TileShape, call_tile

PARAMETERS = (
    "ptr %tiles, i64 %rows, i64 %depth, ptr %a, i64 %a_tile, i64 %a_row, i64 %a_step, "
    "ptr %b, i64 %b_row, i64 %width, ptr %sums, ptr %c, i64 %c_row, "
    "ptr %finish, ptr %block, i64 %batch, i64 %row, i64 %column, i64 %columns"
)
FINISH = "ptr %block, i64 %batch, i64 %row, i64 %column, i64 %rows, i64 %columns, ptr %sums"
DEPTH = 256
"""Products that one sum takes: sums of sums keep the error from growing with the depth, and parts of panels small."""


UNFINISHED = (Reg("null", "ptr"), Reg("null", "ptr"), i64(0), i64(0), i64(0), i64(0))


@dataclass(frozen=True)
class Rows:
    """Rows of A where tiles find them: bytes from tile to tile, from row to row and along the depth."""

    base: Reg
    tile: Reg
    row: Reg
    step: Reg


def define_block(code: Code, target: Target, shape: TileShape) -> str:
    """The name of the function that computes C = A B for `rows` rows and a panel of `width` vectors.

    `tiles` is a table of tiles, `sums` room for as many lines of sums as there are rows, which may be where C is.
    `finish`, where it is not null, is called with FINISH for every tile whose sums are complete, at once: the stores
    of an epilogue would wait for memory if they did not fall between products.
    """
    name = f"block_{shape.scalar}{shape.lanes}_{shape.rows}_{shape.vectors}"
    code.define(name, PARAMETERS, attributes(target), lambda inner: _write(inner, shape))
    return name


def call_block(
    code: Code, name: str, tiles: Reg, count: Reg, depth: Reg, rows: Rows, panel: tuple[Reg, Reg], width: Reg,
    sums: Reg, c: tuple[Reg, Reg], finish: Sequence[Reg] = UNFINISHED,
) -> None:  # fmt: skip
    """`panel` and `c` are an address and the bytes from line to line; `finish` is the last six of PARAMETERS."""
    arguments = (tiles, count, depth, rows.base, rows.tile, rows.row, rows.step, *panel, width, sums, *c, *finish)
    packing.call(code, f"@{name}", *arguments)


def _write(code: Code, shape: TileShape) -> None:
    """All tiles for one part of the depth after the other. They share in fetching the next part of B: memory, which is
    slower than the multipliers, then has the time of all of them."""
    given = packing.parameters(PARAMETERS)
    tiles, count, depth, a, a_tile, a_row, a_step, b, b_row, width, sums, c, c_row, finish, *place = given
    block, batch, first_row, column, columns = place
    code.definitions["zeros"] = "@zeros = internal constant [1024 x i8] zeroinitializer, align 64"
    parts = most(code, packing.ceil_div(code, depth, DEPTH), 1)
    size = code.binary("udiv", code.binary("add", depth, code.binary("sub", parts, i64(1))), parts)
    final, line = code.binary("sub", parts, i64(1)), i64(shape.line)
    many, count_of_tiles = code.compare("icmp sgt", count, i64(shape.rows)), packing.ceil_div(code, count, shape.rows)
    wanted = code.compare("icmp ne", finish, Reg("null", "ptr"))

    def part(index: Reg, _: list[Reg]) -> list[Reg]:
        k = code.binary("mul", index, size)
        steps = least(code, code.binary("sub", depth, k), size)
        a_part = code.at(a, code.binary("mul", k, a_step))
        b_part = code.at(b, code.binary("mul", k, b_row))
        first, last = code.compare("icmp eq", index, i64(0)), code.compare("icmp eq", index, final)
        start = code.select(first, Reg("@zeros", "ptr"), sums), code.select(first, i64(0), line)
        to = code.select(last, c, sums), code.select(last, c_row, line)
        ahead_step = code.binary("udiv", b_row, most(code, count_of_tiles, 1))
        following = code.at(b_part, code.binary("mul", steps, b_row))

        def tile(i: Reg, _: list[Reg]) -> list[Reg]:
            row = code.binary("mul", i, i64(shape.rows))
            rows = least(code, code.binary("sub", count, row), i64(shape.rows))
            begin, end = (code.at(base, code.binary("mul", row, step)) for base, step in (start, to))
            source = code.at(a_part, code.binary("mul", i, a_tile))
            ahead = code.at(following, code.binary("mul", code.binary("mul", i, steps), ahead_step))
            call_tile(code, tiles, shape, many, rows, width, steps, source, a_row, a_step, b_part, b_row,
                      begin, start[1], end, to[1], ahead, ahead_step)  # fmt: skip

            def finished() -> list[Reg]:
                packing.call(
                    code, finish.name, block, batch, code.binary("add", first_row, row), column, rows, columns, end
                )  # fmt: skip
                return []

            code.either(code.binary("and", last, wanted), finished, lambda: [])
            return []

        code.loop(i64(0), count_of_tiles, i64(1), tile)
        return []

    code.loop(i64(0), parts, i64(1), part)


def most(code: Code, a: Reg, b: int) -> Reg:
    """The greater."""
    return code.call("i64", "llvm.smax.i64", a, i64(b))

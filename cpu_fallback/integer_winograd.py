"""Winograd convolutions F(m x m, 3 x 3) of int16 images in whole numbers: exact, and two or four times fewer products.

Transforms are scaled so that they have no fractions: transformed bytes and weights fit int16. Sums of products are
right modulo 2**32, and so is everything that adds and subtracts them; the scale is divided out at last, exactly, since
what is left fits int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cpu_fallback.code import Code, Reg, i64, vector
from cpu_fallback.conv_tiles import tile_shape
from cpu_fallback.integer_conv_tiles import define_integer_table
from cpu_fallback.integer_epilogues import PLAIN, IntegerEpilogue, Tile, narrow
from cpu_fallback.integer_winograd_transforms import BACKWARD, FORWARD, divided
from cpu_fallback.integers import least, plus, times
from cpu_fallback.native import Target
from cpu_fallback.winograd_driver import FINISH, Numbers, write_winograd

INTEGERS = Numbers(
    "integer", "i16", "i32", lambda code, target: define_integer_table(code, target, (1, 2), PLAIN), FORWARD, BACKWARD,
    divided,
)  # fmt: skip


@dataclass(frozen=True)
class IntegerWinogradKernel:
    """`conv_winograd.WinogradKernel` for images of pairs of int16, with the same words."""

    m: int
    epilogue: IntegerEpilogue

    def write(self, code: Code, target: Target) -> None:
        finish = partial(_write_finish, target=target, m=self.m, epilogue=self.epilogue)
        write_winograd(code, target, self.m, INTEGERS, self.epilogue.digest, finish)


def _write_finish(code: Code, target: Target, m: int, epilogue: IntegerEpilogue) -> None:
    stage, cell, channel, left, down, across, pixel, row, out, words = (
        Reg(text.split()[1], text.split()[0]) for text in FINISH.split(", ")
    )
    lanes = tile_shape(target).lanes
    kind, nbytes = vector(lanes, "i32"), 4 * lanes
    operands = epilogue.addresses(code, words, channel)
    columns = least(code, left, i64(lanes))

    def line(index: Reg, _: list[Reg]) -> list[Reg]:
        moved = plus(code, code.binary("sub", cell, channel), times(code, index, row))
        here = code.at(stage, times(code, index, i64(m * nbytes)))
        sums = [code.load(kind, code.at(here, i64(i * nbytes)), 4) for i in range(m)]
        place = code.at(out, narrow(code, plus(code, moved, channel), epilogue.dtype))
        tile = Tile(place, pixel, across, columns, m, 1, lanes)
        epilogue.write_tile(code, target, tile, sums, epilogue.moved(code, operands, moved))
        return []

    code.loop(i64(0), down, i64(1), line)

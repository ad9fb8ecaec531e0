"""Winograd convolutions F(m x m, 3 x 3) of float32, stride 1, channels last: m is 2 or 4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cpu_fallback.code import Code, Reg, i64, vector
from cpu_fallback.conv_tiles import define_table, tile_shape
from cpu_fallback.epilogues import Epilogue, Place
from cpu_fallback.integers import least, plus, times
from cpu_fallback.loops import lane_mask
from cpu_fallback.native import Target
from cpu_fallback.winograd_driver import FINISH, Numbers, write_winograd
from cpu_fallback.winograd_transforms import BACKWARD, FORWARD

FLOATS = Numbers(
    "float", "float", "float", lambda code, target: define_table(code, target, (1, 2), Epilogue()), FORWARD, BACKWARD,
    lambda value, _: value,
)  # fmt: skip


@dataclass(frozen=True)
class WinogradKernel:
    """A Winograd convolution by content.

    Words: addresses of x, of transformed and packed weights (`conv_weights.winograd_weights`), of the result and of
    scratch; a `winograd_driver.Room`, threads that it is there for; the Geometry; the operands of the
    epilogue.
    """

    m: int
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        finish = partial(_write_finish, target=target, m=self.m, epilogue=self.epilogue)
        write_winograd(code, target, self.m, FLOATS, self.epilogue.digest, finish)


def _write_finish(code: Code, target: Target, m: int, epilogue: Epilogue) -> None:
    stage, cell, channel, left, down, across, pixel, row, out, words = (
        Reg(text.split()[1], text.split()[0]) for text in FINISH.split(", ")
    )
    lanes = tile_shape(target).lanes
    kind, nbytes = vector(lanes, "float"), 4 * lanes
    mask = lane_mask(code, lanes, left) if target.masked else None
    operands = epilogue.addresses(code, words, channel)
    columns = least(code, left, i64(lanes))

    def line(index: Reg, _: list[Reg]) -> list[Reg]:
        moved = plus(code, code.binary("sub", cell, channel), times(code, index, row))
        here = code.at(stage, times(code, index, i64(m * nbytes)))
        sums = [code.load(kind, code.at(here, i64(i * nbytes)), 4) for i in range(m)]
        place = Place(code.at(out, plus(code, moved, channel)), pixel, across, columns, m, 1, lanes, mask)
        epilogue.write_tile(code, place, sums, epilogue.moved(code, operands, moved))
        return []

    code.loop(i64(0), down, i64(1), line)

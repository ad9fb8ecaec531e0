"""Depthwise convolutions of int16 images, channels last.

Products of centred bytes and their few sums are whole numbers that float32 holds exactly; a sum is converted once, or
not at all where its epilogue wants a float.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, vector
from cpu_fallback.depthwise_driver import PIXELS, Results, Window, write_depthwise
from cpu_fallback.integer_epilogues import IntegerEpilogue, Tile, narrow
from cpu_fallback.integers import plus
from cpu_fallback.native import Target


@dataclass(frozen=True)
class IntegerDepthwiseKernel:
    """`conv_depthwise.DepthwiseKernel` for int16 images and weights in float32, with the same words. `epilogue` is of
    float32 sums if `real`, else of int32."""

    window: Window
    epilogue: IntegerEpilogue
    real: bool

    def write(self, code: Code, target: Target) -> None:
        epilogue, lanes = self.epilogue, self.window.lanes

        def store(out: Reg, operands: Reg, found: Results) -> None:
            base = code.at(out, narrow(code, plus(code, found.place, found.channel), epilogue.dtype))
            place = Tile(base, found.step, found.wanted, None, PIXELS, 1, lanes)
            addresses = epilogue.addresses(code, operands, found.channel)
            whole = vector(lanes, "i32")
            sums = found.sums if self.real else [code.convert("fptosi", total, whole) for total in found.sums]
            epilogue.write_tile(code, target, place, sums, epilogue.moved(code, addresses, found.place))

        write_depthwise(code, target, self.window, store, halves=True)

"""Depthwise convolutions of float32, channels last."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.code import Code, Reg
from cpu_fallback.depthwise_driver import PIXELS, Results, Window, write_depthwise
from cpu_fallback.epilogues import Epilogue, Place
from cpu_fallback.integers import plus
from cpu_fallback.native import Target


@dataclass(frozen=True)
class DepthwiseKernel:
    """A depthwise convolution by content.

    Words: addresses of x, of weights [taps, channels], of as many zeros as `Window.blank_elements` says, and of the
    result; bytes of rows to keep in the first cache, of an image that the second one keeps; the Geometry; the operands
    of the epilogue.
    """

    window: Window
    epilogue: Epilogue

    def write(self, code: Code, target: Target) -> None:
        epilogue, lanes = self.epilogue, self.window.lanes

        def store(out: Reg, operands: Reg, found: Results) -> None:
            base = code.at(out, plus(code, found.place, found.channel))
            place = Place(base, found.step, found.wanted, None, PIXELS, 1, lanes, None)
            addresses = epilogue.addresses(code, operands, found.channel)
            epilogue.write_tile(code, place, found.sums, epilogue.moved(code, addresses, found.place))

        write_depthwise(code, target, self.window, store, halves=False)

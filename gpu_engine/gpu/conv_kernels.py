"""Convolutions as products: windows of images are the rows of the left factor, gathered as they are needed.

What is summed over are the taps of a window and the channels of each; weights lie as [groups, taps, channels, M]. With
many channels a step takes one tap's and reads them as vectors; with few it takes channels of several taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gpu_engine.gpu.epilogues import number
from gpu_engine.gpu.gemm_kernels import Product, clamped_lines
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.tiles import GemmTile
from gpu_engine.gpu.windows import Image, Walked, scaled, sum_of, walk
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim


@dataclass(frozen=True)
class Windows:
    """Windows of `image` times weights [groups or phases, taps, depth, n]; `phased` says what the batch counts. If
    `turned` weights lie as [groups or phases, n, taps, depth]."""

    image: Image
    weights: int
    depth: Dim
    phased: bool = False
    turned: bool = False

    @property
    def taps(self) -> int:
        return prod(axis.taps for axis in self.image.axes)

    def by_taps(self, block: int) -> bool:
        """Whether a step of `block` takes channels of one tap only."""
        depth = self.depth
        return self.taps == 1 or not isinstance(depth, int) or depth % block == 0 or depth > 2 * block

    def steps(self, block: int) -> Dim:
        """What is summed over, in whole steps."""
        if self.by_taps(block):
            return self.taps * self.padded_depth(block)
        return dims.ceil_div(self.taps * self.depth, block) * block

    def padded_depth(self, block: int) -> Dim:
        return dims.ceil_div(self.depth, block) * block

    def write_loop(self, text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
        """See `gemm_kernels.Loop`. Factors are 0 where a step has no element."""
        rows, columns = clamped_lines(text, product, tile)
        columns = text.let("column", columns)
        grouped = product.batch and not self.phased
        with text.apart("groups"):
            first = sum_of(scaled(text, "batch", self.depth * self.image.channel_pitch)) if grouped else ""
        walked = walk(text, self.image, text.let("row", rows), "batch" if self.phased else "0", first)
        text.line(f"steps = tl.arange(0, {tile.block_k})")
        start = text.buffer(self.weights)
        if product.batch:
            with text.apart("weights of a group"):
                start += f" + batch * ({number(text, self.depth * product.n)} * {self.taps})"
        text.line(f"b_from = {start}")
        write = self._write_tap if self.by_taps(tile.block_k) else self._write_taps
        with text.block(f"for k in range(low, high, {tile.block_k}):"):
            write(text, walked, product, tile.block_k, columns)
            step.add(text)

    def _write_tap(self, text: KernelText, walked: Walked, product: Product, block: int, columns: str) -> None:
        if self.taps == 1:
            text.line("tap = 0")
            text.line("channel = k + steps")
        else:
            with text.apart("depth"):
                depth = number(text, self.padded_depth(block))
            text.line(f"tap = k // {depth}")
            text.line(f"channel = k - tap * {depth} + steps")
        terms, masks = walked.tap(text, "tap")
        channels = [] if is_multiple(self.depth, block) else [f"(channel < {self._depth(text)})"]
        there = [f"({mask})[:, None]" for mask in masks]
        place = f"({walked.place} + {terms})[:, None] + ({sum_of(self._channels(text))})[None, :]"
        _load(text, "a", text.buffer(self.image.buffer), place, there + [f"{mask}[None, :]" for mask in channels])
        line = "channel" if self.taps == 1 else f"(tap * {self._depth(text)} + channel)"
        place = self._weights_at(text, line, columns, product)
        _load(text, "b", "b_from", place, [f"{mask}[:, None]" for mask in channels])

    def _write_taps(self, text: KernelText, walked: Walked, product: Product, block: int, columns: str) -> None:
        total = self.taps * self.depth
        text.line("line = k + steps")
        text.line(f"channel = line % {text.number(self.depth)}")
        text.line(f"tap = line // {text.number(self.depth)}")
        terms, masks = walked.tap(text, "tap", "[None, :]", "[:, None]")
        ends = [] if is_multiple(total, block) else [f"(line < {text.number(total)})"]
        place = f"{walked.place}[:, None] + ({terms} + {sum_of(self._channels(text))})[None, :]"
        masks = [f"({mask})" for mask in masks] + [f"{mask}[None, :]" for mask in ends]
        _load(text, "a", text.buffer(self.image.buffer), place, masks)
        _load(
            text, "b", "b_from", self._weights_at(text, "line", columns, product), [f"{mask}[:, None]" for mask in ends]
        )

    def _weights_at(self, text: KernelText, line: str, columns: str, product: Product) -> str:
        with text.apart("weights"):
            if self.turned:
                return f"{line}[:, None] + {columns}[None, :] * {number(text, self.taps * self.depth)}"
            return f"{line}[:, None] * {number(text, product.n)} + {columns}[None, :]"

    def _depth(self, text: KernelText) -> str:
        with text.apart("channels"):
            return number(text, self.depth)

    def _channels(self, text: KernelText) -> list[str]:
        with text.apart("image"):
            return scaled(text, "channel", self.image.channel_pitch)


def _load(text: KernelText, name: str, start: str, place: str, masks: Sequence[str]) -> None:
    options = f", mask={' & '.join(masks)}, other=0" if masks else ""
    text.line(f"{name} = tl.load({start} + {place}{options})")

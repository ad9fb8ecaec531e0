"""Kernels of products with narrow weights: bytes are loaded, and become numbers between the load and the product.

Weights lie as [n, bytes of k]. With several codes to a byte these are apart by as much of k as there are bytes, a plane
each: a step of bytes multiplies as many pieces of the first factor, each contiguous, and nothing is shuffled. Codes are
unsigned. Rows of scales belong to one or more whole steps where blocks allow it, else every code finds its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.gpu.epilogues import Walk, number, place
from gpu_engine.gpu.float8 import FLOAT8, decoded
from gpu_engine.gpu.gemm_kernels import Product
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.kernel import language_dtype
from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.tiles import GemmTile
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

MAGIC: dict[DType, tuple[str, int, int, int]] = {
    FLOAT16: ("tl.uint16", 0x6400, 1 << 10, 8),
    BFLOAT16: ("tl.uint16", 0x4300, 1 << 7, 4),
    FLOAT32: ("tl.uint32", 0x4B000000, 1 << 23, 8),
}
"""How a code of so many bits becomes a float in one instruction: as the low bits of an integer which are those of the
float's mantissa, and the float that this has added to it."""


@dataclass(frozen=True)
class Scales:
    """Scales, and zero points where they differ, of all codes of a plane or of `block` at a time.

    `buffer` has uint32 [words, rows, n]: the scale of each of `planes`, of type `dtype`, two to a word if they have 16
    bits, then the zero points, in the same way if `real`, else a byte each. A `zero` is one number for all codes.
    Without `block` planes share theirs.
    """

    buffer: int
    dtype: DType
    block: int
    rows: int
    planes: int
    zero: int | None
    real: bool

    def scale(self, plane: int) -> tuple[int, str]:
        """(the word that holds a plane's scale, the scale in a word called `word`)."""
        return self._item(plane % self.planes)

    def zero_point(self, plane: int) -> tuple[int, str]:
        """The same for a plane's zero point."""
        if self.real:
            return self._item(self.planes + plane % self.planes)
        return -(-self.planes * self.dtype.itemsize // 4), f"((word >> {8 * (plane % self.planes)}) & 255)"

    def words(self) -> list[int]:
        """The words of a row, in order."""
        planes = range(self.planes)
        found = [self.scale(plane)[0] for plane in planes]
        return sorted({*found, *(self.zero_point(plane)[0] for plane in planes if self.zero is None)})

    def _item(self, index: int) -> tuple[int, str]:
        kind = language_dtype(self.dtype)
        if self.dtype.itemsize == 4:
            return index, f"word.to({kind}, bitcast=True)"
        high = " >> 16" * (index % 2)
        return index // 2, f"(word{high}).to(tl.uint16).to({kind}, bitcast=True)"


@dataclass(frozen=True)
class Codes:
    """Codes of type `kind`, `bits` bits each, in a buffer [`columns`, `nbytes`] for `depth` places of k, and what they
    stand for.

    (code - zero) * scale is computed in `inner`, then rounded to the weights' type `dtype`. A step takes `unit` bytes
    at most, which all have the same scale.
    """

    buffer: int
    kind: DType
    bits: int
    nbytes: int
    depth: int
    columns: int
    unit: int
    scales: Scales
    inner: DType
    dtype: DType

    @property
    def planes(self) -> int:
        return 8 // self.bits

    def write_loop(self, text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
        """See `gemm_kernels.Loop`; `b` is [BLOCK_K, BLOCK_N]."""
        a, block = product.a, tile.block_k
        self._write_start(text, product, tile)
        rows = "rows" if is_multiple(product.m, tile.block_m) else f"rows % {number(text, product.m)}"
        text.line(f"steps = tl.arange(0, {block})")
        text.line("column = column[None, :]")
        text.line(f"a_at = ({rows})[:, None] * {number(text, a.outer)} + steps[None, :] * {number(text, a.inner)}")
        text.line(f"b_at = column * {number(text, self.nbytes)} + steps[:, None]")
        words = [] if self.scales.block else self._words(text, "")
        with text.block(f"for k in range(low, high, {block}):"):
            text.line(f"packed = tl.load({text.buffer(self.buffer)} + k + b_at)")
            words = words or self._words(text, f" + k // {self.scales.block} * {number(text, self.columns)}")
            for plane in range(self.planes):
                at, mask = self._place(text, plane, "steps[None, :]")
                text.line(f"a = tl.load(a_from + {at} * {number(text, a.inner)} + a_at{mask})")
                text.line(f"b = {self._weights(text, plane, words)}")
                step.add(text)

    def write_few_loop(self, text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
        """The loop for `few_step`: a thread multiplies 16 bytes along k of several columns by the same of every row.

        Weights are [columns, blocks, bytes of a block]: as many blocks in a step as it has room for.
        """
        a, unit = product.a, min(self.unit, tile.block_k)
        blocks, even = tile.block_k // unit, self.nbytes % tile.block_k == 0
        self._write_start(text, product, tile)
        text.line(f"steps = tl.arange(0, {blocks})[:, None] * {unit} + tl.arange(0, {unit})[None, :]")
        text.line("column = column[:, None, None]")
        text.line(f"b_at = column * {number(text, self.nbytes)} + steps[None, :, :]")
        words = [] if self.scales.block else self._words(text, "")
        with text.block(f"for k in range(low, high, {tile.block_k}):"):
            if not even:
                text.line("inside = k + steps < high")
            mask = "" if even else ", mask=inside[None, :, :], other=0"
            text.line(f"packed = tl.load({text.buffer(self.buffer)} + k + b_at{mask})")
            row = f"(k + tl.arange(0, {blocks})[None, :, None] * {unit}) // {self.scales.block}"
            row = row if even else f"tl.minimum({row}, {self.scales.rows - 1})"
            words = words or self._words(text, f" + {row} * {number(text, self.columns)}")
            for plane in range(self.planes):
                at, mask = self._place(text, plane, "steps", "" if even else "inside")
                text.line(f"b = {self._weights(text, plane, words)}")
                for i in range(tile.block_m):
                    line = f"tl.minimum(down * {tile.block_m} + {i}, {number(text, product.m)} - 1)"
                    start = f"a_from + {line} * {number(text, a.outer)}"
                    text.line(f"a = tl.load({start} + ({at} + steps) * {number(text, a.inner)}{mask})")
                    text.line(f"part{i} {'+' * (plane > 0)}= a.to(tl.float32)[None, :, :] * b.to(tl.float32)")
            for i in range(tile.block_m):
                text.line(f"acc{i} += tl.sum(tl.sum(part{i}, 2), 1)")

    def _write_start(self, text: KernelText, product: Product, tile: GemmTile) -> None:
        a = product.a
        columns = "columns" if is_multiple(product.n, tile.block_n) else f"columns % {number(text, product.n)}"
        text.line(f"column = {columns}")
        start = place(text, Walked(a.buffer, a.batch), [Walk("batch", product.axes[0])], product.batch)[0]
        text.line(f"a_from = {text.buffer(a.buffer)} + ({start})")

    def _place(self, text: KernelText, plane: int, steps: str, inside: str = "") -> tuple[str, str]:
        """(where in k the codes of a plane begin, the options of loads from there)."""
        at = "k" if plane == 0 else f"(k + {number(text, plane * self.nbytes)})"
        masks = [inside] * bool(inside)
        if self.planes * self.nbytes != self.depth:
            masks.append(f"({at} + {steps} < {number(text, self.depth)})")
        return at, f", mask={' & '.join(masks)}, other=0.0" if masks else ""

    def _words(self, text: KernelText, row: str) -> list[str]:
        """The names of the words of a row of scales."""
        start, apart = text.buffer(self.scales.buffer), self.scales.rows * self.columns
        places = [f"{start} + {number(text, word * apart)}" if word else start for word in self.scales.words()]
        return [text.let("word", f"tl.load({place}{row} + column)") for place in places]

    def _weights(self, text: KernelText, plane: int, words: Sequence[str]) -> str:
        """The numbers of a step's codes, in the type of the weights."""
        kind = language_dtype(self.inner)

        def item(found: tuple[int, str]) -> str:
            return f"{found[1].replace('word', words[found[0]], 1)}.to({kind})"

        zero = item(self.scales.zero_point(plane)) if self.scales.zero is None else ""
        product = f"({self._centred(text, plane, zero)}) * {item(self.scales.scale(plane))}"
        return product if self.dtype == self.inner else f"({product}).to({language_dtype(self.dtype)})"

    def _centred(self, text: KernelText, plane: int, zero: str) -> str:
        """The codes of a plane less their zero points, exactly."""
        kind = language_dtype(self.inner)
        if self.kind in FLOAT8:
            return f"({decoded('packed', self.kind)}).to({kind})"
        code = "packed" if self.bits == 8 else f"((packed >> {plane * self.bits}) & {2**self.bits - 1})"
        word, pattern, added, _ = MAGIC[self.inner]
        found = text.let("code", f"({code}.to({word}) | {pattern}).to({kind}, bitcast=True)")
        same = self.scales.zero
        return f"({found} - {added}.0) - {zero}" if same is None else f"{found} - {added + same}.0"


def few_step(rows: int) -> Step:
    """Sums of float32 products one by one, of so many rows, for `write_few_loop`."""

    def start(text: KernelText, tile: GemmTile) -> None:
        for i in range(rows):
            text.line(f"acc{i} = tl.zeros(({tile.block_n},), tl.float32)")

    total = "acc0[None, :]"
    for i in range(1, rows):
        total = f"tl.where(tl.arange(0, {rows})[:, None] == {i}, acc{i}[None, :], {total})"
    return Step("few", FLOAT32, start, lambda text: None, total, ("0.0", "0.0"))

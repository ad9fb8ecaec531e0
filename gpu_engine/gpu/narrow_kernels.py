"""Kernels of products with narrow weights: bytes are loaded, and become numbers between the load and the product.

Weights lie as [n, bytes of k]. With several codes to a byte these are apart by as much of k as there are bytes, a plane
each: a step of bytes multiplies as many pieces of the first factor, each contiguous, and nothing is shuffled. Codes are
unsigned. Rows of scales belong to one or more whole steps where blocks allow it, else every code finds its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.gpu.epilogues import Walk, number, place
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
class Rows:
    """A buffer [rows, n or 1] of scales or zero points; a row for every `block` codes of k, or one for all."""

    buffer: int
    block: int
    along_n: bool


@dataclass(frozen=True)
class Codes:
    """Codes of `bits` bits in a buffer [`columns`, `nbytes`] for `depth` places of k, and what they stand for.

    (code - zero) * scale is computed in `inner`, then rounded to the weights' type `dtype`. `zero` is one number for
    all, or rows of them. A step takes `unit` bytes at most.
    """

    buffer: int
    bits: int
    nbytes: int
    depth: int
    columns: int
    unit: int
    scale: Rows
    zero: Rows | int
    inner: DType
    dtype: DType

    @property
    def planes(self) -> int:
        return 8 // self.bits

    def write_loop(self, text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
        """See `gemm_kernels.Loop`; `b` is [BLOCK_K, BLOCK_N]."""
        self._write(text, product, step, tile, turned=False)

    def write_turned_loop(self, text: KernelText, product: Product, step: Step, tile: GemmTile, splits: int) -> None:
        """The same with `b` as [BLOCK_N, BLOCK_K]."""
        self._write(text, product, step, tile, turned=True)

    def _write(self, text: KernelText, product: Product, step: Step, tile: GemmTile, *, turned: bool) -> None:
        a, block = product.a, tile.block_k
        rows = "rows" if is_multiple(product.m, tile.block_m) else f"rows % {number(text, product.m)}"
        columns = "columns" if is_multiple(product.n, tile.block_n) else f"columns % {number(text, product.n)}"
        line, across = ("[None, :]", "[:, None]") if turned else ("[:, None]", "[None, :]")
        text.line(f"column = {columns}")
        text.line(f"steps = tl.arange(0, {block})")
        start = place(text, Walked(a.buffer, a.batch), [Walk("batch", product.axes[0])], product.batch)[0]
        text.line(f"a_from = {text.buffer(a.buffer)} + ({start})")
        text.line(f"a_at = ({rows})[:, None] * {number(text, a.outer)} + steps[None, :] * {number(text, a.inner)}")
        text.line(f"b_at = column{across} * {number(text, self.nbytes)} + steps{line}")
        once = {
            name: text.let(name, self._row(text, part, "0", line, across))
            for name, part in (("scale", self.scale), ("zero", self.zero))
            if isinstance(part, Rows) and not part.block
        }
        with text.block(f"for k in tl.range(low, high, {block}, num_stages={tile.num_stages}):"):
            text.line(f"packed = tl.load({text.buffer(self.buffer)} + k + b_at)")
            for plane in range(self.planes):
                at = "k" if plane == 0 else f"(k + {number(text, plane * self.nbytes)})"
                mask = ""
                if self.planes * self.nbytes != self.depth:
                    mask = f", mask={at} + steps[None, :] < {number(text, self.depth)}, other=0.0"
                text.line(f"a = tl.load(a_from + {at} * {number(text, a.inner)} + a_at{mask})")
                text.line(f"b = {self._weights(text, plane, at, once, line, across)}")
                step.add(text)

    def _weights(self, text: KernelText, plane: int, at: str, once: dict[str, str], line: str, across: str) -> str:
        """The numbers of a step's codes, in the type of the weights."""
        kind = language_dtype(self.inner)
        code = "packed" if self.bits == 8 else f"((packed >> {plane * self.bits}) & {2**self.bits - 1})"
        word, pattern, added, _ = MAGIC[self.inner]
        number = text.let("code", f"({code}.to({word}) | {pattern}).to({kind}, bitcast=True)")
        if isinstance(self.zero, int):
            centred = f"{number} - {added + self.zero}.0"
        else:
            zero = once.get("zero") or text.let("zero", self._row(text, self.zero, at, line, across))
            centred = f"({number} - {added}.0) - {zero}.to({kind})"
        scale = once.get("scale") or text.let("scale", self._row(text, self.scale, at, line, across))
        product = f"({centred}) * {scale}.to({kind})"
        return product if self.dtype == self.inner else f"({product}).to({language_dtype(self.dtype)})"

    def _row(self, text: KernelText, rows: Rows, at: str, line: str, across: str) -> str:
        """The scales or zero points of a step's codes, in a form that broadcasts to these."""
        stride = self.columns if rows.along_n else 1
        columns = f" + column{across}" if rows.along_n else ""
        if not rows.block:
            return f"tl.load({text.buffer(rows.buffer)}{columns or ' + 0'})"
        index = at if rows.block % self.unit == 0 else f"({at} + steps{line})"
        return f"tl.load({text.buffer(rows.buffer)} + {index} // {rows.block} * {number(text, stride)}{columns})"

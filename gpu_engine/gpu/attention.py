"""Attention: blocks of scores stay in registers, beside the running maximum and sum of every row.

Follows FlashAttention-2 (https://arxiv.org/abs/2307.08691). A program computes `rows` queries of one head. Keys that
all of them see come first, without masks; then those at the causal diagonal and at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_engine.gpu.kernel import language_dtype
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Attention
from gpu_engine.plan.axes import Shape, broadcast_strides, collapsed
from gpu_engine.plan.lower import Lowering

LOG2_E = math.log2(math.e)
LEAST_FEATURES = 16
MOST_FEATURES = 256
LEAST_ROWS = 16
MANY_QUERIES = 512
PRECISIONS = {"fp32": "ieee", "tf32": "tf32"}
FACTORS = {"fp16": FLOAT16, "bf16": BFLOAT16}
LOWEST = 'float("-inf")'


@dataclass(frozen=True)
class AttentionTile:
    """A program has `rows` queries and passes over `keys` keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Factors:
    """What a kernel multiplies: walks over [..., rows, features] of queries, keys, values and the result, each with
    `lead` axes before the last two; then the mask's, over [..., S, T], where there is one."""

    walks: tuple[Walked, ...]
    lead: Shape
    queries: Dim
    keys: Dim
    depth: int
    width: int


def lower_attention(
    options: GpuOptions,
    lowering: Lowering,
    op: Attention,
    node: Node,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> bool:
    """Declines float64, and heads of more than 256 features or of a number that only binding tells."""
    shapes = [value.shape for value in node.inputs]
    result = node.outputs[0].shape
    lead, (queries, width), (keys, depth) = result[:-2], result[-2:], shapes[1][-2:]
    if not has_kernel(node.inputs[0].dtype, depth, width):
        return False
    assert isinstance(depth, int) and isinstance(width, int)
    full = [(*lead, *shape[-2:]) for shape in (*shapes[:3], result)] + [(*lead, queries, keys)] * (len(shapes) - 3)
    walks = tuple(
        Walked(buffer, broadcast_strides(shape, whole))
        for buffer, shape, whole in zip(
            (*inputs[:3], outputs[0], *inputs[3:]), (*shapes[:3], result, *shapes[3:]), full, strict=True
        )
    )
    emit_attention(options, lowering, op, Factors(walks, lead, queries, keys, depth, width))
    return True


def has_kernel(dtype: DType, depth: Dim, width: Dim) -> bool:
    """Whether there is a kernel for elements of a type and heads of so many features."""
    return dtype in (FLOAT32, FLOAT16, BFLOAT16) and all(
        isinstance(extent, int) and 0 < extent <= MOST_FEATURES for extent in (depth, width)
    )


def emit_attention(options: GpuOptions, lowering: Lowering, op: Attention, factors: Factors) -> None:
    """Launch attention of any factors for whose types `has_kernel` holds; features must be neighbours in memory."""
    dtype = lowering.buffers[factors.walks[0].buffer].dtype
    multiplied = FACTORS.get(options.precision, dtype) if dtype == FLOAT32 else dtype
    added = any(lowering.buffers[walk.buffer].dtype != BOOL for walk in factors.walks[4:])
    tile = choose(multiplied, options.precision, factors, added=added)
    kernel = _Kernel(lowering, op, factors, tile, multiplied, PRECISIONS.get(options.precision, "ieee"))
    kernel.write()
    out = factors.walks[3].buffer
    reads = tuple(walk.buffer for i, walk in enumerate(factors.walks) if i != 3)
    kernel.text.launch(kernel.grid, reads, (out,), num_warps=tile.num_warps, num_stages=tile.num_stages)


def choose(multiplied: DType, precision: str, factors: Factors, *, added: bool) -> AttentionTile:
    """The tile for a type and a head size, few rows where there are, or may be, few queries; with a mask that is
    `added`, one that leaves registers for it. Every entry was compiled for sm_90 without spills."""
    features = max(_padded(factors.depth), _padded(factors.width))
    few = not isinstance(factors.queries, int) or factors.queries < MANY_QUERIES
    if multiplied.itemsize == 2:
        tile = _narrow_tile(features, few, added)
    elif precision == "tf32":
        tile = AttentionTile(64, 32, 4, 3) if features <= 64 else AttentionTile(64, 16 if features > 128 else 32, 8, 2)
    else:
        tile = AttentionTile(64, 32, 8, 2) if features <= 64 else AttentionTile(32, 16, 8, 2)
    if isinstance(factors.queries, int) and factors.queries <= LEAST_ROWS:
        return AttentionTile(LEAST_ROWS, min(tile.keys, 64), 4, tile.num_stages)
    return tile


def _narrow_tile(features: int, few: bool, added: bool) -> AttentionTile:
    """For factors of two bytes."""
    if features <= 64:
        return AttentionTile(64, 64, 4, 3) if few or added else AttentionTile(128, 128, 8, 3)
    if features <= 128:
        return AttentionTile(64, 32, 4, 3) if added else AttentionTile(64, 64, 4, 3) if few else (
            AttentionTile(128, 64, 8, 3))  # fmt: skip
    return AttentionTile(64, 16, 4, 3) if added else AttentionTile(64, 32, 4, 3)


def _padded(features: int) -> int:
    return max(LEAST_FEATURES, power_of_two(features))


class _Kernel:
    """Writes one kernel."""

    def __init__(
        self,
        lowering: Lowering,
        op: Attention,
        factors: Factors,
        tile: AttentionTile,
        multiplied: DType,
        precision: str,
    ) -> None:
        self.text = KernelText(lowering, "attention")
        self._op, self._factors, self._tile, self._scale = op, factors, tile, float(op.scale)
        self._masks = [lowering.buffers[walk.buffer].dtype for walk in factors.walks[4:]]
        dtype = lowering.buffers[factors.walks[0].buffer].dtype
        self._cast = "" if multiplied == dtype else f".to({language_dtype(multiplied)})"
        self._multiplied, self._dtype, self._precision = multiplied, dtype, precision
        self._depth, self._width = _padded(factors.depth), _padded(factors.width)
        self._queries, self._keys = self._shared(factors.queries), self._shared(factors.keys)
        self._natural = (bool(self._masks) and not (self._masks[0] == BOOL and op.fill == -math.inf)) or op.scale <= 0
        """Whether scores are held as they are, else in units of which the product with `scale` is a power of two."""
        blocks = dims.ceil_div(factors.queries, tile.rows)
        self.grid = (blocks * dims.product(factors.lead),)
        self._places(blocks)

    def write(self) -> None:
        text, rows = self.text, self._tile.rows
        self._load_queries()
        text.line(f"peak = tl.full(({rows},), {LOWEST}, tl.float32)")
        text.line(f"total = tl.zeros(({rows},), tl.float32)")
        text.line(f"acc = tl.zeros(({rows}, {self._width}), tl.float32)")
        size, keys = self._tile.keys, self._keys
        whole = not self._op.causal and dims.modulo(self._factors.keys, size) == 0
        text.line(f"stop = {keys}")
        text.line(f"full = {keys}" if whole else f"full = {keys} // {size} * {size}")
        if self._op.causal:
            text.line(f"stop = tl.minimum(stop, (block + 1) * {rows})")
            text.line(f"full = tl.minimum(full, (block * {rows} + 1) // {size} * {size})")
        with text.block(f"for first in range(0, full, {size}):"):
            self._step(edge=False)
        if not whole:
            with text.block(f"for first in range(full, stop, {size}):"):
                self._step(edge=True)
        self._store()

    def _shared(self, dim: Dim) -> str:
        return self.text.parameter(dim)

    def _places(self, blocks: Dim) -> None:
        """Where the program's head is in every tensor."""
        text, walks, lead = self.text, self._factors.walks, self._factors.lead
        text.line(f"block = tl.program_id(0) % {self._shared(blocks)}")
        rest = text.let("head", f"tl.program_id(0) // {self._shared(blocks)}")
        axes = collapsed(lead, [walk.strides[:-2] for walk in walks])
        indices = text.unravelled(rest, [extent for extent, _ in axes], shared=True)
        self._at = []
        for i, walk in enumerate(walks):
            steps = [f"{index} * {self._shared(strides[i])}"
                     for index, (_, strides) in zip(indices, axes, strict=True) if strides[i] != 0]  # fmt: skip
            offset = [self._shared(walk.offset)] * (walk.offset != 0)
            self._at.append(text.let("at", " + ".join(offset + steps) or "0"))
        text.line(f"row = block * {self._tile.rows} + tl.arange(0, {self._tile.rows})")
        text.line(f"inside = tl.minimum(row, {self._queries} - 1)")
        text.line(f"d = tl.arange(0, {self._depth})")
        text.line(f"e = tl.arange(0, {self._width})")

    def _row(self, i: int, index: str) -> str:
        """The elements from a tensor's head to one of its rows."""
        return f"{self._at[i]} + {index} * {self._shared(self._factors.walks[i].strides[-2])}"

    def _load_queries(self) -> None:
        short = self._factors.depth != self._depth
        options = f", mask=d[None, :] < {self._factors.depth}, other=0.0" if short else ""
        place = f"{self._row(0, 'inside[:, None]')} + d[None, :]"
        self.text.line(
            f"q = tl.load({self.text.buffer(self._factors.walks[0].buffer)} + ({place}){options}){self._cast}"
        )

    def _load_factor(self, name: str, i: int, index: str, features: str, extent: int, padded: int, edge: bool) -> None:
        masks = [f"({features} < {extent})"] * (extent != padded) + [f"({index} < {self._keys})"] * edge
        options = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        pointer = self.text.buffer(self._factors.walks[i].buffer)
        self.text.line(f"{name} = tl.load({pointer} + ({self._row(i, index)} + {features}){options}){self._cast}")

    def _step(self, *, edge: bool) -> None:
        """One block of keys; at an edge some are beyond the last one, or after some of the queries."""
        text, factors = self.text, self._factors
        precision = f', input_precision="{self._precision}"' if self._multiplied == FLOAT32 else ""
        text.line(f"key = first + tl.arange(0, {self._tile.keys})")
        self._load_factor("k", 1, "key[None, :]", "d[:, None]", factors.depth, self._depth, edge)
        text.line(f"score = tl.dot(q, k{precision})")
        if self._natural:
            text.line(f"score = score * {self._scale!r}")
        if self._masks:
            self._mask(edge)
        if edge:
            seen = f"(key[None, :] < {self._keys})"
            seen += " & (key[None, :] <= row[:, None])" if self._op.causal else ""
            text.line(f"score = tl.where({seen}, score, {LOWEST})")
        self._weigh()
        self._load_factor("v", 2, "key[:, None]", "e[None, :]", factors.width, self._width, edge)
        narrow = "" if self._multiplied == FLOAT32 else f".to({language_dtype(self._multiplied)})"
        text.line(f"acc = tl.dot(weight{narrow}, v, acc{precision})")

    def _mask(self, edge: bool) -> None:
        text, walk = self.text, self._factors.walks[4]
        place, options = self._at[4], ""
        if walk.strides[-2] != 0:
            place = self._row(4, "inside[:, None]")
        if walk.strides[-1] != 0:
            step = "" if walk.strides[-1] == 1 else f" * {self._shared(walk.strides[-1])}"
            place += f" + key[None, :]{step}"
            options = f", mask=key[None, :] < {self._keys}, other=0" if edge else ""
        mask = text.let("mask", f"tl.load({text.buffer(walk.buffer)} + ({place}){options})")
        if self._masks[0] == BOOL:
            fill = LOWEST if self._op.fill == -math.inf else repr(float(self._op.fill))
            text.line(f"score = tl.where({mask} != 0, score, {fill})")
        else:
            text.line(f"score = score + {mask}.to(tl.float32)")

    def _weigh(self) -> None:
        """The weights of a block relative to the greatest score so far."""
        factor = 1.0 if self._natural else self._scale * LOG2_E
        exponent = f"(score - base[:, None]) * {LOG2_E!r}" if self._natural else f"score * {factor!r} - base[:, None]"
        decay = f"(peak - base) * {LOG2_E!r}" if self._natural else "peak - base"
        highest = "tl.max(score, axis=1)" + ("" if self._natural else f" * {factor!r}")
        self.text.line(f"""
            higher = tl.maximum(peak, {highest})
            base = tl.where(higher == {LOWEST}, 0.0, higher)
            weight = tl.exp2({exponent})
            decay = tl.exp2({decay})
            total = total * decay + tl.sum(weight, axis=1)
            acc = acc * decay[:, None]
            peak = higher
        """)

    def _store(self) -> None:
        text, factors = self.text, self._factors
        text.line("result = acc / total[:, None]")
        if self._op.zero_nan:
            text.line("result = tl.where((total > 0)[:, None], result, 0.0)")
        elif (dims.bounds(factors.keys)[0] or 0) < 1:
            text.line(f"result = tl.where({self._keys} > 0, result, 0.0)")
        masks = [f"(row[:, None] < {self._queries})"]
        masks += [f"(e[None, :] < {factors.width})"] * (factors.width != self._width)
        place = f"{self._row(3, 'row[:, None]')} + e[None, :]"
        value = "result" if self._dtype == FLOAT32 else f"result.to({language_dtype(self._dtype)})"
        text.line(f"tl.store({text.buffer(factors.walks[3].buffer)} + ({place}), {value}, mask={' & '.join(masks)})")

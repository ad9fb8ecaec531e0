"""LayerNorm and LocalResponseNorm.

A row that fits is read once and stays in registers. Of a longer one every lane keeps a running mean and the sum of
squared distances from it (Welford's), which are then joined (Chan et al., doi 10.2307/2683386); the row is read again.
"""

from __future__ import annotations

from gpu_engine.gpu.folds import Block, FoldTile, folding, row_shape
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import computing, is_printable_dtype, literal
from gpu_engine.gpu.softmax import loop_shape
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT64, DType, compute_dtype, is_float
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import LayerNorm, LocalResponseNorm
from gpu_engine.plan.axes import broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

BLOCK = 1024


def lower_layer_norm(
    lowering: Lowering, op: LayerNorm, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    dtype, shape = node.inputs[0].dtype, node.inputs[0].shape
    wide = compute_dtype(dtype)
    if not is_float(dtype) or any(not _computes_in(value.dtype, wide) for value in node.inputs):
        return False
    strides = contiguous_strides(shape)
    streams = [Walked(outputs[0], strides), Walked(inputs[0], strides)]
    for buffer, value in zip(inputs[1:], node.inputs[1:], strict=True):
        streams.append(Walked(buffer, broadcast_strides(value.shape, shape)))
    axes = folding(shape, tuple(range(op.axis, len(shape))), streams)
    tile_shape = row_shape(axes) or loop_shape(axes)
    text = KernelText(lowering, "layer_norm" if op.centered else "rms_norm")
    tile = FoldTile(text, axes, streams, tile_shape)
    _Norm(text, tile, dtype, op, len(inputs) - 1).write()
    text.launch(tile.grid, inputs, outputs, num_warps=tile_shape.num_warps, in_place=(0,))
    return True


class _Norm:
    """Writes one normalisation of rows; streams are the result, x, and `affine` more for scale and bias."""

    def __init__(self, text: KernelText, tile: FoldTile, dtype: DType, op: LayerNorm, affine: int) -> None:
        self._text, self._tile, self._op, self._affine = text, tile, op, affine
        self._type, self._epsilon = computing(dtype), literal(op.epsilon, compute_dtype(dtype))
        self._root = "tl.sqrt" if dtype == FLOAT64 else "tl.sqrt_rn"
        self._count = f"({text.number(tile.count)})"
        if not isinstance(tile.count, int):
            self._count += f".to({self._type})"

    def write(self) -> None:
        if not self._tile.whole:
            mean, total = self._running() if self._op.centered else self._squares()
            factor = self._factor(total)
            with self._tile.blocks() as block:
                self._store(block, f"({block.load(1)} - {mean})" if mean else block.load(1), factor)
            return
        with self._tile.blocks() as block:
            x = block.masked(block.load(1), "0.0")
            if self._op.centered:
                mean = self._text.let("mean", f"{self._sum(x)} / {self._count}")
                x = block.masked(f"{x} - {mean}", "0.0")
            self._store(block, x, self._factor(self._sum(f"{x} * {x}")))

    def _store(self, block: Block, distance: str, factor: str) -> None:
        result = self._text.let("y", f"{distance} * {factor}")
        for i in range(self._affine):
            result = self._text.let("y", f"{result} {'*' if i == 0 else '+'} {block.load(i + 2)}")
        block.store(0, result)

    def _sum(self, lanes: str) -> str:
        return f"tl.sum({lanes}, axis={self._tile.axis}, keep_dims=True)"

    def _factor(self, total: str) -> str:
        """What a distance from the mean is multiplied by, from the sum of the squares of all."""
        spread = self._text.let("spread", f"{total} / {self._count} + {self._epsilon}")
        return self._text.let("factor", f"1.0 / {self._root}({spread})")

    def _running(self) -> tuple[str, str]:
        """(mean, sum of squared distances) of a row that is longer than a block."""
        text, shape = self._text, self._tile.shape
        for name in ("means", "squares", "counts"):
            text.line(f"{name} = tl.zeros({shape}, {self._type})")
        with self._tile.blocks() as block:
            apart = block.masked(f"{block.load(1)} - means", "0.0")
            text.line(f"""
                counts += {block.masked(f"tl.full([], 1.0, {self._type})", "0.0")}
                step = {apart} / tl.maximum(counts, 1.0)
                means += step
                squares += {apart} * ({apart} - step)
            """)
        mean = text.let("mean", f"{self._sum('means * counts')} / {self._count}")
        text.line(f"apart = means - {mean}")
        return mean, self._sum("squares + counts * apart * apart")

    def _squares(self) -> tuple[str, str]:
        """("", sum of squares) of a row that is longer than a block."""
        self._text.line(f"squares = tl.zeros({self._tile.shape}, {self._type})")
        with self._tile.blocks() as block:
            x = block.masked(block.load(1), "0.0")
            self._text.line(f"squares += {x} * {x}")
        return "", self._sum("squares")


def _computes_in(dtype: DType, wide: DType) -> bool:
    return is_printable_dtype(dtype) and compute_dtype(dtype) == wide


def lower_local_response_norm(
    lowering: Lowering, op: LocalResponseNorm, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    dtype, shape = node.inputs[0].dtype, node.inputs[0].shape
    if not is_float(dtype) or not is_printable_dtype(dtype):
        return False
    wide, inner = compute_dtype(dtype), dims.product(shape[op.axis + 1 :])
    text = KernelText(lowering, "local_response_norm")
    text.line(f"i = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})")
    text.line(f"inside = i < {text.number(dims.product(shape))}")
    text.line(f"channel = i // {text.number(inner)} % {text.number(shape[op.axis])}")
    text.line(f"total = tl.zeros(({BLOCK},), {computing(dtype)})")
    before = (op.size - 1) // 2
    with text.block(f"for tap in range({-before}, {op.size - before}):"):
        text.line("there = channel + tap")
        text.line(f"found = inside & (there >= 0) & (there < {text.number(shape[op.axis])})")
        neighbour = text.load(inputs[0], f"i + tap * {text.number(inner)}", "found", "0.0")
        text.line(f"total += {neighbour} * {neighbour}")
    scale = expr.power(op.bias + op.alpha / op.size * expr.arg(1, wide), op.beta)
    result = text.evaluate(expr.arg(0, wide) / scale, {0: text.load(inputs[0], "i", "inside"), 1: "total"})
    text.store(outputs[0], "i", result, "inside")
    text.launch([dims.ceil_div(dims.product(shape), BLOCK)], inputs, outputs)
    return True

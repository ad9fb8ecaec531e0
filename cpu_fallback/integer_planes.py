"""Images of few channels, plane by plane, as int16 channels last with an even number of channels: what cameras give.

The map that makes integers of an image is computed on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import times
from cpu_fallback.lanes import STORED, is_supported, widened, write_expr
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.maps import operand_dtypes
from cpu_fallback.native import Target, host
from cpu_fallback.packing import shuffled
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import INT16
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node, TensorType
from gpu_engine.ir.ops.channels_last import to_last
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
LANES = 8
MOST_CHANNELS = 4


@dataclass(frozen=True)
class PairedPlanes:
    """x [N, C, spatial...], C of at most MOST_CHANNELS, mapped by `before` to int16 [N, spatial..., C or C + 1]; the
    channel more is zero."""

    before: Expr

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        channels = x.shape[1]
        assert isinstance(channels, int)
        return (TensorType(INT16, (x.shape[0], *x.shape[2:], channels + channels % 2)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        (x,) = arrays
        mapped = expr.evaluate(self.before, [x]).transpose(to_last(x.ndim))
        missing = [(0, 0)] * (x.ndim - 1) + [(0, x.shape[1] % 2)]
        return (xp.pad(mapped, missing),)


@dataclass(frozen=True)
class PlanesKernel:
    """PairedPlanes by content. Words: addresses of x and of the result; images, pixels of one."""

    channels: int
    text: str
    expr: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, out = words.pointers(2)
        images, pixels = words.numbers(2)
        (dtype,) = operand_dtypes(self.expr)
        padded = self.channels + self.channels % 2
        start, stop = thread_share(code, pixels, LANES)
        whole = code.binary("add", start, code.binary("and", code.binary("sub", stop, start), i64(-LANES)))

        def some(image: Reg, index: Reg, lanes: int) -> list[Reg]:
            planes = []
            for channel in range(self.channels):
                plane = code.binary("add", times(code, image, i64(self.channels)), i64(channel))
                element = code.binary("add", times(code, plane, pixels), index)
                place = code.at(x, times(code, element, i64(dtype.itemsize)))
                loaded = widened(code, code.load(vector(lanes, STORED[dtype]), place, dtype.itemsize), dtype)
                planes.append(write_expr(code, self.expr, {0: loaded}, lanes))
            planes += [literal(vector(lanes, "i16"), 0)] * (padded - self.channels)
            element = code.binary("add", times(code, image, pixels), index)
            to = code.at(out, times(code, element, i64(padded * INT16.itemsize)))
            if lanes == 1:
                for channel, value in enumerate(planes):
                    code.store(value, code.at(to, i64(channel * INT16.itemsize)), INT16.itemsize)
            else:
                code.store(_interleaved(code, planes), to, INT16.itemsize)
            return []

        def each(image: Reg, _: list[Reg]) -> list[Reg]:
            code.loop(start, whole, i64(LANES), lambda index, _: some(image, index, LANES))
            code.loop(whole, stop, i64(1), lambda index, _: some(image, index, 1))
            return []

        code.loop(i64(0), images, i64(1), each)


def _interleaved(code: Code, planes: list[Reg]) -> Reg:
    """Two or four vectors, element by element."""
    order = [place for i in range(LANES) for place in (i, i + LANES)]
    kind = vector(LANES, "i32")
    pairs = [
        code.convert("bitcast", shuffled(code, planes[i], planes[i + 1], order), kind) for i in range(0, len(planes), 2)
    ]  # fmt: skip
    return pairs[0] if len(pairs) == 1 else shuffled(code, pairs[0], pairs[1], order)


def has_planes_form(shape: tuple[Any, ...], before: Expr, target: Target) -> bool:
    """Whether an image of `shape` is one for PairedPlanes."""
    few = isinstance(shape[1], int) and 0 < shape[1] <= MOST_CHANNELS
    return few and before.dtype == INT16 and is_supported(before, target)


def lower_paired_planes(
    lowering: Lowering, op: PairedPlanes, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    images, channels, *spatial = node.inputs[0].shape
    if not is_supported(op.before, host()) or not isinstance(channels, int):
        return False
    kernel = PlanesKernel(channels, expr.text(op.before), op.before)
    words = (Address(inputs[0]), Address(outputs[0]), images, dims.product(spatial))
    lowering.emit(Native(kernel, words), inputs, outputs)
    return True

"""Padding by the tensor's own elements: its inside first, then the borders axis by axis, each from what is there."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.calls import Native
from cpu_fallback.checks import GREATER, emit_relations
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.copies import emit_copy
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import can_copy
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Pad
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
MODES = ("reflect", "edge", "wrap")


@dataclass(frozen=True)
class BorderKernel:
    """Both borders of an axis. Words: tensor, extents before the axis, of its inside, and in bytes behind it, elements
    before the inside and after it."""

    mode: str

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x = words.take("ptr")
        outer, inside, inner, low, high = words.numbers(5)
        borders = code.binary("add", low, high)
        full = code.binary("mul", code.binary("add", borders, inside), inner)

        def one(index: Reg, _: list[Reg]) -> list[Reg]:
            block = code.at(x, code.binary("mul", code.binary("sdiv", index, borders), full))
            border = code.binary("srem", index, borders)
            behind = code.binary("add", border, inside)
            place = code.select(code.compare("icmp slt", border, low), border, behind)
            source = code.binary("add", self._source(code, code.binary("sub", place, low), inside), low)
            target_at, source_at = (code.at(block, code.binary("mul", i, inner)) for i in (place, source))
            code.call("void", "llvm.memcpy.p0.p0.i64", target_at, source_at, inner, Reg("false", "i1"))
            return []

        code.loop(*thread_share(code, code.binary("mul", outer, borders), 1), i64(1), one)

    def _source(self, code: Code, place: Reg, inside: Reg) -> Reg:
        """Which place of [0, inside) stands for one outside of it."""
        last = code.binary("sub", inside, i64(1))
        if self.mode == "edge":
            return code.select(code.compare("icmp slt", place, i64(0)), i64(0), last)
        period = inside if self.mode == "wrap" else code.binary("shl", last, i64(1))
        single = code.compare("icmp eq", period, i64(0))
        period = code.select(single, i64(1), period)
        rest = code.binary("srem", place, period)
        negative = code.compare("icmp slt", rest, i64(0))
        rest = code.select(negative, code.binary("add", rest, period), rest)
        if self.mode == "wrap":
            return rest
        back = code.compare("icmp sgt", rest, last)
        return code.select(back, code.binary("sub", period, rest), rest)


def lower_borders(lowering: Lowering, op: Pad, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, shape = node.inputs[0], node.outputs[0].shape
    pads = list(zip(op.before, op.after, strict=True))
    if not can_copy(x.dtype) or any(not isinstance(pad, int) or pad < 0 for pair in pads for pad in pair):
        return False
    axes = [axis for axis, pair in enumerate(pads) if pair != (0, 0)]
    text = f"{lowering.source}: Pad {op.mode} of {x.type}".replace("{", "{{").replace("}", "}}")
    checks = [
        (GREATER, x.shape[axis], 0, f"{text}: axis {axis} is empty")
        for axis in axes
        if not isinstance(x.shape[axis], int)
    ]
    if 0 in (x.shape[axis] for axis in axes):
        return False
    verdict = emit_relations(lowering, checks) if checks else None
    steps = contiguous_strides(shape)
    start: Dim = sum((low * step for (low, _), step in zip(pads, steps, strict=True)), 0)
    emit_copy(lowering, inputs[0], outputs[0], x.shape, (contiguous_strides(x.shape), steps), (0, start))
    for axis in axes:
        low, high = pads[axis]
        outer, inner = dims.product(shape[:axis]), dims.product(shape[axis + 1 :]) * x.dtype.itemsize
        words = (Address(outputs[0]), outer, x.shape[axis], inner, low, high)
        lowering.emit(Native(BorderKernel(op.mode), words), (outputs[0],), (outputs[0],))
    if verdict is not None:
        lowering.steps.append(verdict)
    return True

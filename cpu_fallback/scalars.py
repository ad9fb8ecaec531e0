"""Small things by value: tensors of extents, and elements picked at a place that is known."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.calls import Native
from cpu_fallback.checks import GREATER, emit_flag, emit_relations
from cpu_fallback.code import Code, i64
from cpu_fallback.copies import emit_copy
from cpu_fallback.jumps import emit_move
from cpu_fallback.lanes import INTEGERS
from cpu_fallback.loops import Words
from cpu_fallback.native import Target
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import can_copy
from gpu_engine.ir.graph import Node, ShapeTensor
from gpu_engine.ir.ops import Gather
from gpu_engine.ir.ops.control import Require
from gpu_engine.plan.axes import contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
MOST = 64


@dataclass(frozen=True)
class NumbersKernel:
    """The numbers that the words hold, as integers of one type. Words: result, numbers."""

    kind: str
    nbytes: int
    count: int

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        out = words.take("ptr")
        for i in range(self.count):
            code.store(code.convert("trunc", words.take(), self.kind), code.at(out, i64(i * self.nbytes)), self.nbytes)


def lower_shape_tensor(lowering: Lowering, op: ShapeTensor, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if op.dtype not in INTEGERS or len(op.values) > MOST:
        return False
    kernel = NumbersKernel(INTEGERS[op.dtype], op.dtype.itemsize, len(op.values))
    lowering.emit(Native(kernel, (Address(outputs[0]), *op.values)), inputs, outputs)
    return True


def lower_require(lowering: Lowering, op: Require, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if node.inputs[0].dtype.hasobject:
        return False
    verdict = emit_flag(lowering, inputs[1], op.expected, op.refusal())
    emit_move(lowering, inputs[0], outputs[0])
    lowering.steps.append(verdict)
    return True


def lower_pick(lowering: Lowering, op: Gather, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """A Gather of one place, which is known."""
    x, index = node.inputs[0], node.inputs[1].constant
    if index is None or index.size != 1 or not can_copy(x.dtype):
        return False
    place, extent = int(index.reshape(())), x.shape[op.axis]
    start: Dim = place if place >= 0 else extent + place
    least = place + 1 if place >= 0 else -place
    if isinstance(extent, int) and extent < least:
        return False
    verdict = None
    if not isinstance(extent, int):
        text = f"{lowering.source}: index {place} of an axis of {{0}} elements"
        verdict = emit_relations(lowering, [(GREATER, extent, least - 1, text)])
    before, behind = x.shape[: op.axis], x.shape[op.axis + 1 :]
    strides = contiguous_strides(x.shape)
    kept = (*strides[: op.axis], *strides[op.axis + 1 :])
    shape = (*before, *behind)
    emit_copy(
        lowering, inputs[0], outputs[0], shape, (kept, contiguous_strides(shape)), (start * strides[op.axis], 0)
    )  # fmt: skip
    if verdict is not None:
        lowering.steps.append(verdict)
    return True

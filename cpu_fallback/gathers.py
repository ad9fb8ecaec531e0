"""Gather: blocks of a tensor copied by indices, each of which is checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpu_fallback.calls import Native
from cpu_fallback.checks import emit_found
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.jumps import emit_move
from cpu_fallback.lanes import INTEGERS
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import INT32, INT64, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Gather
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
ONE_MOVE = (1, 2, 4, 8)


@dataclass(frozen=True)
class GatherKernel:
    """Blocks of `nbytes`, or of any number of bytes if that is 0.

    Words: result, x, indices, number that becomes 1 where an index is outside, extents of x before and along the axis,
    indices, bytes of a block.
    """

    index: DType
    nbytes: int

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        out, x, indices, found = words.pointers(4)
        outer, extent, count, block = words.numbers(4)
        size, kind = self.index.itemsize, INTEGERS[self.index]

        def one(position: Reg, _: list[Reg]) -> list[Reg]:
            before, which = code.binary("sdiv", position, count), code.binary("srem", position, count)
            loaded = code.load(kind, code.at(indices, code.binary("mul", which, i64(size))), size)
            place = code.convert("sext", loaded, "i64")
            negative = code.compare("icmp slt", place, i64(0))
            place = code.select(negative, code.binary("add", place, extent), place)

            def copy() -> list[Reg]:
                source = code.binary("add", code.binary("mul", before, extent), place)
                self._copy(code, code.at(out, self._bytes(code, position, block)),
                           code.at(x, self._bytes(code, source, block)), block)  # fmt: skip
                return []

            def refuse() -> list[Reg]:
                code.store(i64(1), found, 8)
                return []

            code.either(code.compare("icmp ult", place, extent), copy, refuse)
            return []

        code.loop(*thread_share(code, code.binary("mul", outer, count), 1), i64(1), one)

    def _bytes(self, code: Code, blocks: Reg, block: Reg) -> Reg:
        return code.binary("mul", blocks, i64(self.nbytes) if self.nbytes else block)

    def _copy(self, code: Code, target: Reg, source: Reg, block: Reg) -> None:
        if self.nbytes:
            code.store(code.load(f"i{8 * self.nbytes}", source, 1), target, 1)
        else:
            code.call("void", "llvm.memcpy.p0.p0.i64", target, source, block, Reg("false", "i1"))


def lower_blocks(lowering: Lowering, op: Gather, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, indices = node.inputs
    if x.dtype.hasobject or indices.dtype not in (INT32, INT64):
        return False
    extent, block = x.shape[op.axis], dims.product(x.shape[op.axis + 1 :]) * x.dtype.itemsize
    found = lowering.buffer(INT64, ())
    emit_move(lowering, lowering.constant(np.zeros((), INT64)), found)
    nbytes = block if isinstance(block, int) and block in ONE_MOVE else 0
    words = (
        *map(Address, (outputs[0], *inputs, found)), dims.product(x.shape[: op.axis]), extent,
        dims.product(indices.shape), block,
    )  # fmt: skip
    lowering.emit(Native(GatherKernel(indices.dtype, nbytes), words), (*inputs, found), (*outputs, found))
    kinds = ", ".join(f"{value.dtype}[{', '.join(['{}'] * value.rank)}]" for value in node.inputs)
    text = f"Gather of {kinds}: an index outside [-{{}}, {{}}]"
    lowering.steps.append(emit_found(lowering, found, text, (*x.shape, *indices.shape, extent, extent - 1)))
    return True

"""The place of the least or greatest element along a short axis: one comparison after the other."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.lanes import COMPUTED, STORED, widened
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.native import Target, host
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BOOL, FLOAT16, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import ArgReduce
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
LONGEST = 256
"""Of a longer axis NumPy compares several elements at once."""


@dataclass(frozen=True)
class ArgReduceKernel:
    """NaN counts as the least and the greatest. Words: result, x, extents before, along and behind the axis."""

    dtype: DType
    kind: str
    last: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        out, x = words.pointers(2)
        outer, extent, inner = words.numbers(3)
        size = self.dtype.itemsize
        stride = code.binary("mul", inner, i64(size))

        def place(index: Reg, _: list[Reg]) -> list[Reg]:
            before, behind = code.binary("sdiv", index, inner), code.binary("srem", index, inner)
            first = code.binary("add", code.binary("mul", before, code.binary("mul", extent, inner)), behind)
            start = code.at(x, code.binary("mul", first, i64(size)))

            def step(i: Reg, best: list[Reg]) -> list[Reg]:
                value = self._loaded(code, code.at(start, code.binary("mul", i, stride)))
                better = self._better(code, value, best[0])
                return [code.select(better, value, best[0]), code.select(better, i, best[1])]

            best = code.loop(i64(1), extent, i64(1), step, [self._loaded(code, start), i64(0)])
            code.store(best[1], code.at(out, code.binary("mul", index, i64(8))), 8)
            return []

        code.loop(*thread_share(code, code.binary("mul", outer, inner), 64), i64(1), place)

    def _loaded(self, code: Code, place: Reg) -> Reg:
        return widened(code, code.load(STORED[self.dtype], place, self.dtype.itemsize), self.dtype)

    def _better(self, code: Code, value: Reg, best: Reg) -> Reg:
        """Whether `value`, which comes later, takes the place of the best before it."""
        condition = ("l" if self.kind == "min" else "g") + ("e" if self.last else "t")
        if COMPUTED[self.dtype] not in ("float", "double"):
            signed = "s" if self.dtype.kind == "i" else "u"
            return code.compare(f"icmp {signed}{condition}", value, best)
        if self.last:
            return code.binary(
                "or", code.compare(f"fcmp o{condition}", value, best), code.compare("fcmp uno", value, value)
            )
        return code.binary("and", code.compare(f"fcmp u{condition}", value, best), code.compare("fcmp ord", best, best))


def lower_arg_reduce(lowering: Lowering, op: ArgReduce, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x = node.inputs[0]
    extent = x.shape[op.axis]
    if not isinstance(extent, int) or not 0 < extent <= LONGEST:
        return False
    if x.dtype not in COMPUTED or x.dtype == BOOL or (x.dtype == FLOAT16 and not host().halves):
        return False
    outer, inner = dims.product(x.shape[: op.axis]), dims.product(x.shape[op.axis + 1 :])
    words = (Address(outputs[0]), Address(inputs[0]), outer, extent, inner)
    lowering.emit(Native(ArgReduceKernel(x.dtype, op.kind, op.select_last), words), inputs, outputs)
    return True

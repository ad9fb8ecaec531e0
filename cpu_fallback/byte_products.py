"""MatMul of unsigned bytes with constant int8 weights, four products to a lane, where there is no dot instruction.

Weights are split so that no pair of products saturates (`byte_pairs`); elements that are multiplied twice are copied
behind their rows by a step in front.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback import packing
from cpu_fallback.byte_pairs import QUAD, split_all
from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.gemm_driver import PACKED
from cpu_fallback.integers import times
from cpu_fallback.lanes import is_supported
from cpu_fallback.loops import Words, thread_share
from cpu_fallback.maps import compacted, operand_dtypes
from cpu_fallback.native import Target
from cpu_fallback.product_calls import Matrix, Operand, Product, emit_call
from cpu_fallback.tiles import has_byte_pairs, has_dots, tile_shape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import INT8, INT32, UINT8
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.axes import broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
MOST_EXTRA = 6
"""Elements of a row for every one that may be multiplied twice."""


@dataclass(frozen=True)
class RepeatKernel:
    """Rows of bytes with `extra` of their elements once more behind them. Words: addresses of the rows, of the result
    and of the elements' numbers; rows, bytes of one, bytes of one of the result but for what comes twice."""

    extra: int

    def write(self, code: Code, _: Target) -> None:
        words = Words(code)
        x, out, numbers = words.pointers(3)
        rows, depth, whole = words.numbers(3)
        line = code.binary("add", whole, i64(self.extra))
        zero, volatile = Reg("0", "i8"), Reg("false", "i1")

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            source, to = code.at(x, times(code, index, depth)), code.at(out, times(code, index, line))
            code.call("void", "llvm.memcpy.p0.p0.i64", to, source, depth, volatile)
            gap = code.binary("sub", whole, depth)
            code.call("void", "llvm.memset.p0.i64", code.at(to, depth), zero, gap, volatile)
            behind = code.at(to, whole)

            def one(place: Reg, _: list[Reg]) -> list[Reg]:
                number = code.load("i32", code.at(numbers, times(code, place, i64(4))), 4)
                value = code.load("i8", code.at(source, code.convert("zext", number, "i64")), 1)
                code.store(value, code.at(behind, place), 1)
                return []

            code.loop(i64(0), i64(self.extra), i64(1), one)
            return []

        code.loop(*thread_share(code, rows, 1), i64(1), row)


def emit_bytes(
    lowering: Lowering, op: MatMul, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of a product of uint8 rows with an int8 matrix; False if it is another, or cannot be split."""
    a, b = node.inputs[:2]
    plain = op.accumulate == INT32 and not op.transpose_a and has_byte_pairs(target) and not has_dots(target)
    if not plain or (a.dtype, b.dtype) != (UINT8, INT8) or b.constant is None or b.rank != 2 or not b.constant.size:
        return False
    root, used = compacted(op.epilogue or expr.arg(0, INT32))
    if used[:1] != (0,) or not is_supported(root, target):
        return False
    weights, numbers = split_all((b.constant.T if op.transpose_b else b.constant)[None])
    depth, extra = dims.number(a.shape[-1]), numbers.shape[1]
    if extra * MOST_EXTRA > depth:
        return False
    whole, buffer = len(weights[0]), inputs[0]
    if whole != depth:
        buffer = lowering.buffer(UINT8, (*a.shape[:-1], whole))
        table = lowering.constant(numbers.ravel())
        words = (*map(Address, (inputs[0], buffer, table)), dims.product(a.shape[:-1]), depth, whole - extra)
        lowering.emit(Native(RepeatKernel(extra), words), (inputs[0], table), (buffer,))
    shape, tile = node.outputs[0].shape, tile_shape(target, "i32", QUAD)
    *lead, row, _ = broadcast_strides((*a.shape[:-1], whole), (*shape[:-2], *a.shape[-2:-1], whole))
    packed = packing.pack_narrow_panels(weights[0], tile)
    left = Matrix(buffer, tuple(lead), row, QUAD)
    right = Matrix(lowering.constant(packed), (0,) * len(lead), 0, 0)
    operands = product_operands(node, root, used, inputs, outputs)
    depth = whole // QUAD
    emit_call(lowering, Product(root, INT32, tile, PACKED, left, right, shape, depth, operands, UINT8.itemsize))
    return True


def product_operands(
    node: Node, root: Expr, used: tuple[int, ...], inputs: Buffers, outputs: Buffers
) -> list[Operand]:  # fmt: skip
    """The result of a product, then the operands of its epilogue `root`, of which `used` are the numbers."""
    shape = node.outputs[0].shape
    operands = [Operand(outputs[0], root.dtype.itemsize, contiguous_strides(shape))]
    for position, kind in zip(used[1:], operand_dtypes(root)[1:], strict=True):
        strides = broadcast_strides(node.inputs[1 + position].shape, shape)
        operands.append(Operand(inputs[1 + position], kind.itemsize, strides))
    return operands

"""Map: fused pointwise kernels, one loop over rows and one in vectors along the inner axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_fallback.code import Code, Reg, i64
from cpu_fallback.lanes import is_supported, write_expr
from cpu_fallback.loops import (
    BROADCAST,
    CONTIGUOUS,
    STRIDED,
    Mask,
    Read,
    Words,
    Write,
    row_offsets,
    thread_share,
    vector_loop,
)
from cpu_fallback.native import Target, host
from cpu_fallback.calls import Address, Native, Word
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType, compute_dtype
from gpu_engine.ir.expr import Expr

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class MapKernel:
    """A pointwise kernel by content: what is computed, how each operand is read, how many axes are left.

    Words: out, operands; extents of the inner axis, of the outer axes (none but the first of which is missing: rows
    come instead); for each operand the outer strides and, where strided, the inner one, in bytes.
    """

    text: str
    accesses: tuple[str, ...]
    rank: int
    expr: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        words, lanes = Words(code), lane_count(self.expr, target)
        dtypes = operand_dtypes(self.expr)
        out, *operands = words.pointers(1 + len(dtypes))
        inner = words.take()
        outer = words.numbers(max(0, self.rank - 2))
        rows = words.take() if self.rank > 1 else i64(1)
        strides = [words.numbers(self.rank - 1) for _ in dtypes]
        inner_strides = [words.take() if access == STRIDED else None for access in self.accesses]
        span = (i64(0), inner) if self.rank > 1 else thread_share(code, inner, lanes)
        row_nbytes = code.binary("mul", inner, i64(self.expr.dtype.itemsize))

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            offsets = row_offsets(code, index, outer, strides) if self.rank > 1 else [i64(0)] * len(dtypes)
            reads = [
                Read(code.at(base, offset), dtype, access, stride)
                for base, offset, dtype, access, stride in zip(
                    operands, offsets, dtypes, self.accesses, inner_strides, strict=True
                )
            ]
            write = Write(code.at(out, code.binary("mul", index, row_nbytes)), self.expr.dtype)
            vector_loop(code, target, lanes, span, reads, [write], body)
            return []

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [write_expr(code, self.expr, dict(enumerate(loaded)), lanes)], []

        if self.rank > 1:
            code.loop(*thread_share(code, rows, 1), i64(1), row)
        else:
            row(i64(0), [])


def lane_count(root: Expr, target: Target, limit: int = 64) -> int:
    """As many lanes as the widest element computed with leaves room for."""
    widest = max(compute_dtype(node.dtype).itemsize for node in expr.walk(root))
    return min(limit, target.vector_nbytes // widest)


def operand_dtypes(root: Expr) -> list[DType]:
    """The dtypes of operands 0, 1, ...; every operand up to the last must occur."""
    found = {node.value: node.dtype for node in expr.walk(root) if node.op == "arg"}
    return [found[i] for i in range(len(found))]


def map_call(
    root: Expr, inputs: Sequence[tuple[int, Shape]], out: int, shape: Shape
) -> tuple[Native, tuple[int, ...]] | None:
    """The native call that maps the buffers `inputs` to `out` of `shape`, and the positions of inputs that are read
    exactly where the output is written; None if the expression has no native form."""
    used = sorted({node.value for node in expr.walk(root) if node.op == "arg"})
    compact = expr.substitute(
        root, {old: expr.arg(new, node.dtype) for new, old in enumerate(used) for node in expr.walk(root)
               if node.op == "arg" and node.value == old}
    )  # fmt: skip
    if not is_supported(compact, host()):
        return None
    operands = [inputs[i] for i in used]
    itemsizes = [dtype.itemsize for dtype in operand_dtypes(compact)]
    axes = collapsed(shape, [broadcast_strides(own, shape) for _, own in operands])
    accesses = tuple(inner_access(axes[-1][1][i]) for i in range(len(operands)))
    words: list[Word] = [Address(out), *(Address(buffer) for buffer, _ in operands), axes[-1][0]]
    if len(axes) > 1:
        words += [extent for extent, _ in axes[1:-1]]
        words.append(dims.product(extent for extent, _ in axes[:-1]))
    for i, itemsize in enumerate(itemsizes):
        words += [strides[i] * itemsize for _, strides in axes[:-1]]
    words += [axes[-1][1][i] * size for i, size in enumerate(itemsizes) if accesses[i] == STRIDED]
    in_place = tuple(position for position, (_, own) in zip(used, operands, strict=True) if own == shape)
    return Native(MapKernel(expr.text(compact), accesses, len(axes), compact), tuple(words)), in_place


def broadcast_strides(own: Shape, shape: Shape) -> list[Dim]:
    """Element strides of a contiguous operand of shape `own` over the axes of `shape`, 0 where it is broadcast."""
    strides: list[Dim] = []
    step: Dim = 1
    padded = (1,) * (len(shape) - len(own)) + own
    for extent, full in zip(reversed(padded), reversed(shape), strict=True):
        strides.append(step if extent == full else dims.many(extent) * step)
        step = step * extent
    return strides[::-1]


Axis = tuple[Dim, list[Dim]]


def collapsed(shape: Shape, strides: Sequence[Sequence[Dim]]) -> list[Axis]:
    """(extent, stride of every operand) of the axes that are left when neighbours that all walk alike are joined."""
    axes: list[Axis] = []
    for i, extent in enumerate(shape):
        if extent == 1:
            continue
        steps = [operand[i] for operand in strides]
        if axes and all(before == step * extent for before, step in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * extent, steps)
        else:
            axes.append((extent, steps))
    return axes or [(1, [0] * len(strides))]


def inner_access(stride: Dim) -> str:
    return CONTIGUOUS if stride == 1 else BROADCAST if stride == 0 else STRIDED

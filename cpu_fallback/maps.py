"""Map: fused pointwise kernels, one loop over rows and one in vectors along the inner axis.

The same kernels move elements: a copy is a map whose operand, or result, is walked with strides of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_fallback.calls import Native
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
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType, compute_dtype, is_float
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape, broadcast_strides, collapsed, contiguous_strides
from gpu_engine.plan.words import Address, Word


@dataclass(frozen=True)
class Walked:
    """A buffer as a kernel walks it: from `offset` bytes on, `strides` in elements for every axis of the result."""

    buffer: int
    dtype: DType
    strides: tuple[Dim, ...]
    offset: Dim = 0


@dataclass(frozen=True)
class MapKernel:
    """A pointwise kernel by content: what is computed, how each operand is read, how many axes are left.

    `shares[i]` is the set of outer strides that stream i walks by; stream 0 is the result, operands follow. Operands
    of the expression beyond the streams are literals. Words: addresses of the streams; the literals; the extent of the
    inner axis; with outer axes the extents of all of them but the first, and their product; the strides of every set,
    and the inner ones of strided operands, in bytes.
    """

    text: str
    accesses: tuple[str, ...]
    shares: tuple[int, ...]
    rank: int
    expr: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        words, lanes = Words(code), lane_count([self.expr], target)
        dtypes = operand_dtypes(self.expr)
        streams = words.pointers(len(self.shares))
        count = len(self.accesses)
        literals = {i: words.literal(dtype, lanes) for i, dtype in enumerate(dtypes[count:], count)}
        inner = words.take()
        outer = words.numbers(max(0, self.rank - 2))
        rows = words.take() if self.rank > 1 else i64(1)
        strides = [words.numbers(self.rank - 1) for _ in range(max(self.shares) + 1)]
        steps = [words.take() if access == STRIDED else None for access in self.accesses]
        span = (i64(0), inner) if self.rank > 1 else thread_share(code, inner, lanes)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            offsets = row_offsets(code, index, outer, strides) if self.rank > 1 else [i64(0)] * len(strides)
            bases = [code.at(base, offsets[share]) for base, share in zip(streams, self.shares, strict=True)]
            reads = [Read(*stream) for stream in zip(bases[1:], dtypes, self.accesses, steps, strict=False)]
            vector_loop(code, target, lanes, span, reads, [Write(bases[0], self.expr.dtype)], body)
            return []

        def body(loaded: list[Reg], _: Mask, __: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            return [write_expr(code, self.expr, {**dict(enumerate(loaded)), **literals}, lanes)], []

        if self.rank > 1:
            code.loop(*thread_share(code, rows, 1), i64(1), row)
        else:
            row(i64(0), [])


def lane_count(roots: Sequence[Expr], target: Target) -> int:
    """As many lanes as the widest element computed with leaves room for."""
    widest = max(compute_dtype(node.dtype).itemsize for root in roots for node in expr.walk(root))
    return min(64, target.vector_nbytes // widest)


def operand_dtypes(root: Expr) -> list[DType]:
    """The dtypes of operands 0, 1, ...; every operand up to the last must occur."""
    found = {node.value: node.dtype for node in expr.walk(root) if node.op == "arg"}
    return [found[i] for i in range(len(found))]


def compacted(root: Expr) -> tuple[Expr, tuple[int, ...]]:
    """The expression with the operands it uses numbered 0, 1, ..., and what their numbers were."""
    used = {node.value: node.dtype for node in expr.walk(root) if node.op == "arg"}
    order = tuple(sorted(used))
    return expr.substitute(root, {old: expr.arg(new, used[old]) for new, old in enumerate(order)}), order


def map_call(
    root: Expr, inputs: Sequence[tuple[int, Shape]], out: int, shape: Shape
) -> tuple[Native, tuple[int, ...]] | None:
    """The native call that maps the broadcast buffers `inputs` to `out` of `shape`, and the positions of inputs that
    are read exactly where the result is written; None if the expression has no native form."""
    dtypes = {node.value: node.dtype for node in expr.walk(root) if node.op == "arg"}
    operands = [
        Walked(buffer, dtypes.get(i, root.dtype), broadcast_strides(own, shape))
        for i, (buffer, own) in enumerate(inputs)
    ]
    call = walk_call(root, operands, Walked(out, root.dtype, contiguous_strides(shape)), shape)
    return None if call is None else (call, tuple(i for i in sorted(dtypes) if inputs[i][1] == shape))


def walk_call(root: Expr, operands: Sequence[Walked], out: Walked, extents: Shape) -> Native | None:
    """The native call that computes `root` for every point of `extents`; None if it has no native form.

    Where the innermost axis is not contiguous in `out`, every element is a row of its own.
    """
    if not is_supported(root, host()):
        return None
    root, used = compacted(root)
    operands = [operands[i] for i in used]
    root, literals = hoisted(root, len(operands))
    streams = [out, *operands]
    walks = {(stream.strides, stream.dtype.itemsize): i for i, stream in reversed(list(enumerate(streams)))}
    order = sorted(walks, key=lambda walk: walks[walk])
    axes = collapsed(extents, [strides for strides, _ in order])
    if not axes or axes[-1][1][0] != 1:
        axes.append((1, [1] * len(order)))
    shares = tuple(order.index((stream.strides, stream.dtype.itemsize)) for stream in streams)
    inner = [axes[-1][1][share] for share in shares]
    accesses = tuple(inner_access(stride) for stride in inner[1:])
    words: list[Word] = [*(Address(stream.buffer, stream.offset) for stream in streams), *literals, axes[-1][0]]
    if len(axes) > 1:
        words += [extent for extent, _ in axes[1:-1]]
        words.append(dims.product(extent for extent, _ in axes[:-1]))
    for i, (_, size) in enumerate(order):
        words += [strides[i] * size for _, strides in axes[:-1]]
    for access, stride, stream in zip(accesses, inner[1:], operands, strict=True):
        words += [stride * stream.dtype.itemsize] * (access == STRIDED)
    return Native(MapKernel(expr.text(root), accesses, shares, len(axes), root), tuple(words))


def hoisted(root: Expr, first: int) -> tuple[Expr, tuple[int, ...]]:
    """The expression with unusual float literals as operands from number `first` on, and those as argument words.

    Layers that differ in a learned scalar then share a kernel.
    """
    found: dict[Expr, Expr] = {}
    for node in expr.walk(root):
        if node.op == "const" and is_float(node.dtype) and not _is_plain(float(node.value)):
            found[node] = expr.arg(first + len(found), node.dtype)
    words = tuple(int.from_bytes(node.value.tobytes(), "little") for node in found)
    return (expr.replace(root, found), words) if found else (root, ())


def _is_plain(value: float) -> bool:
    """Few values that many expressions share, and that instructions are chosen by."""
    return not math.isfinite(value) or (abs(value) <= 8 and value * 8 == int(value * 8))


def inner_access(stride: Dim) -> str:
    return CONTIGUOUS if stride == 1 else BROADCAST if stride == 0 else STRIDED

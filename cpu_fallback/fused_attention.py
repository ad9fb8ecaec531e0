"""Attention as a native step: strides, scratch and which axes are heads."""

from __future__ import annotations

from cpu_fallback import packing
from cpu_fallback.attention import lower_attention
from cpu_fallback.attention_kernels import MOST_TILES, AttentionKernel
from cpu_fallback.attention_weights import Rule
from cpu_fallback.caches import caches
from cpu_fallback.calls import Native
from cpu_fallback.gemm import converted
from cpu_fallback.loops import STRIDED
from cpu_fallback.maps import inner_access
from cpu_fallback.native import Target, host
from cpu_fallback.product_calls import thread_limit, tile_widths
from cpu_fallback.tiles import TileShape, tile_shape
from cpu_fallback.turned_attention import has_kernel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Attention
from gpu_engine.plan.axes import Shape, broadcast_strides, collapsed, contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.turned_attention import Perm, TurnedAttention, straight
from gpu_engine.plan.words import Address, Word

Buffers = tuple[int, ...]


def lower_fused_attention(
    lowering: Lowering, op: Attention, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Native attention where there is one, else NumPy's."""
    found = emit_attention(lowering, op, node, inputs, outputs, host())
    return found or lower_attention(lowering, op, node, inputs, outputs)


def lower_turned_attention(
    lowering: Lowering, op: TurnedAttention, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    return emit_turned_attention(lowering, op, node, inputs, outputs, host())


def emit_attention(
    lowering: Lowering, op: Attention, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of native attention; False if it has no native form."""
    turned = straight(op, [value.type for value in node.inputs], node.outputs[0].rank)
    return emit_turned_attention(lowering, turned, node, inputs, outputs, target)


def emit_turned_attention(
    lowering: Lowering, op: TurnedAttention, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of native attention; False if it has no native form."""
    kinds, result = [value.type for value in node.inputs], node.outputs[0]
    if not has_kernel(result.type, kinds, target):
        return False
    size, rule, masks = FLOAT32.itemsize, op.attention, kinds[3:]
    factors = [
        converted(lowering, buffer, kind.shape, FLOAT32)
        for buffer, kind in zip(inputs[:3], kinds[:3], strict=True)
    ]  # fmt: skip
    back = tuple(map(op.out.index, range(result.rank)))
    shapes = [*(view.shape for view in op.views), tuple(result.shape[axis] for axis in back)]
    walks = [
        _walk(kind.shape, view.axes, view.starts)
        for kind, view in zip(kinds[:3], op.views, strict=True)
    ]  # fmt: skip
    walks.append(_walk(result.shape, back, (0,) * result.rank))
    lead, sizes = shapes[3][:-2], [size, size, size, result.dtype.itemsize]
    strides = [
        _spread(shape, steps, (*lead, *shape[-2:])) for shape, (steps, _) in zip(shapes, walks, strict=True)
    ]  # fmt: skip
    if masks:
        strides.append(broadcast_strides(masks[0].shape, (*lead, shapes[3][-2], shapes[1][-2])))
        sizes.append(masks[0].dtype.itemsize)
    access = inner_access(strides[4][-1]) if masks else ""
    axes = collapsed(lead, [steps[:-2] for steps in strides])
    (queries, depth), (keys, width) = shapes[0][-2:], shapes[2][-2:]
    tile = tile_shape(target, "float")
    widths = tuple(sorted({*tile_widths(keys, tile), *tile_widths(width, tile)}))
    mask = masks[0].dtype if masks else None
    weights = Rule(rule.scale, rule.causal, rule.fill, rule.zero_nan, mask, access)
    kernel = AttentionKernel(result.dtype, weights, widths, len(axes), caches())
    nbytes = _slot_nbytes(tile, keys, depth, width)
    scratch = lowering.buffer(FLOAT32, (thread_limit(), dims.floor_div(nbytes, size)))
    words: list[Word] = [
        Address(buffer, start * size) for buffer, (_, start) in zip(factors, walks[:3], strict=True)
    ]  # fmt: skip
    words += map(Address, (outputs[0], scratch, *inputs[3:]))
    words += [queries, keys, depth, width]
    words += [steps[-2] * own for steps, own in zip(strides[:4], sizes, strict=False)]
    words += [thread_limit(), nbytes]
    if masks:
        words += [strides[4][-2] * sizes[4], *[strides[4][-1] * sizes[4]] * (access == STRIDED)]
    words += [dims.product(extent for extent, _ in axes), *(extent for extent, _ in axes[1:])]
    words += [own[i] * sizes[i] for i in range(len(sizes)) for _, own in axes]
    lowering.emit(Native(kernel, tuple(words)), (*factors, *inputs[3:]), outputs, scratch=(scratch,))
    return True


def _walk(stored: Shape, axes: Perm, starts: Shape) -> tuple[Shape, Dim]:
    """(element strides of some axes of a contiguous tensor, the element that the starts are at)."""
    steps = contiguous_strides(stored)
    offset: Dim = sum((start * step for start, step in zip(starts, steps, strict=True)), 0)
    return tuple(steps[axis] for axis in axes), offset


def _spread(shape: Shape, steps: Shape, full: Shape) -> Shape:
    """Strides over the axes of `full`, 0 where the tensor is broadcast."""
    more = len(full) - len(shape)
    padded, strides = (1,) * more + shape, (0,) * more + steps
    return tuple(
        step if extent == whole else dims.many(extent) * step
        for extent, step, whole in zip(padded, strides, full, strict=True)
    )


def _slot_nbytes(shape: TileShape, keys: Dim, depth: Dim, width: Dim) -> Dim:
    """What a thread keeps: packed keys and values, the scores of a block of queries, and a factor for each."""
    row = packing.padded(keys, shape.lanes) * shape.nbytes
    tile = row * shape.rows
    scores = dims.maximum(tile, dims.minimum(tile * MOST_TILES, caches().l2 // 4))
    values = packing.padded(width, shape.lanes) * shape.nbytes * keys
    return row * depth + values + scores + MOST_TILES * shape.rows * shape.nbytes

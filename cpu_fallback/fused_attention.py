"""Attention as a native step: strides, scratch and which axes are heads."""

from __future__ import annotations

from cpu_fallback import packing
from cpu_fallback.attention import lower_attention
from cpu_fallback.attention_kernels import MOST_TILES, AttentionKernel
from cpu_fallback.caches import caches
from cpu_fallback.calls import Address, Native, Word
from cpu_fallback.gemm import converted
from cpu_fallback.lanes import is_supported
from cpu_fallback.loops import STRIDED
from cpu_fallback.maps import broadcast_strides, collapsed, contiguous_strides, inner_access
from cpu_fallback.native import Target, host
from cpu_fallback.product_calls import thread_limit, tile_widths
from cpu_fallback.tiles import TileShape, tile_shape
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, compute_dtype
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Attention
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]


def lower_fused_attention(
    lowering: Lowering, op: Attention, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:  # fmt: skip
    """Native attention where there is one, else NumPy's."""
    found = emit_attention(lowering, op, node, inputs, outputs, host())
    return found or lower_attention(lowering, op, node, inputs, outputs)


def emit_attention(
    lowering: Lowering, op: Attention, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append the steps of native attention; False if it has no native form."""
    kinds, result = [value.type for value in node.inputs], node.outputs[0]
    casts = [expr.cast(expr.arg(0, kind.dtype), FLOAT32) for kind in kinds] + [
        expr.cast(expr.arg(0, FLOAT32), result.dtype)
    ]
    if compute_dtype(result.dtype) != FLOAT32 or not all(is_supported(cast, target) for cast in casts):
        return False
    lead, size = result.shape[:-2], FLOAT32.itemsize
    factors = [
        converted(lowering, buffer, kind.shape, FLOAT32)
        for buffer, kind in zip(inputs[:3], kinds[:3], strict=True)
    ]  # fmt: skip
    strides = [broadcast_strides(kind.shape, (*lead, *kind.shape[-2:])) for kind in kinds[:3]]
    strides.append(contiguous_strides(result.shape))
    sizes = [size, size, size, result.dtype.itemsize]
    if masks := kinds[3:]:
        strides.append(broadcast_strides(masks[0].shape, (*lead, result.shape[-2], kinds[1].shape[-2])))
        sizes.append(masks[0].dtype.itemsize)
    access = inner_access(strides[4][-1]) if masks else ""
    axes = collapsed(lead, [steps[:-2] for steps in strides])
    queries, depth = kinds[0].shape[-2:]
    keys, width = kinds[2].shape[-2:]
    shape = tile_shape(target, "float")
    widths = tuple(sorted({*tile_widths(keys, shape), *tile_widths(width, shape)}))
    kernel = AttentionKernel(
        result.dtype, op.scale, op.causal, op.fill, op.zero_nan, masks[0].dtype if masks else None, access, widths,
        len(axes), caches(),
    )  # fmt: skip
    nbytes = _slot_nbytes(shape, keys, depth, width)
    scratch = lowering.buffer(FLOAT32, (thread_limit(), dims.floor_div(nbytes, size)))
    words: list[Word] = [Address(buffer) for buffer in (*factors, outputs[0], scratch, *inputs[3:])]
    words += [queries, keys, depth, width]
    words += [steps[-2] * nbytes for steps, nbytes in zip(strides[:4], sizes, strict=False)]
    words += [thread_limit(), nbytes]
    if masks:
        words += [strides[4][-2] * sizes[4], *[strides[4][-1] * sizes[4]] * (access == STRIDED)]
    words += [dims.product(extent for extent, _ in axes), *(extent for extent, _ in axes[1:])]
    words += [own[i] * sizes[i] for i in range(len(sizes)) for _, own in axes]
    lowering.emit(Native(kernel, tuple(words)), (*factors, *inputs[3:]), outputs, scratch=(scratch,))
    return True


def _slot_nbytes(shape: TileShape, keys: Dim, depth: Dim, width: Dim) -> Dim:
    """What a thread keeps: packed keys and values, the scores of a block of queries, and a factor for each."""
    row = packing.padded(keys, shape.lanes) * shape.nbytes
    tile = row * shape.rows
    scores = dims.maximum(tile, dims.minimum(tile * MOST_TILES, caches().l2 // 4))
    values = packing.padded(width, shape.lanes) * shape.nbytes * keys
    return row * depth + values + scores + MOST_TILES * shape.rows * shape.nbytes

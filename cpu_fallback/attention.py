"""Attention by blocks of heads whose scores fit the cache: BLAS products around an in-place softmax.

The door for a native kernel that never writes the scores out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BOOL, FLOAT32, FLOAT64
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Attention
from gpu_engine.plan.lower import Lowering

SCORES = 1 << 18
"""Elements of the scratch for scores: 1 MiB of float32."""


def lower_attention(
    lowering: Lowering, op: Attention, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    q, k = node.inputs[:2]
    if q.dtype not in (FLOAT32, FLOAT64):
        return False
    lead = dims.product(node.outputs[0].shape[:-2])
    scores = lead * q.shape[-2] * k.shape[-2]
    scratch = lowering.buffer(q.dtype, (dims.maximum(dims.minimum(scores, SCORES), k.shape[-2]),))
    lowering.emit(ArrayCall(attend, op), inputs, outputs, scratch=(scratch,))
    return True


def attend(op: Attention, inputs: Sequence[Array], outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
    """As many whole heads at a time as the scratch holds, or some rows of one."""
    out = outputs[0]
    if not out.size:
        return
    lead = (*(1,) * (3 - out.ndim), *out.shape[:-2])
    q, k, v, *masks = (np.broadcast_to(array, (*lead, *array.shape[-2:])) for array in inputs)
    out = out.reshape(*lead, *out.shape[-2:])
    rows, keys = q.shape[-2], k.shape[-2]
    if not keys:
        out[...] = 0
        return
    heads = max(1, scratch[0].size // (rows * keys))
    step = rows if heads > 1 else max(1, min(rows, scratch[0].size // keys))
    for outer in np.ndindex(*lead[:-1]):
        for first in range(0, lead[-1], heads):
            block = (*outer, slice(first, first + heads))
            for start in range(0, rows, step):
                part = slice(start, start + step)
                shown = masks[0][block] if masks else None
                if shown is not None and shown.shape[-2] != 1:
                    shown = shown[:, part]
                scores = _scores(op, q[block][:, part], k[block], shown, start, scratch[0])
                np.matmul(scores, v[block], out=out[block][:, part])


def _scores(op: Attention, q: Array, k: Array, mask: Array | None, start: int, scratch: Array) -> Array:
    """The weights of some rows of some heads, the first of which belongs to query `start`."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    scores = scratch[: math.prod(shape)].reshape(shape)
    np.matmul(q, k.swapaxes(-1, -2), out=scores)
    scores *= scores.dtype.type(op.scale)
    if mask is not None:
        if mask.dtype == BOOL:
            np.copyto(scores, scores.dtype.type(op.fill), where=~mask)
        else:
            scores += mask
    if op.causal:
        queries = np.arange(start, start + shape[1])[:, None]
        np.copyto(scores, scores.dtype.type(-math.inf), where=np.arange(shape[2]) > queries)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    if op.zero_nan:
        np.copyto(scores, 0, where=np.isnan(scores))
    return scores

"""Attention: softmax(scale * q k^T + mask) v without the score matrix as a tensor of the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.dtypes import BOOL, compute_dtype
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.pointwise import broadcast_shapes

BLOCK_NBYTES = 1 << 20


@dataclass(frozen=True)
class Attention:
    """q [..., S, D], k [..., T, D], v [..., T, E] and optionally mask [..., S, T] make [..., S, E].

    Leading axes broadcast. The score of query i and key j is `scale` times their product, plus the mask if that is
    floating. A boolean mask says which pairs attend: the others score `fill`. With `causal`, pairs with j > i score
    -inf after that. A row without any finite score is NaN, or counts as all zero weights with `zero_nan` (as every NaN
    weight then does). Scores and softmax are computed in at least float32.
    """

    scale: float
    causal: bool = False
    fill: float = -math.inf
    zero_nan: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        q, k, v, *masks = inputs
        if min(kind.rank for kind in (q, k, v)) < 2 or not q.dtype == k.dtype == v.dtype:
            raise InvalidModel(f"attention of {q}, {k} and {v}")
        for a, b, what in ((q.shape[-1], k.shape[-1], "features"), (k.shape[-2], v.shape[-2], "keys")):
            if isinstance(a, int) and isinstance(b, int) and a != b:
                raise InvalidModel(f"attention of {q}, {k} and {v}: {a} and {b} {what}")
        if any(mask.dtype not in (BOOL, q.dtype) for mask in masks):
            raise InvalidModel(f"attention of {q} with a mask {masks[0]}")
        scores = broadcast_shapes((*q.shape[:-2], 1, 1), *((*kind.shape[:-2], 1, 1) for kind in (k, v, *masks)))
        return (TensorType(q.dtype, (*scores[:-2], q.shape[-2], v.shape[-1])),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        q, k, v, *masks = arrays
        dtype, lead = q.dtype, np.broadcast_shapes(*(array.shape[:-2] for array in arrays))
        rows, keys = q.shape[-2], k.shape[-2]
        result = xp.empty((*lead, rows, v.shape[-1]), dtype)
        wide = compute_dtype(dtype)
        step = max(1, BLOCK_NBYTES // max(1, keys * wide.itemsize))
        mask = xp.broadcast_to(masks[0], (*masks[0].shape[:-2], rows, keys)) if masks else None
        with np.errstate(all="ignore"):
            for index in np.ndindex(*lead):
                one_q, one_k, one_v = (_block(array, index).astype(wide, copy=False) for array in (q, k, v))
                for start in range(0, rows, step):
                    part = slice(start, min(start + step, rows))
                    shown = None if mask is None else _block(mask, index)[part]
                    weights = self._weights(xp, xp.matmul(one_q[part], one_k.T), shown, start)
                    result[(*index, part)] = xp.matmul(weights, one_v).astype(dtype, copy=False)
        return (result,)

    def _weights(self, xp: Any, products: Any, mask: Any, start: int) -> Any:
        """The softmax of some rows of scores, the first of which belongs to query `start`."""
        scores = products * products.dtype.type(self.scale)
        if mask is not None:
            masked = mask.dtype == BOOL
            scores = xp.where(mask, scores, scores.dtype.type(self.fill)) if masked else scores + mask
        if self.causal:
            queries = xp.arange(start, start + scores.shape[0])[:, None]
            scores = xp.where(xp.arange(scores.shape[1]) <= queries, scores, -math.inf).astype(scores.dtype, copy=False)
        if not scores.size:
            return scores
        weights = xp.exp(scores - scores.max(axis=1, keepdims=True))
        weights = weights / weights.sum(axis=1, keepdims=True)
        return xp.where(xp.isnan(weights), weights.dtype.type(0), weights) if self.zero_nan else weights


def _block(array: Any, index: tuple[int, ...]) -> Any:
    """The matrix of `array` at an index of the broadcast leading axes."""
    own = array.shape[:-2]
    tail = index[len(index) - len(own) :]
    return array[tuple(0 if extent == 1 else i for i, extent in zip(tail, own, strict=True))]

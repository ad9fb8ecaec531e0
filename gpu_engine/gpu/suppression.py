"""NonMaxSuppression: a block for each row and class sorts the boxes by score, then drops those that the best overlap.

How many boxes stay is known when the kernel has run: a step over arrays gathers them into the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent
from typing import Any

import numpy as np

from gpu_engine.gpu.cuda_source import CudaText
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.sorting import SORT, rank_function
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT32, UINT8, UINT64
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops.array import Array
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
THREADS = 256
OPTIONAL = ("limit", "overlap", "least")
"""The optional operands: boxes of a class, greatest overlap, and the score that boxes must pass."""
CORNERS = (
    "box[0] < box[2] || box[0] != box[0] ? box[0] : box[2]", "box[1] < box[3] || box[1] != box[1] ? box[1] : box[3]",
    "box[0] > box[2] || box[0] != box[0] ? box[0] : box[2]", "box[1] > box[3] || box[1] != box[1] ? box[1] : box[3]",
)  # fmt: skip
CENTRED = (
    "__fsub_rn(box[0], box[2] / 2)", "__fsub_rn(box[1], box[3] / 2)",
    "__fadd_rn(box[0], box[2] / 2)", "__fadd_rn(box[1], box[3] / 2)",
)  # fmt: skip
OVERLAPS = """
    struct Box { float low[2], high[2], area; };
    __device__ __forceinline__ float side(const Box& a, const Box& b, int axis) {
      float low = a.low[axis] > b.low[axis] || a.low[axis] != a.low[axis] ? a.low[axis] : b.low[axis];
      float high = a.high[axis] < b.high[axis] || a.high[axis] != a.high[axis] ? a.high[axis] : b.high[axis];
      float length = __fsub_rn(high, low);
      return length < 0 ? 0 : length;
    }
    __device__ __forceinline__ bool overlaps(const Box& a, const Box& b, float most) {
      float both = __fmul_rn(side(a, b, 0), side(a, b, 1));
      float either = __fsub_rn(__fadd_rn(a.area, b.area), both);
      return both > 0 && a.area > 0 && b.area > 0 && either > 0 && __fdiv_rn(both, either) > most;
    }
"""


def lower_suppression(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    values = iter(zip(node.inputs, inputs, strict=True))
    (boxes, box_buffer), (scores, score_buffer), *rest = (next(values) if here else None for here in op.present)  # type: ignore[misc]
    given: dict[str, tuple[Value, int]] = {
        name: pair for name, pair in zip(OPTIONAL, rest, strict=False) if pair is not None
    }
    if "limit" not in given or boxes.dtype != FLOAT32 or scores.dtype != FLOAT32 or scores.rank != 3:
        return False
    (rows, classes, count), known = scores.shape, given["limit"][0].constant
    most: Dim = count if known is None else dims.minimum(count, max(0, int(known.ravel()[0])))
    blocks = rows * classes
    chosen = lowering.buffer(INT32, (rows, classes, most))
    counts = lowering.buffer(INT32, (rows, classes))
    scratch = tuple(lowering.buffer(kind, (blocks, count)) for kind in (UINT64, INT32, UINT8))
    text = CudaText(lowering, "suppression")
    operands = {name: f"{text.buffer(buffer)}[0]" for name, (_, buffer) in given.items()}
    text.lines(_ranked(text, box_buffer, score_buffer, (count, classes), scratch, operands.get("least")))
    text.lines(_suppressed(text, chosen, counts, most, operands["limit"], operands.get("overlap", "0.0f")))
    centred = bool(dict(op.attributes).get("center_point_box", 0))
    before = dedent(SORT) + dedent(rank_function(FLOAT32, True)) + dedent(OVERLAPS) + dedent(_box(centred))
    read = tuple(dict.fromkeys((box_buffer, score_buffer, *(buffer for _, buffer in given.values()))))
    text.launch([blocks], THREADS, read, (chosen, counts), scratch=scratch, before=before)
    lowering.emit(ArrayCall(collected, op), (chosen, counts), outputs, binds=op.binds)
    return True


def collected(xp: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """[found, 3] of row, class and box, from the boxes [rows, classes, most] and how many of them there are."""
    boxes, counts = inputs
    rows, classes, slots = xp.nonzero(xp.arange(boxes.shape[2]) < counts[:, :, None])
    return (xp.stack([rows, classes, boxes[rows, classes, slots]], axis=1).astype(np.int64, copy=False),)


def _box(centred: bool) -> str:
    corners = CENTRED if centred else CORNERS
    return f"""
        __device__ __forceinline__ Box box_at(const float* box) {{
          Box found = {{{{{corners[0]}, {corners[1]}}}, {{{corners[2]}, {corners[3]}}}, 0}};
          found.area = __fmul_rn(__fsub_rn(found.high[0], found.low[0]), __fsub_rn(found.high[1], found.low[1]));
          return found;
        }}"""


def _ranked(
    text: CudaText, boxes: int, scores: int, extents: tuple[Dim, Dim], scratch: Buffers, least: str | None
) -> str:
    """Lines that sort the `found` boxes whose score is great enough; NaN comes last."""
    count, classes = map(text.parameter, extents)
    ranks, places, dropped = (f"{text.buffer(part)} + (size_t)blockIdx.x * n" for part in scratch)
    return f"""
        __shared__ int taken;
        int n = {count}, lane = threadIdx.x % 32;
        const float* boxes = {text.buffer(boxes)} + (size_t)(blockIdx.x / {classes}) * n * 4;
        const float* scores = {text.buffer(scores)} + (size_t)blockIdx.x * n;
        Rank* ranks = {ranks}; int* places = {places}; unsigned char* dropped = {dropped};
        if (!threadIdx.x) taken = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += {THREADS}) {{
          float score = scores[i];
          {f"if (!(score > {least})) continue;" if least else ""}
          int slot = atomicAdd(&taken, 1);
          ranks[slot] = score != score ? ~0ull : rank_of(__float_as_int(score));
          places[slot] = i; dropped[slot] = 0;
        }}
        __syncthreads();
        int found = taken;
        sort(ranks, places, found);"""


def _suppressed(text: CudaText, chosen: int, counts: int, most: Dim, limit: str, overlap: str) -> str:
    """Lines that choose the best box that is left, time and again, and drop what overlaps it."""
    return f"""
        int limit = {limit} < found ? (int){limit} : found, kept = 0;
        float most = {overlap};
        for (int i = 0; i < found && kept < limit;) {{
          unsigned left = __ballot_sync(~0u, i + lane < found && !dropped[i + lane]);
          if (!left) {{ i += 32; continue; }}
          i += __ffs(left) - 1;
          int best = places[i++];
          if (!threadIdx.x) {text.buffer(chosen)}[blockIdx.x * {text.parameter(most)} + kept] = best;
          kept++;
          Box box = box_at(boxes + best * 4);
          for (int j = i + threadIdx.x; j < found; j += {THREADS})
            if (!dropped[j] && overlaps(box, box_at(boxes + places[j] * 4), most)) dropped[j] = 1;
          __syncthreads();
        }}
        if (!threadIdx.x) {text.buffer(counts)}[blockIdx.x] = kept;"""

"""Unique: one block sorts the elements, or the slices along an axis, numbers the groups of equal ones, and counts them.

How many groups there are is known when the kernel has run: a step over arrays takes their first elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

from gpu_engine.gpu.cuda_source import CudaText
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.sorting import BITS_TYPES, INFINITIES, SORT, SORTED, rank_function, sort_function
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT32, INT64, UINT64
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.selection import microsoft_unique
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
SMALL = 4096
"""Up to so many elements a block of 256 threads sorts, else one of 1024."""


@dataclass(frozen=True)
class Slices:
    """What is told apart: `count` slices of x along `axis`, whose elements lie `outer` times apart and `inner` side by
    side; elements, where there is no axis. In order of value, or of appearance; NaN is `equal` to NaN or to nothing."""

    x: Value
    axis: int | None
    ordered: bool
    equal: bool

    @property
    def count(self) -> Dim:
        return dims.product(self.x.shape) if self.axis is None else self.x.shape[self.axis]

    @property
    def beside(self) -> tuple[Dim, Dim]:
        assert self.axis is not None
        return dims.product(self.x.shape[: self.axis]), dims.product(self.x.shape[self.axis + 1 :])


def lower_unique(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, attributes = node.inputs[0], dict(op.attributes)
    if x.dtype not in SORTED:
        return False
    microsoft, axis = op.function is microsoft_unique, attributes.get("axis")
    along = int(axis) % x.rank if axis is not None and x.rank > 1 else None
    ordered = bool(attributes.get("sorted", 1)) and not microsoft
    slices = Slices(x, along, ordered, along is None and not microsoft)
    inverse = outputs[1 if microsoft else 2]
    first, counts, found = (lowering.buffer(INT64, (extent,)) for extent in (slices.count, slices.count, 1))
    _launch(lowering, slices, inputs[0], (first, counts, found, inverse))
    collect = appeared if microsoft else chosen
    results = tuple(buffer for buffer in outputs if buffer != inverse)
    lowering.emit(ArrayCall(collect, op), (inputs[0], first, counts, found), results, binds=op.binds)
    return True


def chosen(xp: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The first slice of every group, where it was, and how many there are."""
    x, first, counts, found = inputs
    axis, size = dict(op.attributes).get("axis"), int(found[0])
    slices = x.reshape(-1) if axis is None else x
    return xp.take(slices, first[:size], axis=0 if axis is None else axis), first[:size], counts[:size]


def appeared(xp: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """See `chosen`; without where they were."""
    values, _, counts = chosen(xp, op, inputs)
    return values, counts


def _launch(lowering: Lowering, slices: Slices, x: int, results: Buffers) -> None:
    count, ranked = slices.count, slices.axis is None
    threads = 256 if isinstance(count, int) and count <= SMALL else 1024
    text = CudaText(lowering, "unique")
    scratch = [lowering.buffer(INT32, (count,)) for _ in range(2 if slices.ordered else 4)]
    ranks = [lowering.buffer(UINT64, (count,))] * ranked
    places, begins, *more = map(text.buffer, scratch)
    text.lines(f"int n = {text.parameter(count)}; int* places = {places}; int* begins = {begins};")
    text.lines(_sorted(text, slices, x, ranks))
    text.lines(_grouped(text, slices, threads, results, more))
    before = [dedent(rank_function(slices.x.dtype, False)), _scan(threads)]
    before.insert(0, dedent(SORT) if ranked else "typedef unsigned long long Rank;")
    before += [] if ranked else [_slices(BITS_TYPES[slices.x.dtype.itemsize], slices.x.dtype in INFINITIES)]
    text.launch([1], threads, (x,), results, scratch=(*scratch, *ranks), before="\n".join(before))


def _sorted(text: CudaText, slices: Slices, x: int, ranks: Sequence[int]) -> str:
    """Lines that leave the numbers of the slices in `places`, in order, and define DIFFERS(i): from the one before."""
    bits = BITS_TYPES[slices.x.dtype.itemsize]
    if slices.axis is None:
        nan = f" || ranks[i] == ({bits})~0ull" if not slices.equal and slices.x.dtype in INFINITIES else ""
        return f"""
            const {bits}* x = (const {bits}*){text.buffer(x)};
            Rank* ranks = {text.buffer(ranks[0])};
            for (int i = threadIdx.x; i < n; i += blockDim.x) {{ ranks[i] = rank_of(x[i]); places[i] = i; }}
            __syncthreads();
            sort(ranks, places, n);
            auto differs = [=](int i) {{ return ranks[i] != ranks[i - 1]{nan}; }};"""
    outer, inner = map(text.parameter, slices.beside)
    return f"""
        Slices x = {{(const {bits}*){text.buffer(x)}, n, {outer}, {inner}}};
        for (int i = threadIdx.x; i < n; i += blockDim.x) places[i] = i;
        __syncthreads();
        sort(x, places, n);
        auto differs = [=](int i) {{ return compared(x, places[i - 1], places[i], true) != 0; }};"""


def _slices(bits: str, floating: bool) -> str:
    """Slices in the order of their first elements that differ; with `apart`, those with NaN are equal to nothing."""
    nan = f"if (apart && p == ({bits})~0ull) return 1;" if floating else ""
    return f"""
struct Slices {{ const {bits}* x; int n, outer, inner; }};
__device__ int compared(const Slices& s, int a, int b, bool apart) {{
  for (int o = 0; o < s.outer; o++)
    for (int i = 0; i < s.inner; i++) {{
      Rank p = rank_of(s.x[(o * s.n + a) * s.inner + i]), q = rank_of(s.x[(o * s.n + b) * s.inner + i]);
      if (p != q) return p < q ? -1 : 1;
      {nan}
    }}
  return 0;
}}
__device__ __forceinline__ void in_order(const Slices& s, int* places, int a, int b) {{
  int first = places[a], second = places[b], order = compared(s, first, second, false);
  if (order < 0 || (order == 0 && first < second)) return;
  places[a] = second; places[b] = first;
}}
{dedent(sort_function("const Slices& s, int* places", "s, places"))}"""


def _scan(threads: int) -> str:
    return f"""
// How many threads of the block before this one have the flag, and in `total` how many have it.
__device__ int flagged_before(bool flag, int& total) {{
  __shared__ int warps[{threads // 32}];
  int warp = threadIdx.x / 32;
  unsigned votes = __ballot_sync(~0u, flag);
  if (threadIdx.x % 32 == 0) warps[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << threadIdx.x % 32) - 1));
  total = 0;
  for (int w = 0; w < {threads // 32}; w++) {{
    before += w < warp ? warps[w] : 0;
    total += warps[w];
  }}
  __syncthreads();
  return before;
}}"""


def _grouped(text: CudaText, slices: Slices, threads: int, results: Buffers, more: Sequence[str]) -> str:
    """Lines that number the groups of equal slices and leave the results."""
    first, counts, found, inverse = map(text.buffer, results)
    early = first if slices.ordered else more[0]
    lines = f"""
        int found = 0, total;
        for (int start = 0; start < n; start += {threads}) {{
          int i = start + threadIdx.x;
          bool head = i < n && (!i || differs(i));
          int group = found + flagged_before(head, total) + head - 1;
          if (i < n) {inverse}[places[i]] = group;
          if (head) {early}[group] = places[i], begins[group] = i;
          found += total;
        }}
        __syncthreads();
        if (!threadIdx.x) {found}[0] = found;
        auto size = [=](int group) {{ return (group + 1 < found ? begins[group + 1] : n) - begins[group]; }};"""
    if slices.ordered:
        return f"{lines}\n        for (int g = threadIdx.x; g < found; g += {threads}) {counts}[g] = size(g);"
    return f"""{lines}
        int seen = 0; int* places_of = {more[1]};
        for (int start = 0; start < n; start += {threads}) {{
          int i = start + threadIdx.x, group = i < n ? {inverse}[i] : 0;
          bool opens = i < n && {early}[group] == i;
          int place = seen + flagged_before(opens, total);
          if (opens) {first}[place] = i, {counts}[place] = size(group), places_of[group] = place;
          seen += total;
        }}
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += {threads}) {inverse}[i] = places_of[{inverse}[i]];"""

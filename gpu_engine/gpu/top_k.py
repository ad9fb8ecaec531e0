"""TopK: a block for each row finds the rank of the last element that is taken, byte by byte, and sorts what is before.

A row is read once for each byte of its elements that the decision takes, and twice more.
"""

from __future__ import annotations

from textwrap import dedent

from gpu_engine.gpu.cuda_source import CudaText
from gpu_engine.gpu.sorting import BITS_TYPES, SORT, SORTED, rank_function
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT32, UINT64
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.array import Array
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
NEAR = 1024
"""So many elements are sorted in shared memory: 12 bytes for each."""


def lower_top_k(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    attributes, x = dict(op.attributes), node.inputs[0]
    if attributes["count"] is None or x.dtype not in SORTED:
        return False
    axis, count = int(attributes["axis"]), node.outputs[0].shape[int(attributes["axis"])]
    inner, rows = dims.product(x.shape[axis + 1 :]), dims.product(x.shape[:axis]) * dims.product(x.shape[axis + 1 :])
    near = isinstance(count, int) and count <= NEAR
    text = CudaText(lowering, "top_k")
    scratch: Buffers = ()
    ranks, places = "near_ranks", "near_places"
    if not near:
        scratch = (lowering.buffer(UINT64, (rows, count)), lowering.buffer(INT32, (rows, count)))
        ranks, places = (f"{text.buffer(part)} + (size_t)row * {text.parameter(count)}" for part in scratch)
    bits = BITS_TYPES[x.dtype.itemsize]
    text.lines(_taken(text, inputs[0], bits, x.dtype.itemsize, (x.shape[axis], inner, count), ranks, places, near))
    text.lines(f"""
        for (int s = threadIdx.x; s < k; s += blockDim.x) {{
          int to = (row / inner * {text.parameter(count)} + s) * inner + row % inner;
          (({bits}*){text.buffer(outputs[0])})[to] = x[places[s] * inner];
          {text.buffer(outputs[1])}[to] = places[s];
        }}""")
    before = dedent(SORT) + dedent(rank_function(x.dtype, bool(attributes["largest"])))
    text.launch([rows], _threads(x.shape[axis]), inputs[:1], outputs, scratch=scratch, before=before)
    return True


def _threads(extent: Dim) -> int:
    if isinstance(extent, int) and extent <= 64:
        return 32
    return 1024 if isinstance(extent, int) and extent >= 1 << 13 else 256


def _taken(
    text: CudaText, x: int, bits: str, nbytes: int, extents: tuple[Dim, Dim, Dim], ranks: str, places: str, near: bool
) -> str:
    """Lines that leave the row's k first elements in `ranks` and `places`, in order."""
    extent, inner, count = map(text.parameter, extents)
    room = f"__shared__ Rank near_ranks[{NEAR}]; __shared__ int near_places[{NEAR}];" if near else ""
    return f"""
        __shared__ unsigned counts[256], taken; {room}
        int row = blockIdx.x, n = {extent}, inner = {inner}, k = {count} < n ? {count} : n;
        const {bits}* x = (const {bits}*){text.buffer(x)} + row / inner * n * inner + row % inner;
        Rank* ranks = {ranks}; int* places = {places};
        Rank prefix = 0; unsigned place_prefix = 0, left = k; int level = 0;
        for (bool whole = k == n || !k; !whole; level++) {{
          for (int d = threadIdx.x; d < 256; d += blockDim.x) counts[d] = 0;
          __syncthreads();
          for (int i = threadIdx.x; i < n; i += blockDim.x) {{
            Rank rank = rank_of(x[i * inner]);
            if (level < {nbytes}) {{
              if (!level || rank >> 8 * ({nbytes} - level) == prefix)
                atomicAdd(&counts[rank >> 8 * ({nbytes - 1} - level) & 255], 1u);
            }} else if (rank == prefix && (level == {nbytes} || i >> 8 * ({nbytes + 4} - level) == place_prefix)) {{
              atomicAdd(&counts[i >> 8 * ({nbytes + 3} - level) & 255], 1u);
            }}
          }}
          __syncthreads();
          unsigned before = 0, digit = 0;
          while (before + counts[digit] < left) before += counts[digit++];
          left -= before;
          whole = counts[digit] == left;
          if (level < {nbytes}) prefix = prefix << 8 | digit; else place_prefix = place_prefix << 8 | digit;
          __syncthreads();
        }}
        if (!threadIdx.x) taken = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {{
          Rank rank = rank_of(x[i * inner]);
          bool chosen = !level ? k == n : level <= {nbytes} ? rank >> 8 * ({nbytes} - level) <= prefix
            : rank < prefix || (rank == prefix && i >> 8 * ({nbytes + 4} - level) <= place_prefix);
          if (chosen) {{ unsigned slot = atomicAdd(&taken, 1u); ranks[slot] = rank; places[slot] = i; }}
        }}
        __syncthreads();
        sort(ranks, places, k);"""

"""Text that CUDA C kernels share: elements as integers in the elements' order, and sorting by one block.

Every element has a rank, an unsigned integer, and of equal ranks the lower place comes first.
"""

from __future__ import annotations

from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
)

BITS_TYPES = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
INFINITIES = {FLOAT16: 0x7C00, BFLOAT16: 0x7F80, FLOAT32: 0x7F800000, FLOAT64: 0x7FF0000000000000}
"""The bits of infinity: those of NaN, without the sign, are greater."""
SIGNED, UNSIGNED = (INT8, INT16, INT32, INT64), (UINT8, UINT16, UINT32, UINT64, BOOL)
SORTED = (*INFINITIES, *SIGNED, *UNSIGNED)
"""What has an order that kernels know."""


def sort_function(parameters: str, arguments: str) -> str:
    """`sort(parameters, count)` for one block, by `in_order(arguments, a, b)`, which puts places a < b in order.

    A bitonic network that always puts the lesser first: places behind the end would hold the greatest, and stay.
    """
    return f"""
    __device__ void sort({parameters}, int count) {{
      for (int size = 2; size / 2 < count; size *= 2) {{
        for (int t = threadIdx.x; t < (count + size - 1) / size * (size / 2); t += blockDim.x) {{
          int first = t / (size / 2) * size, a = first + t % (size / 2), b = first + size - 1 - t % (size / 2);
          if (b < count) in_order({arguments}, a, b);
        }}
        __syncthreads();
        for (int gap = size / 4; gap > 0; gap /= 2) {{
          for (int t = threadIdx.x; t < (count + 2 * gap - 1) / (2 * gap) * gap; t += blockDim.x) {{
            int a = t / gap * 2 * gap + t % gap;
            if (a + gap < count) in_order({arguments}, a, a + gap);
          }}
          __syncthreads();
        }}
      }}
    }}
"""


SORT = f"""
    typedef unsigned long long Rank;
    __device__ __forceinline__ void in_order(Rank* ranks, int* places, int a, int b) {{
      if (ranks[a] < ranks[b] || (ranks[a] == ranks[b] && places[a] < places[b])) return;
      Rank rank = ranks[a]; ranks[a] = ranks[b]; ranks[b] = rank;
      int place = places[a]; places[a] = places[b]; places[b] = place;
    }}{sort_function("Rank* ranks, int* places", "ranks, places")}"""
"""Of equal ranks the lower place comes first."""


def rank_function(dtype: DType, largest: bool) -> str:
    """`Rank rank_of(bits)`: less for what comes first. NaN is greater than all numbers, and 0 equals -0."""
    bits, sign = BITS_TYPES[dtype.itemsize], f"0x{1 << 8 * dtype.itemsize - 1:x}ull"
    if dtype in INFINITIES:
        infinity = f"0x{INFINITIES[dtype]:x}ull"
        order = f"""
            Rank size = x & ~{sign};
            Rank order = size > {infinity} ? ({bits})~0ull : !size ? {sign} : x & {sign} ? ({bits})~x : x | {sign};"""
    else:
        order = f"Rank order = x{f' ^ {sign}' if dtype in SIGNED else ''};"
    result = f"({bits})~order" if largest else "order"
    return f"""
        __device__ __forceinline__ Rank rank_of({bits} bits) {{
          Rank x = bits;
          {order.strip()}
          return {result};
        }}"""

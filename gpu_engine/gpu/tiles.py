"""Configurations of tiled kernels, and which one a shape gets.

Starting points are those that PyTorch's inductor ships; `tile_filter` drops what does not fit a GPU. What one costs is
estimated from a GPU's data sheet; no number here was measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpu_engine.ir.dims import Dim


@dataclass(frozen=True)
class GemmTile:
    """A program computes [block_m, block_n] sums in steps of block_k; `group_m` tiles of rows pass over the same
    columns before the next ones, while these are in the L2 cache."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


GEMM_TILES: dict[str, tuple[GemmTile, ...]] = {
    "half": (
        GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 3), GemmTile(128, 64, 64, 4, 4),
        GemmTile(64, 128, 64, 4, 4), GemmTile(64, 64, 64, 4, 4), GemmTile(16, 128, 64, 4, 4),
        GemmTile(16, 64, 128, 4, 4),
    ),
    "converted": (
        GemmTile(128, 128, 64, 8, 3), GemmTile(128, 64, 32, 4, 4), GemmTile(64, 128, 32, 4, 4),
        GemmTile(64, 64, 32, 4, 4), GemmTile(16, 64, 64, 4, 4),
    ),
    "tf32": (
        GemmTile(128, 128, 32, 8, 4), GemmTile(128, 64, 32, 4, 4), GemmTile(64, 128, 32, 4, 4),
        GemmTile(64, 64, 32, 4, 4), GemmTile(16, 64, 64, 4, 4),
    ),
    "ieee": (
        GemmTile(128, 64, 16, 8, 3), GemmTile(64, 64, 16, 4, 3), GemmTile(64, 32, 32, 4, 3),
        GemmTile(32, 64, 32, 4, 3), GemmTile(16, 64, 32, 4, 4),
    ),
    "double": (GemmTile(64, 64, 16, 4, 3), GemmTile(32, 32, 16, 4, 3)),
    "bytes": (
        GemmTile(128, 128, 128, 8, 3), GemmTile(128, 64, 64, 4, 4), GemmTile(64, 64, 128, 4, 4),
        GemmTile(16, 64, 128, 4, 4),
    ),
    "planes": (GemmTile(64, 64, 64, 4, 3), GemmTile(16, 64, 64, 4, 3)),
    "sums": (
        GemmTile(16, 32, 4, 4, 3), GemmTile(4, 64, 8, 4, 3), GemmTile(1, 128, 32, 4, 3), GemmTile(1, 32, 64, 4, 3),
        GemmTile(32, 1, 64, 4, 3),
    ),
}  # fmt: skip
"""By how factors are multiplied: "half" in 16 bits, "converted" from float32 to these, "bytes" of 8 bits, "planes" of
16 bits as two bytes, "sums" without matrix instructions, the others as they say."""
SPLITS = (1, 2, 4, 8)
"""In how many parts what is summed over may be cut, each a program of its own."""


@dataclass(frozen=True)
class Gpu:
    """What a tile's cost is estimated from: multiprocessors; for each of these multiplications per second with 16 bits
    and without matrix instructions, registers, bytes of shared memory, bytes per second from L2; bytes per second from
    memory."""

    processors: int
    half_rate: float
    plain_rate: float
    shared_nbytes: int
    l2_rate: float
    memory_rate: float


GPUS = {
    80: Gpu(108, 1.4e12, 0.9e11, 163 << 10, 40e9, 1.5e12),
    90: Gpu(132, 3.7e12, 2.5e11, 227 << 10, 45e9, 4.3e12),
    100: Gpu(148, 7.5e12, 2.5e11, 227 << 10, 50e9, 7e12),
}
RATES = {"half": 1.0, "converted": 0.7, "tf32": 0.5, "bytes": 2.0, "planes": 0.6, "double": 0.03}
"""Multiplications relative to `half_rate`; what is not here has no matrix instructions."""
STEP_S, LAUNCH_S = 0.6e-6, 3e-6
"""Seconds from asking for a step's factors to having them; for one more launch."""


class Shape(NamedTuple):
    """Extents of a batched product, and the bytes of an element of its factors."""

    batch: int
    m: int
    n: int
    k: int
    nbytes: int


class Choice(NamedTuple):
    """A tile and its number of parts for least <= M < end; no end: None."""

    least: int
    end: int | None
    tile: GemmTile
    splits: int


RANGES = ((1, 17, 8), (17, 129, 96), (129, 1025, 512), (1025, 4097, 2048), (4097, None, 8192))
"""(least, end, one between) of a symbolic M that may get different tiles."""
TYPICAL = {"batch": 16, "n": 128, "k": 128}
"""What a symbolic extent is taken to be."""


def choose(
    family: str, batch: Dim, m: Dim, n: Dim, k: Dim, nbytes: int, arch: int, *, can_split: bool = True
) -> tuple[Choice, ...]:  # fmt: skip
    """The tiles for a product of GEMM_TILES' `family`: one, or one for each range of a symbolic M."""
    known = [extent if isinstance(extent, int) else None for extent in (batch, n, k)]
    b, columns, depth = (
        TYPICAL[name] if extent is None else max(extent, 1) for name, extent in zip(TYPICAL, known, strict=True)
    )
    gpu = GPUS[max(found for found in GPUS if found <= arch)]
    splits = SPLITS if can_split and isinstance(k, int) else (1,)

    def best(rows: int) -> tuple[GemmTile, int]:
        shape = Shape(b, max(rows, 1), columns, depth, nbytes)
        pairs = [(tile, parts) for tile in GEMM_TILES[family] for parts in splits]
        whole = [(tile, parts) for tile, parts in pairs if parts == 1 or 2 * parts * tile.block_k <= depth]
        return min(whole, key=lambda pair: _cost_s(family, pair[0], pair[1], shape, gpu))

    if isinstance(m, int):
        return (Choice(1, None, *best(m)),)
    if None in known:
        return (Choice(1, None, *best(128)),)
    return _merged([Choice(least, end, *best(typical)) for least, end, typical in RANGES])


def _merged(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    found = [choices[0]]
    for choice in choices[1:]:
        if choice[2:] == found[-1][2:]:
            found[-1] = found[-1]._replace(end=choice.end)
        else:
            found.append(choice)
    return tuple(found)


def _cost_s(family: str, tile: GemmTile, splits: int, shape: Shape, gpu: Gpu) -> float:
    """Seconds that a product takes, roughly."""
    m, n, threads = tile.block_m, tile.block_n, tile.num_warps * 32
    depth = -(-shape.k // (splits * tile.block_k)) * tile.block_k
    programs = shape.batch * -(-shape.m // m) * -(-shape.n // n) * splits
    turns = -(-programs // gpu.processors)
    staged = tile.num_stages * (m + n) * tile.block_k * shape.nbytes
    registers = threads * (m * n // threads + 64)
    resident = max(1, min(gpu.shared_nbytes // staged, 65536 // registers, 16))
    rate = gpu.half_rate * RATES[family] if family in RATES else gpu.plain_rate
    efficiency = m * n / (m * n + 32 * (m + n))
    multiply_s = turns * m * n * depth / (rate * efficiency)
    load_s = turns * (m + n) * depth * shape.nbytes / gpu.l2_rate
    wait_s = -(-turns // resident) * (depth / tile.block_k * STEP_S / max(1, tile.num_stages - 1) + 2 * STEP_S)
    once = shape.batch * (shape.m + shape.n) * shape.k * shape.nbytes
    partial = 8 * splits * shape.batch * shape.m * shape.n if splits > 1 else 0
    return max(multiply_s, load_s, wait_s, once / gpu.memory_rate) + partial / gpu.memory_rate + LAUNCH_S * (splits > 1)

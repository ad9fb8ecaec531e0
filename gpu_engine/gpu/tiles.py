"""Configurations of tiled kernels, and which one a shape gets.

Starting points are those that PyTorch's inductor ships; `tile_filter` drops what does not fit a GPU. The one that was
measured fastest for extents like a product's is taken where `tuned_tiles` has a table for the GPU; else what one costs
is estimated from a GPU's data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpu_engine.gpu import tuned_tiles
from gpu_engine.ir.dims import Dim, number


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


PERSISTENT = "persistent_"
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
    "float8": (
        GemmTile(128, 128, 128, 8, 3), GemmTile(128, 64, 64, 4, 4), GemmTile(64, 64, 128, 4, 4),
        GemmTile(16, 64, 128, 4, 4),
    ),
    "float8_half": (GemmTile(128, 64, 64, 4, 4), GemmTile(64, 64, 128, 4, 4), GemmTile(16, 64, 128, 4, 4)),
    "planes": (GemmTile(64, 64, 64, 4, 3), GemmTile(16, 64, 64, 4, 3)),
    "narrow": (
        GemmTile(128, 128, 64, 8, 3), GemmTile(64, 128, 64, 4, 3), GemmTile(64, 64, 64, 4, 4),
        GemmTile(16, 128, 128, 4, 3), GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 4, 4),
    ),
    "narrow_ieee": (GemmTile(32, 128, 16, 4, 3), GemmTile(16, 64, 32, 4, 4)),
    "sums": (
        GemmTile(16, 32, 4, 4, 3), GemmTile(4, 64, 8, 4, 3), GemmTile(1, 128, 32, 4, 3), GemmTile(1, 32, 64, 4, 3),
        GemmTile(32, 1, 64, 4, 3),
    ),
    f"{PERSISTENT}half": (
        GemmTile(128, 256, 64, 8, 4), GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 4),
    ),
    f"{PERSISTENT}converted": (GemmTile(128, 128, 64, 8, 3), GemmTile(128, 128, 32, 8, 4)),
    f"{PERSISTENT}tf32": (GemmTile(128, 256, 32, 8, 3), GemmTile(128, 128, 32, 8, 4)),
    f"{PERSISTENT}bytes": (GemmTile(128, 256, 128, 8, 3), GemmTile(128, 128, 128, 8, 4)),
}  # fmt: skip
"""By how factors are multiplied: "half" in 16 bits, "converted" from float32 to these, "bytes" and "float8" of 8 bits
("float8_half" as float16), "planes" of 16 bits as two bytes, "narrow" with weights that become numbers between load and
product, "sums" without matrix instructions, the others as they say; "persistent_...": the same by programs that walk
over tiles. "narrow_ieee" has fewer than 64 rows: from those on Triton 3.6 makes tf32 of float32 that is computed from
bytes, on sm_100."""
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
    86: Gpu(84, 0.9e12, 2.3e11, 99 << 10, 30e9, 0.9e12),
    90: Gpu(132, 3.7e12, 2.5e11, 227 << 10, 45e9, 4.3e12),
    100: Gpu(148, 7.5e12, 2.5e11, 227 << 10, 50e9, 7e12),
    120: Gpu(170, 1.2e12, 3e11, 99 << 10, 40e9, 1.7e12),
}
RATES = {
    "half": 1.0,
    "narrow": 0.5,
    "converted": 0.7,
    "tf32": 0.5,
    "bytes": 2.0,
    "float8": 2.0,
    "float8_half": 0.7,
    "planes": 0.6,
    "double": 0.03,
}
"""Multiplications relative to `half_rate`; what is not here has no matrix instructions."""
LEAST_PERSISTENT = 1 << 31
"""Multiplications of a product from which on making descriptors, about 1 us, is little beside it. Estimated."""
PERSISTENT_GAIN = 1.13
"""How much faster than others such programs are. From Triton's pull request 5461: here nobody has measured it."""
PERSISTENT_ARCHITECTURES = {
    "half": range(90, 120), "converted": range(90, 120), "tf32": range(90, 120), "bytes": range(90, 100),
}  # fmt: skip
"""Where Triton has TMA, and matrix instructions of the family that read shared memory."""
STEP_S = 0.6e-6
"""Seconds from asking for a step's factors to having them."""
NEAR = 1.2
"""Costs apart by less than this factor are taken as equal, since the estimate knows no better: of these tiles the one
that the table names last is chosen, so that layers share kernels, and a small one, which computes least in vain."""
LIGHT_SUMS = 64
"""Sums of a thread that registers hold beside as many parts, or an expression that needs many of its own."""


class Extents(NamedTuple):
    """Of a batched product, and the bytes of an element of its factors."""

    batch: Dim
    m: Dim
    n: Dim
    k: Dim
    nbytes: int


class Sizes(NamedTuple):
    """Extents that are known, or guessed."""

    batch: int
    m: int
    n: int
    k: int
    nbytes: int


class Choice(NamedTuple):
    """A tile and its number of parts for least <= M < end; no end: None. `persistent`: programs walk over tiles."""

    least: int
    end: int | None
    tile: GemmTile
    splits: int
    persistent: bool = False


class Epilogue(NamedTuple):
    """What the epilogue of programs that walk over tiles takes: bytes of shared memory for each point of half a tile
    that wait there for it or for their store, and whether it needs many registers."""

    nbytes: int
    heavy: bool


RANGES = ((1, 17, 8), (17, 129, 96), (129, 1025, 512), (1025, 4097, 2048), (4097, None, 8192))
"""(least, end, one between) of a symbolic M that may get different tiles."""
TYPICAL = Extents(16, 128, 128, 128, 0)
"""What a symbolic extent is taken to be."""


def gpu_of(arch: int) -> Gpu:
    """What is known of the GPUs of an architecture, or of the one before it."""
    return GPUS[max(found for found in GPUS if found <= arch)]


def processors(arch: int) -> int:
    """How many multiprocessors GPUs of an architecture have, about."""
    return gpu_of(arch).processors


def choose(
    family: str,
    extents: Extents,
    arch: int,
    *,
    heavy: bool = False,
    kind: str = "gemm",
    persistent: Epilogue | None = None,
    fit: Callable[[GemmTile], GemmTile] = lambda tile: tile,
) -> tuple[Choice, ...]:
    """The tiles for a product of GEMM_TILES' `family`: one, or one for each range of a symbolic M.

    `heavy`: the epilogue needs many registers. `kind` is "gemm", or "conv" where factors are gathered from windows.
    `persistent`: what an epilogue takes where programs may walk over tiles. `fit` gives tiles the form that a kernel
    takes.
    """
    gpu = gpu_of(arch)
    tiles = list(map(fit, candidates(family, extents.nbytes, arch, heavy=heavy)))
    lasting: list[GemmTile] = []
    if persistent is not None and arch in PERSISTENT_ARCHITECTURES.get(family, ()):
        walked, waiting = PERSISTENT + family, persistent.nbytes
        lasting = candidates(walked, extents.nbytes, arch, heavy=persistent.heavy, waiting_nbytes=waiting)

    def best(extents: Extents) -> tuple[GemmTile, int, bool]:
        measured = _measured(family, tiles, extents, arch, kind)
        return (*measured, False) if measured else _best(family, tiles, lasting, extents, gpu)

    others = (extents.batch, extents.n, extents.k)
    if isinstance(extents.m, int) or not all(isinstance(extent, int) for extent in others):
        return (Choice(1, None, *best(extents)),)
    return _merged([Choice(least, end, *best(extents._replace(m=typical))) for least, end, typical in RANGES])


def candidates(
    family: str, nbytes: int, arch: int, *, heavy: bool = False, waiting_nbytes: int = 0
) -> list[GemmTile]:  # fmt: skip
    """The tiles of a family that a GPU has the shared memory for, also for half a tile of points with
    `waiting_nbytes` each; if `heavy`, with registers left for an epilogue."""
    limit = gpu_of(arch).shared_nbytes
    second = 2 if family == f"{PERSISTENT}converted" else nbytes
    return [
        tile
        for tile in GEMM_TILES[family]
        if _staged_nbytes(tile, nbytes, second) + tile.block_m * tile.block_n * waiting_nbytes // 2 <= limit
        and not (heavy and not is_light(tile))
    ]


def is_light(tile: GemmTile) -> bool:
    """Whether registers are left beside a tile's sums."""
    return tile.block_m * tile.block_n <= LIGHT_SUMS * tile.num_warps * 32


def takes_parts(family: str, tile: GemmTile) -> bool:
    """Whether registers hold parts beside a tile's sums; those of float64 spill."""
    return family != "double" and is_light(tile)


def _measured(
    family: str, tiles: Sequence[GemmTile], extents: Extents, arch: int, kind: str
) -> tuple[GemmTile, int] | None:  # fmt: skip
    """What was fastest for extents like these on a GPU of this architecture, if it is among `tiles` still and k has
    steps enough for its parts."""
    known = [
        extent if isinstance(extent, int) else number(typical) for extent, typical in zip(extents, TYPICAL, strict=True)
    ]
    found = tuned_tiles.nearest(tuned_tiles.records(arch, tuned_tiles.FOLDER), family, kind, extents.nbytes, known[:4])
    fitting = ((GemmTile(*record.tile), record.splits) for record in found)
    deep = extents.k if isinstance(extents.k, int) else 0
    return next(
        (
            (tile, splits)
            for tile, splits in fitting
            if tile in tiles and (splits == 1 or 2 * splits * tile.block_k <= deep)
        ),
        None,
    )


def _best(
    family: str, tiles: Sequence[GemmTile], lasting: Sequence[GemmTile], extents: Extents, gpu: Gpu
) -> tuple[GemmTile, int, bool]:  # fmt: skip
    """The last tile, and the fewest parts of k, that cost nearly the least, and whether it is one of `lasting`, for
    programs that walk over tiles: large products alone are so."""
    values = [
        max(extent, 1) if isinstance(extent, int) else typical
        for extent, typical in zip(extents, TYPICAL, strict=True)
    ]  # fmt: skip
    sizes = Sizes(*map(number, values))
    pairs = [
        (tile, parts)
        for tile in reversed(tiles)
        for parts in (SPLITS if isinstance(extents.k, int) else (1,))
        if parts == 1 or (takes_parts(family, tile) and _may_split(tile, parts, sizes, gpu))
    ]
    costs = [_cost_s(family, tile, parts, sizes, gpu) for tile, parts in pairs]
    least_s = min(costs)
    found = next((*pair, False) for pair, cost in zip(pairs, costs, strict=True) if cost <= NEAR * least_s)
    large = sizes.batch * sizes.m * sizes.n * sizes.k >= LEAST_PERSISTENT
    for walked in lasting:
        cost_s = _cost_s(family, walked, 1, sizes, gpu) / PERSISTENT_GAIN
        if large and 2 * _programs(walked, sizes) > gpu.processors and cost_s < least_s:
            least_s, found = cost_s, (walked, 1, True)
    return found


def _may_split(tile: GemmTile, parts: int, sizes: Sizes, gpu: Gpu) -> bool:
    """Whether there is work for the parts, and room on a GPU that tiles alone do not fill."""
    return 2 * parts * tile.block_k <= sizes.k and _programs(tile, sizes) < gpu.processors


def _merged(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    found = [choices[0]]
    for choice in choices[1:]:
        if choice[2:] == found[-1][2:]:
            found[-1] = found[-1]._replace(end=choice.end)
        else:
            found.append(choice)
    return tuple(found)


def _programs(tile: GemmTile, sizes: Sizes) -> int:
    return sizes.batch * -(-sizes.m // tile.block_m) * -(-sizes.n // tile.block_n)


def _staged_nbytes(tile: GemmTile, first: int, second: int) -> int:
    """Bytes of shared memory that the factors of all stages take, whose elements have so many."""
    return tile.num_stages * tile.block_k * (tile.block_m * first + tile.block_n * second)


def _cost_s(family: str, tile: GemmTile, splits: int, sizes: Sizes, gpu: Gpu) -> float:
    """Seconds that a product takes, roughly. Of a tile in parts the last program waits for the counter, then reads all
    while most others have ended."""
    m, n, threads = tile.block_m, tile.block_n, tile.num_warps * 32
    depth = -(-sizes.k // (splits * tile.block_k)) * tile.block_k
    turns = -(-_programs(tile, sizes) * splits // gpu.processors)
    registers = threads * (m * n // threads + 64)
    resident = max(
        1, min(gpu.shared_nbytes // _staged_nbytes(tile, sizes.nbytes, sizes.nbytes), 65536 // registers, 16)
    )
    rate = gpu.half_rate * RATES[family] if family in RATES else gpu.plain_rate
    efficiency = m * n / (m * n + 32 * (m + n))
    multiply_s = turns * m * n * depth / (rate * efficiency)
    load_s = turns * (m + n) * depth * sizes.nbytes / gpu.l2_rate
    wait_s = -(-turns // resident) * (depth / tile.block_k * STEP_S / max(1, tile.num_stages - 1) + 2 * STEP_S)
    once = sizes.batch * (sizes.m + sizes.n) * sizes.k * sizes.nbytes
    tail_s = 2 * STEP_S + 4 * m * n * (splits + 1) / (2 * gpu.l2_rate) if splits > 1 else 0
    return max(multiply_s, load_s, wait_s, once / gpu.memory_rate) + tail_s

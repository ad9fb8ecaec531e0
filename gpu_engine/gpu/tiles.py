"""Configurations of tiled kernels, and which one a shape gets.

Starting points are those that PyTorch's inductor ships; `tile_filter` drops what does not fit a GPU, no number here
was measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass


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

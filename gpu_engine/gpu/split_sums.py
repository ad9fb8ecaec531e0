"""Sums that several programs share: each adds up a part of a tile, and the last one to arrive adds up the parts.

A program keeps its part in memory and counts itself in its tile's counter; the one that finds all others counted reads
every part, its own too, in the same order whoever comes last, so the bits of a result never vary. It leaves the counter
at zero for the next launch.

What orders the memory: `tl.debug_barrier` puts the stores of a program's threads before the one thread that counts;
"acq_rel" at the scope of the GPU (in PTX `atom.global.gpu.acq_rel`, around it MEMBAR and CCTL.IVALL) publishes them,
and makes those of the programs that were counted before visible. Parts are loaded from L2 (`.cg`): nothing that the L1
cache of this multiprocessor kept from an earlier launch in the same memory may answer, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpu_engine.gpu.text import KernelText
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import INT32, DType
from gpu_engine.plan.lower import Lowering


@contextmanager
def last_part(text: KernelText, parts: int, counters: int, block: tuple[int, int], mask: str | None) -> Iterator[None]:
    """Lines for programs (tile, part) whose `sums` of extents `block` are a part; those written inside find the whole
    in `sums`. Lanes outside `mask` hold garbage: they are stored too, since keeping the mask until then takes registers
    that are scarce before. The buffers are those that `shared_buffers` made."""
    tail = "" if mask is None else f", mask={mask}"
    height, width = block
    text.line(f"lanes = tl.arange(0, {height})[:, None] * {width} + tl.arange(0, {width})[None, :]")
    text.line(f"part = {text.buffer(parts)} + tl.program_id(0) * (tl.num_programs(1) * {height * width}) + lanes")
    text.line(f"counter = {text.buffer(counters)} + tl.program_id(0)")
    text.line(f"tl.store(part + tl.program_id(1) * {height * width}, sums)")
    text.line("tl.debug_barrier()")
    text.line('arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")')
    with text.block("if arrived == tl.num_programs(1) - 1:"):
        text.line(f'sums = tl.load(part{tail}, cache_modifier=".cg")')
        with text.block("for i in range(1, tl.num_programs(1)):"):
            text.line(f'sums += tl.load(part + i * {height * width}{tail}, cache_modifier=".cg")')
        yield
        text.line("tl.store(counter, 0)")


def shared_buffers(
    lowering: Lowering, dtype: DType, tiles: Dim, splits: int, block: tuple[int, int]
) -> tuple[int, int]:
    """(parts of every tile, counters): scratch of the launch, of which the second is `zeroed`."""
    return lowering.buffer(dtype, (tiles, splits, *block)), lowering.buffer(INT32, (tiles,))

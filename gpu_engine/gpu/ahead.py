"""Compiling the kernels of a plan side by side, before they are loaded one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from gpu_engine.gpu.binary import Binary, BinarySource
from gpu_engine.gpu.kernel import Kernel


def compiled_ahead(kernels: Sequence[Kernel], arch: int, source: BinarySource) -> BinarySource:
    """A source that has these kernels already and asks `source` for others; raises what `source` raises.

    Triton lets go of the GIL for about half of its work, and ptxas is a process of its own.
    """
    wanted = tuple(dict.fromkeys(kernels))
    if not wanted:
        return source
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as threads:
        found: dict[Kernel, Binary] = dict(zip(wanted, threads.map(source, wanted, repeat(arch)), strict=True))

    def known(kernel: Kernel, other_arch: int) -> Binary:
        return found[kernel] if kernel in found and other_arch == arch else source(kernel, other_arch)

    return known

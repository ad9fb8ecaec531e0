"""The heap of Python's objects while latencies are measured, as a server has it that is about to serve."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What exists by now is left out of garbage collections until the end.

    A full one walks over every object of the process while all threads stand still: 20 to 60 ms for what a few imports
    and one compiled model are, which is the tail of the latency of a model that takes less than a millisecond.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

"""Memory of the device that callers hold: lent for one result, and used again once nobody reads or writes it.

CuPy's pools are per stream and do not know who else reads an array (https://github.com/cupy/cupy/issues/8068). Here
every stream that writes or may read a block is remembered: when the last reference is gone, events are recorded there,
and whoever gets the block next waits for them on its own stream. No thread ever does.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import OutOfMemory
from gpu_engine.gpu.driver import Driver, Memory
from gpu_engine.ir.dtypes import DType
from gpu_engine.runtime.dlpack import LEGACY_STREAM, PER_THREAD_STREAM

_LOGGER = logging.getLogger(__name__)
LEAST_NBYTES = 256
GRAINS = 4
"""Significant bits of the size of a block: results of nearly one size share blocks."""


class Block:
    """Memory with a signal for every stream that ever used it; `used` are the streams of the last loan."""

    __slots__ = ("memory", "signals", "used")

    def __init__(self, memory: Memory) -> None:
        self.memory, self.signals = memory, dict[int, Any]()
        self.used: set[int] = set()


class Lent:
    """See `device_tensors.Loan`. `after` is what the first to write it waits for.

    The block is the lender's until the end, which no `__del__` sees: in a cycle of garbage those of its events would
    have been called, too, and have destroyed them.
    """

    __slots__ = ("__weakref__", "_block", "_lender", "_readers", "_writers", "after")

    def __init__(self, block: Block, lender: Lender) -> None:
        self._block, self._lender = block, lender
        self._readers, self._writers = set[int](), set[int]()
        self.after = [block.signals[stream] for stream in block.used]
        weakref.finalize(self, lender.take_back, block, self._readers, self._writers).atexit = False

    @property
    def address(self) -> int:
        return self._block.memory.address

    def read_by(self, stream: int) -> None:
        """See `device_tensors.Loan`. The stream of each thread waits for the legacy default stream, and it for them."""
        self._readers.add(LEGACY_STREAM if stream == PER_THREAD_STREAM else stream)

    def written_by(self, driver: Driver) -> None:
        """What a slot's stream was given so far writes the memory."""
        signal = self._lender.signal(self._block, id(driver))
        driver.record(signal)
        self._writers.add(id(driver))

    def download(self, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
        """See `device_tensors.Loan`."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._lender.driver.read(self.address, nbytes).view(dtype).reshape(shape)


class Lender:
    """Blocks of a device, by size. Keeps no more of them idle than were ever lent at a time."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.returned: deque[Block] = deque()
        self._idle: dict[int, deque[Block]] = {}
        self._lent_nbytes = self._idle_nbytes = self._most_nbytes = 0
        self._lock = threading.Lock()

    def lend(self, nbytes: int) -> Lent:
        """At least so many bytes, aligned to 256; inside `driver.active()`. OutOfMemory."""
        grain = max(LEAST_NBYTES, 1 << max(nbytes.bit_length() - GRAINS, 0))
        size = -(-max(nbytes, 1) // grain) * grain
        with self._lock:
            self._sort()
            found = self._idle.get(size)
            if found:
                block = found.popleft()
                self._idle_nbytes -= size
            else:
                block = Block(self._allocated(size))
            self._lent_nbytes += size
            self._most_nbytes = max(self._most_nbytes, self._lent_nbytes)
            return Lent(block, self)

    def signal(self, block: Block, stream: int) -> Any:
        """The block's own signal for a stream."""
        found = block.signals.get(stream)
        if found is None:
            found = block.signals[stream] = self.driver.signal()
        return found

    def take_back(self, block: Block, readers: set[int], writers: set[int]) -> None:
        """Nobody holds the block any more. The garbage collector calls this anywhere: nothing is waited for, and no
        lock taken."""
        try:
            for stream in readers:
                self.driver.record(self.signal(block, stream), stream)
        except Exception as error:
            # The memory is freed, for which CUDA waits until the device is idle.
            _LOGGER.debug("a result's memory is not used again: %s", error)
            return
        block.used = readers | writers
        self.returned.append(block)

    def _sort(self) -> None:
        """Put what came back to its like; the lock is held."""
        while self.returned:
            block = self.returned.popleft()
            size = block.memory.nbytes
            self._lent_nbytes -= size
            if self._idle_nbytes + size <= self._most_nbytes:
                self._idle.setdefault(size, deque()).append(block)
                self._idle_nbytes += size

    def _allocated(self, nbytes: int) -> Memory:
        try:
            return self.driver.allocate(nbytes)
        except OutOfMemory:
            if not self._idle_nbytes:
                raise
            self._idle.clear()
            self._idle_nbytes = 0
            return self.driver.allocate(nbytes)

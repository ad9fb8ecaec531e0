"""Memory of a slot with fixed addresses: pieces that grow on demand, and the host's memory that mirrors them."""

from __future__ import annotations

import numpy as np

from gpu_engine.gpu.driver import Driver, HostArray, Memory


class Area:
    """A piece of device memory that grows on demand. With `zeroed` it starts full of zeros."""

    def __init__(self, driver: Driver, *, zeroed: bool = False) -> None:
        self._driver, self._zeroed = driver, zeroed
        self.memory = driver.allocate(0)
        self._staged: HostArray | None = None

    def reserve(self, nbytes: int) -> Memory:
        """At least `nbytes`; where that is more than before it lies elsewhere, and what there was is given up first."""
        if nbytes > self.memory.nbytes:
            self._staged, self.memory = None, self._driver.allocate(0)
            self.memory = self._driver.allocate(nbytes)
            self.clear()
        return self.memory

    def staged(self) -> HostArray:
        """As many bytes of the host, to copy from and to; the same until the area grows."""
        if self._staged is None:
            self._staged = self._driver.staging(self.memory.nbytes)
        return self._staged

    def clear(self) -> None:
        """Fill what has to be full of zeros."""
        if self._zeroed and self.memory.nbytes:
            zeros = np.zeros(self.memory.nbytes, np.uint8)
            self._driver.upload(self._driver.array(self.memory, 0, zeros.shape, zeros.dtype), zeros)

"""A GPU's driver and its clock; CuPy is imported with this module."""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np

from gpu_engine.gpu.cuda import CudaDevice, CudaDriver
from gpu_engine.gpu.offline import compile_binary


class Gpu:
    """The GPU number `ordinal`; DeviceError with the reason if it cannot be used."""

    def __init__(self, ordinal: int = 0) -> None:
        device = CudaDevice(ordinal, source=compile_binary)
        self.arch, self.name = device.arch, device.reason.rpartition(",")[0]
        self.driver = CudaDriver(ordinal, self.arch, compile_binary)
        with self.driver.active():
            self.timer = ColdTimer(ordinal)


class ColdTimer:
    """Seconds by CUDA events on the current stream; a write as large as twice the L2 cache goes before."""

    def __init__(self, ordinal: int) -> None:
        nbytes = 2 * int(cupy.cuda.runtime.getDeviceProperties(ordinal)["l2CacheSize"])
        self._flush = cupy.empty(nbytes, np.uint8)
        self._first, self._last = cupy.cuda.Event(), cupy.cuda.Event()

    def __call__(self, run: Callable[[], None]) -> float:
        self._flush.fill(0)
        self._first.record()
        run()
        self._last.record()
        self._last.synchronize()
        return float(cupy.cuda.get_elapsed_time(self._first, self._last)) / 1e3

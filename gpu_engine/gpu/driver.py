"""What a GPU's memory, arrays and launches are: the only things in which CUDA and the interpreter differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_engine.gpu.kernel import TritonKernel
from gpu_engine.ir.dtypes import DType

HostArray = NDArray[Any]
Piece = tuple[int, int]
"""(address, bytes)"""


class Memory(Protocol):
    """Bytes of the device, freed when nothing holds them any more."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Driver(Protocol):
    """One device, as slots use it. Launches and copies happen in the order of the calls."""

    @property
    def xp(self) -> Any:
        """The module of the device's arrays."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Uninitialised bytes, aligned to 256; OutOfMemory."""
        ...

    def array(self, memory: Any, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """A C-contiguous array of the device over a part of its memory."""
        ...

    def upload(self, target: Any, source: HostArray) -> None:
        """Copy into an array of the device."""
        ...

    def download(self, source: Any) -> HostArray:
        """A copy in the host's memory, complete on return."""
        ...

    def load(self, kernel: TritonKernel) -> Any:
        """The kernel ready to launch on this device."""
        ...

    def launch(
        self, loaded: Any, grid: tuple[int, int, int], words: Sequence[int], reads: list[Piece], writes: list[Piece]
    ) -> None:
        """Start a kernel. `reads` and `writes` are the memory that its step declares."""
        ...

    def discard(self, piece: Piece) -> None:
        """What lies here is not needed any more."""
        ...

    def finish(self) -> None:
        """Wait for everything that was started; its error, if it had one."""
        ...


def host_array(shape: tuple[int, ...], dtype: DType) -> HostArray:
    """Room for what goes to a device or comes from it; strings start empty."""
    return np.full(shape, "", object) if dtype.hasobject else np.empty(shape, dtype)

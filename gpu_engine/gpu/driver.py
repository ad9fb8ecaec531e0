"""What a GPU's memory, arrays and launches are: the only things in which CUDA and the interpreter differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_engine.gpu.kernel import Kernel
from gpu_engine.ir.dtypes import DType
from gpu_engine.plan.zones import Ints

HostArray = NDArray[Any]
Piece = tuple[int, int]
"""(address, bytes)"""
Pieces = Sequence[Piece]


class Touched(NamedTuple):
    """The memory that a step declares to read and to write; what of it holds zeros before and after the step."""

    reads: Pieces
    writes: Pieces
    zeroed: Pieces = ()


class Memory(Protocol):
    """Bytes of the device, freed when nothing holds them any more."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Copy(NamedTuple):
    """Bytes between the host's memory, of `Driver.staging`, and the device's."""

    host: int
    device: int
    nbytes: int


class Passage(Protocol):
    """How what one slot takes and gives travels, beside what its stream computes.

    One batch at a time: after `fetch` nothing is sent until `wait` has returned or `Driver.finish` was called.
    """

    def send(self, copies: Sequence[Copy]) -> None:
        """Start to copy to the device. What the stream is given afterwards finds it there."""
        ...

    def fetch(self, copies: Sequence[Copy]) -> None:
        """Start to copy to the host what comes of all that the stream was given so far."""
        ...

    def wait(self) -> None:
        """Sleep until all that `fetch` started is there; raises what went wrong on the device."""
        ...


Replay = Callable[[], None]


class Driver(Protocol):
    """One stream of a device, as its slots use it. Launches and copies happen in the order of the calls, but those of
    passages."""

    @property
    def xp(self) -> Any:
        """The module of the device's arrays."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Uninitialised bytes, aligned to 256; OutOfMemory."""
        ...

    def enter(self) -> None:
        """Called once by a thread that will use the device for long."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """What a thread does with the device happens inside."""
        ...

    def array(self, memory: Any, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """A C-contiguous array of the device over a part of its memory; unsigned integers of its width where the
        device's array module does not know the dtype."""
        ...

    def staging(self, nbytes: int) -> HostArray:
        """Uninitialised bytes of the host that passages reach, aligned to 256; OutOfMemory."""
        ...

    def passage(self) -> Passage:
        """One for each slot."""
        ...

    def upload(self, target: Any, source: HostArray) -> None:
        """Copy into an array of the device."""
        ...

    def download(self, source: Any, dtype: DType) -> HostArray:
        """A copy in the host's memory as `dtype`, complete on return."""
        ...

    def load(self, kernel: Kernel) -> Any:
        """The kernel ready to launch on this device."""
        ...

    def pack(self, loaded: Any, words: Ints, grid: tuple[int, int, int]) -> Any:
        """The parameters of a launch, from 8 bytes for each argument, which stay where they are."""
        ...

    def launch(self, loaded: Any, grid: tuple[int, int, int], packed: Any, touched: Callable[[], Touched]) -> None:
        """Start a kernel. `touched` gives the memory that its step declares, if asked."""
        ...

    @property
    def captures(self) -> bool:
        """Whether `capture` is worth calling."""
        ...

    def capture(self, start: Callable[[], object]) -> Replay:
        """One call that launches what `start` launches, which does nothing else and launched it before. Nothing runs
        meanwhile. Raises what the device raises; the stream is as it was."""
        ...

    def discard(self, piece: Piece) -> None:
        """What lies here is not needed any more."""
        ...

    def mark(self) -> Any:
        """A point behind everything that was started."""
        ...

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """From the first mark to each, once everything before them has finished."""
        ...

    def finish(self) -> None:
        """Wait for everything that was started, passages too; its error, if it had one."""
        ...


def host_array(shape: tuple[int, ...], dtype: DType) -> HostArray:
    """Room for what goes to a device or comes from it; strings start empty."""
    return np.full(shape, "", object) if dtype.hasobject else np.empty(shape, dtype)

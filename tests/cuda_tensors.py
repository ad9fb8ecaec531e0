"""Tensors that other libraries have on a recorded GPU, and what these libraries do with their streams."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_engine.ir.dtypes import DType
from gpu_engine.runtime.dlpack import CUDA, Exported, capsule, exported, on_host
from tests.recording_cuda import Gpu

WORK_S = 1e-3


class Library:
    """A library with a stream of its own; `stream` is its handle."""

    def __init__(self, gpu: Gpu, stream: int | None = None, device: int = 0) -> None:
        self.gpu, self.device = gpu, device
        self.stream = gpu.open_lane(device).ptr if stream is None else stream
        self.lane = gpu.default_stream(self.stream, device)
        self.given_back: list[int] = []

    def work(self, action: Callable[[], object], seconds: float = WORK_S) -> None:
        """Let a kernel of the library run on its stream, when the GPU gets there."""
        self.gpu.enqueue("launchKernel", self.lane, lambda: action() and None, seconds, name="theirs")

    def behind(self, waiting: int, stream: int) -> None:
        """Let a stream wait for all that another was given."""
        gpu = self.gpu
        marker = gpu.enqueue("eventRecord", stream, lambda: None)
        event = type("Event", (), {"marker": marker, "at_s": gpu.lane(stream).tail_s})
        gpu.enqueue("streamWaitEvent", waiting, lambda: None, after=event)

    def tensor(self, contents: Any, offset: int = 0) -> Tensor:
        """A tensor that a kernel of the library is going to fill, `offset` bytes behind an aligned address."""
        array = np.ascontiguousarray(contents)
        made = Tensor(self, array.shape, array.dtype, offset)
        self.work(lambda: made.write(array))
        return made

    def take(self, given: Any) -> Exported:
        """As from_dlpack of another library does, for what it does on its stream."""
        return exported(given, self.stream)


class Tensor:
    """What torch calls a tensor: C-contiguous unless `strides`, in elements, say otherwise."""

    def __init__(self, library: Library, shape: tuple[int, ...], dtype: DType, offset: int = 0) -> None:
        self.library, self.shape, self.dtype = library, shape, dtype
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self.memory = _Memory(library, self.nbytes + offset)
        self.address, self.strides = self.memory.address + offset, None

    def write(self, array: Any) -> None:
        """Now, as a kernel that runs at the moment does."""
        packed = np.ascontiguousarray(array)
        assert packed.nbytes == self.nbytes
        ctypes.memmove(self.address, packed.ctypes.data, packed.nbytes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.library.device

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        assert stream not in (0, None), "a stream that is ambiguous"
        if stream != -1:
            self.library.behind(stream, self.library.lane)
        return capsule(self.address, self.shape, self.dtype, self.__dlpack_device__(), self.memory)


class Described:
    """The same tensor, of a library that has only `__cuda_array_interface__`."""

    def __init__(self, tensor: Tensor, version: int = 3, **changes: Any) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": tensor.dtype.str,
            "data": (tensor.address, False),
            "version": version,
            **({"stream": tensor.library.stream} if version >= 3 else {}),
            **changes,
        }


class _Memory:
    """Bytes of the GPU that go back to the library with the last reference, and may then be written at any time."""

    def __init__(self, library: Library, nbytes: int) -> None:
        self._library = library
        self._block = library.gpu.allocate("malloc", max(nbytes, 1), library.device, pinned=False)
        self.address = self._block.address

    def __del__(self) -> None:
        self._library.given_back.append(self.address)
        self._block.room[:] = 0xEE


def read(found: Exported) -> Any:
    """What lies there now, as a kernel that runs at the moment sees it."""
    return on_host(found).copy()


def collected(library: Library, address: int) -> bool:
    """Whether the library got this memory back."""
    if address not in library.given_back:
        gc.collect()
    return address in library.given_back

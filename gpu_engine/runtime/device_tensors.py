"""Tensors in a device's memory: those that callers give, as a request holds them, and those that they get."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from gpu_engine.errors import InputError
from gpu_engine.ir.dtypes import DType
from gpu_engine.runtime.dlpack import (
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    HOST_READS,
    LEGACY_STREAM,
    Exported,
    capsule,
    described,
    exported,
)


@dataclass(frozen=True, slots=True)
class DeviceDType:
    """Elements of a dtype in the memory of a device. It equals no dtype of NumPy's, so that what is remembered of
    shapes and dtypes never mixes up what lies where."""

    element: DType
    device: str

    def __str__(self) -> str:
        return f"{self.element} on {self.device}"


@dataclass(frozen=True, slots=True, eq=False)
class GivenTensor:
    """An input that lies in the device's memory.

    `strides` count elements; None: C-contiguous. Who reads it waits for `ready` first, unless that is None. `owner`
    keeps the memory; `source` is what the caller gave.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: DeviceDType
    ready: Any
    owner: Any
    source: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.element.itemsize

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for tensors of the same elements of the same memory."""
        return self.dtype, self.address, self.shape, self.strides

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> GivenTensor:
        """Some of axis 0, of step 1."""
        start, stop, _ = rows.indices(self.shape[0])
        step = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        address = self.address + start * step * self.dtype.element.itemsize
        return replace(self, address=address, shape=(max(stop - start, 0), *self.shape[1:]))


class Intake(Protocol):
    """How tensors of other libraries, in a device's memory, come in."""

    @property
    def name(self) -> str:
        """The device's."""
        ...

    @property
    def devices(self) -> frozenset[tuple[int, int]]:
        """What DLPack calls the device, as (type, ordinal)."""
        ...

    def at(self, place: tuple[int, int]) -> Intake:
        """That of one of the devices."""
        ...

    def own(self, value: Any) -> Exported | None:
        """A tensor of a kind of the device's own, complete; None for anything else."""
        ...

    def stream(self) -> int | None:
        """The handle of a stream that other libraries may put in order behind their work; None if there are none."""
        ...

    def after(self, stream: int) -> Any:
        """What slots wait for: all that was given to a stream so far."""
        ...

    def device_of(self, address: int) -> tuple[int, int]:
        """Where memory lies, as (type, ordinal)."""
        ...


class SeveralIntakes:
    """Those of several devices of one engine. Who runs on another than a tensor's own copies it there."""

    def __init__(self, intakes: Sequence[Intake]) -> None:
        self._first, self._members = intakes[0], tuple(intakes)
        self.name = ", ".join(intake.name for intake in intakes)
        self.devices = frozenset(place for intake in intakes for place in intake.devices)

    def at(self, place: tuple[int, int]) -> Intake:
        return next((intake for intake in self._members if place in intake.devices), self._first)

    def own(self, value: Any) -> Exported | None:
        return next((found for intake in self._members if (found := intake.own(value)) is not None), None)

    def stream(self) -> int | None:
        return self._first.stream()

    def after(self, stream: int) -> Any:
        return self._first.after(stream)

    def device_of(self, address: int) -> tuple[int, int]:
        return self._first.device_of(address)


class Loan(Protocol):
    """Memory of the device that a caller holds; who reads it there is told, so that it is used again only after."""

    @property
    def address(self) -> int: ...

    def read_by(self, stream: int) -> None:
        """A caller's stream may read it until it is given back."""
        ...

    def download(self, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
        """A copy in the host's memory."""
        ...


class DeviceTensor:
    """An output in the device's memory, C-contiguous, complete, and the caller's own: nothing overwrites it.

    Other libraries use it in place: `torch.from_dlpack(tensor)`, `cupy.from_dlpack(tensor)`,
    `jax.dlpack.from_dlpack(tensor)`, `numba.cuda.as_cuda_array(tensor)`; so do engines on the same device, as an input.
    `numpy()` copies it to the host. The memory is used again after the last reference to it is gone, here and in other
    libraries, and after what was then given to the streams that it was exported to; these must still exist. Without
    DLPack they are the legacy default stream and those that wait for it.
    """

    __slots__ = ("__weakref__", "_place", "device", "dtype", "loan", "shape")

    def __init__(self, loan: Loan, shape: tuple[int, ...], dtype: DType, device: str, place: tuple[int, int]) -> None:
        self.loan, self._place = loan, place
        self.shape, self.dtype, self.device = shape, dtype, device

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    address = property(lambda self: self.loan.address)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor of no axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<DeviceTensor {self.dtype}{list(self.shape)} on {self.device}>"

    def numpy(self) -> NDArray[Any]:
        """A copy in the host's memory."""
        return self.loan.download(self.shape, self.dtype)

    def __array__(self, *args: Any, **options: Any) -> NDArray[Any]:
        raise TypeError(f"a tensor on {self.device} does not become an array silently: use .numpy()")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._place

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for a consumer on `stream`: None and 1 are the legacy default stream, 2 is the thread's own, -1 is
        none. Nothing is waited for, because the elements are complete. BufferError for a copy, for another device and
        for elements that DLPack does not know."""
        if copy:
            raise BufferError("a DeviceTensor is not copied on export: use .numpy()")
        if dl_device not in (None, self._place):
            raise BufferError(f"the tensor lies on DLPack's device {self._place}, not {dl_device}")
        if stream == 0:
            raise BufferError("stream 0 is ambiguous: 1 is the legacy default stream, 2 the thread's own")
        if self._place[0] == CUDA and stream != -1:
            self.loan.read_by(LEGACY_STREAM if stream is None else int(stream))
        return capsule(self.loan.address, self.shape, self.dtype, self._place, self.loan)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; AttributeError where the memory is not a GPU's, or NumPy has no letter for the elements."""
        if self._place[0] != CUDA or self.dtype.isbuiltin != 1:
            raise AttributeError("__cuda_array_interface__")
        self.loan.read_by(LEGACY_STREAM)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.loan.address if self.size else 0, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


def take(value: Any, name: str, device: str, intake: Intake | None) -> GivenTensor | None:
    """A caller's tensor as a request holds it; None if it lies on the host, or is none.

    InputError, naming the input, if it lies elsewhere than on `device`, or cannot be read there. Its elements stay
    where they are: what is known of them is shape and dtype.
    """
    own = None if intake is None else intake.own(value)
    if own is not None:
        return _given(own, None, value, getattr(value, "device", device))
    if hasattr(value, "__dlpack_device__"):
        return _through_dlpack(value, name, device, intake)
    if hasattr(value, "__cuda_array_interface__"):
        return _through_interface(value, name, device, intake)
    return None


def _through_dlpack(value: Any, name: str, device: str, intake: Intake | None) -> GivenTensor | None:
    """The producer puts our stream behind its work, so that an event there stands for both."""
    kind, ordinal = map(int, value.__dlpack_device__())
    if kind in HOST_READS:
        return None
    if intake is None or ((kind, ordinal) not in intake.devices and (kind != CUDA_MANAGED or not intake.devices)):
        raise InputError(_elsewhere(name, value, place_name(kind, ordinal), device))
    intake = intake.at((kind, ordinal))
    stream = intake.stream()
    found = _read(exported, name, value, stream)
    return _given(found, None if stream is None else intake.after(stream), value, intake.name)


def _through_interface(value: Any, name: str, device: str, intake: Intake | None) -> GivenTensor:
    found = _read(described, name, value)
    if intake is None or not intake.devices:
        raise InputError(_elsewhere(name, value, "a GPU", device))
    where = intake.device_of(found.address) if found.address else None
    if where is not None and where not in intake.devices and where[0] != CUDA_MANAGED:
        raise InputError(_elsewhere(name, value, place_name(*where), device))
    intake = intake if where is None else intake.at(where)
    return _given(found, None if found.stream is None else intake.after(found.stream), value, intake.name)


def _read(read: Callable[..., Exported], name: str, value: Any, *stream: int | None) -> Exported:
    """What a tensor says of itself; InputError with the other library's reason if it does not."""
    try:
        return read(value, *stream)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError, KeyError) as error:
        raise InputError(f"input {name!r} is a {_type(value)} that cannot be read in place: {error}") from error


def place_name(kind: int, ordinal: int) -> str:
    """DLPack's device as people call it."""
    known = {
        CUDA_HOST: "the host",
        CUDA: f"cuda:{ordinal}",
        CUDA_MANAGED: "managed memory of CUDA",
        10: f"rocm:{ordinal}",
        8: "metal",
    }
    return known.get(kind, f"DLPack's device {kind}:{ordinal}")


def one_behind_the_other(tensors: Sequence[GivenTensor]) -> bool:
    """Whether the tensors are neighbours in memory, so that they are one tensor."""
    ends = [tensor.address + tensor.nbytes for tensor in tensors]
    return all(t.strides is None for t in tensors) and all(
        end == after.address for end, after in zip(ends, tensors[1:], strict=False)
    )


def _given(found: Exported, ready: Any, value: Any, device: str) -> GivenTensor:
    dtype = DeviceDType(found.dtype, device)
    return GivenTensor(found.address, found.shape, found.strides, dtype, ready, found.owner, value)


def _elsewhere(name: str, value: Any, there: str, here: str) -> str:
    return (
        f"input {name!r} is a {_type(value)} on {there}, but the engine runs on {here}: move it there, or compile the "
        f"model for the device that it lies on"
    )


def _type(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"

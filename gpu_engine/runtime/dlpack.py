"""DLPack and `__cuda_array_interface__`: what tensors of other libraries say of themselves, and capsules of our own.

https://dmlc.github.io/dlpack/latest/ and https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, read
with ctypes, because NumPy and CuPy know fewer element types than the protocol.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.dtypes import BFLOAT16, BOOL, DType

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
HOST_READS = frozenset({CPU, CUDA_HOST})
"""The types of devices whose memory the host reads as its own."""
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
VERSION = (1, 0)
_FLOAT8 = {
    7: ml_dtypes.float8_e3m4,
    8: ml_dtypes.float8_e4m3,
    9: ml_dtypes.float8_e4m3b11fnuz,
    10: ml_dtypes.float8_e4m3fn,
    11: ml_dtypes.float8_e4m3fnuz,
    12: ml_dtypes.float8_e5m2,
    13: ml_dtypes.float8_e5m2fnuz,
    14: ml_dtypes.float8_e8m0fnu,
}
DTYPES: dict[tuple[int, int], DType] = {
    **{(0, 8 * width): np.dtype(f"i{width}") for width in (1, 2, 4, 8)},
    **{(1, 8 * width): np.dtype(f"u{width}") for width in (1, 2, 4, 8)},
    **{(2, 8 * width): np.dtype(f"f{width}") for width in (2, 4, 8)},
    **{(5, 8 * width): np.dtype(f"c{width}") for width in (8, 16)},
    (4, 16): BFLOAT16,
    (6, 8): BOOL,
    **{(code, 8): np.dtype(float8) for code, float8 in _FLOAT8.items()},
}
"""Element types by DLPack's code and bits."""
CODES = {dtype: key for key, dtype in DTYPES.items()}


_TENSOR = "QiiiBBHQQQ"
"""DLTensor: data, device type and ordinal, ndim, code, bits, lanes, shape, strides, byte_offset."""
_MANAGED, _VERSIONED = struct.Struct(f"={_TENSOR}QQ"), struct.Struct(f"=IIQQQ{_TENSOR}")
"""DLManagedTensor and DLManagedTensorVersioned, whose fields all stand at multiples of their sizes."""


def _python(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_is_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_of = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_keep = _python("Py_IncRef", None, ctypes.py_object)
_drop = _python("Py_DecRef", None, ctypes.py_object)
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PLAIN, _NEWER = b"dltensor", b"dltensor_versioned"
_USED = {_NEWER: b"used_dltensor_versioned", _PLAIN: b"used_dltensor"}
"""A capsule keeps the address of its name, so that these are never made anew."""


class Lease:
    """Holds what another library exported, and gives it back with the last reference."""

    __slots__ = ("_deleter", "_pointer")

    def __init__(self, pointer: int, deleter: int | None) -> None:
        self._pointer, self._deleter = pointer, deleter

    def __del__(self) -> None:
        if self._deleter:
            _DELETER(self._deleter)(self._pointer)


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A tensor that another library lets us read while `owner` lives.

    `strides` count elements; None: C-contiguous. `device` is DLPack's (type, ordinal); None: it was not said. `stream`
    is the stream behind whose work the elements are complete; None: they are for whoever asked.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: DType
    device: tuple[int, int] | None
    owner: Any
    stream: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def exported(value: Any, stream: int | None = None) -> Exported:
    """What `value.__dlpack__` lets us read: on a GPU, in the order of `stream`.

    BufferError for an element type that has no dtype here, or what the other library raises.
    """
    try:
        capsule = value.__dlpack__(stream=stream, max_version=VERSION)
    except TypeError:
        capsule = value.__dlpack__(stream=stream) if stream is not None else value.__dlpack__()
    return _read(capsule)


def _read(capsule: Any) -> Exported:
    """A capsule is taken over once: it is renamed, and its deleter becomes ours to call."""
    name = next((name for name in _USED if _is_valid(id(capsule), name)), None)
    if name is None:
        raise BufferError("__dlpack__ gave no capsule that was not used before")
    pointer = _pointer_of(id(capsule), name)
    _rename(capsule, _USED[name])
    if name is _PLAIN:
        *tensor, _, deleter = _MANAGED.unpack(ctypes.string_at(pointer, _MANAGED.size))
        major = VERSION[0]
    else:
        major, _, _, deleter, _, *tensor = _VERSIONED.unpack(ctypes.string_at(pointer, _VERSIONED.size))
    owner = Lease(pointer, deleter)
    if major != VERSION[0]:
        raise BufferError(f"version {major} of DLPack is not known")
    data, kind, ordinal, ndim, code, bits, lanes, shape_at, strides_at, offset = tensor
    dtype = DTYPES.get((code, bits)) if lanes == 1 else None
    if dtype is None:
        raise BufferError(f"elements of DLPack's code {code}, {bits} bits and {lanes} lanes")
    shape = struct.unpack(f"{ndim}q", ctypes.string_at(shape_at, 8 * ndim))
    strides = struct.unpack(f"{ndim}q", ctypes.string_at(strides_at, 8 * ndim)) if strides_at else None
    return Exported(data + offset, shape, _unless_contiguous(shape, strides), dtype, (kind, ordinal), owner)


def described(value: Any) -> Exported:
    """What `value.__cuda_array_interface__` says. Its `stream` is None if there is nothing to wait for: an interface
    older than version 3 does not tell, and means the legacy default stream; BufferError for what cannot be read."""
    found = value.__cuda_array_interface__
    shape, dtype = tuple(map(int, found["shape"])), np.dtype(found["typestr"])
    if found.get("mask") is not None:
        raise BufferError("masked elements")
    if dtype not in CODES:
        raise BufferError(f"elements of type {found['typestr']!r}: DLPack says more about them")
    strides = found.get("strides")
    if strides is not None:
        if any(stride % dtype.itemsize for stride in strides):
            raise BufferError("strides that are no multiples of the elements' size")
        strides = tuple(int(stride) // dtype.itemsize for stride in strides)
    stream = found.get("stream") if found.get("version", 0) >= 3 else LEGACY_STREAM
    if stream == 0:
        raise BufferError("stream 0, which __cuda_array_interface__ forbids")
    address = int(found["data"][0] or 0)
    return Exported(address, shape, _unless_contiguous(shape, strides), dtype, None, value, stream)


def on_host(found: Exported) -> NDArray[Any]:
    """An array over memory that the host reads, without a copy; it keeps the owner."""
    raw = np.dtype(f"u{found.dtype.itemsize}") if found.dtype.isbuiltin != 1 else found.dtype
    strides = None if found.strides is None else tuple(raw.itemsize * stride for stride in found.strides)
    described = {
        "data": (found.address or 1, False),
        "shape": found.shape,
        "strides": strides,
        "typestr": raw.str,
        "version": 3,
    }
    array = np.asarray(_Described(described, found.owner))
    return array.view(found.dtype) if raw is not found.dtype else array


class _Described:
    """What NumPy makes an array of, which then keeps it."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__, self._owner = interface, owner


def _unless_contiguous(shape: Sequence[int], strides: Sequence[int] | None) -> tuple[int, ...] | None:
    """The strides, or None if elements lie one behind the other; axes of one element have any stride."""
    if strides is None or 0 in shape:
        return None
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return tuple(strides)
        expected *= extent
    return None


def capsule(address: int, shape: Sequence[int], dtype: DType, device: tuple[int, int], owner: Any) -> Any:
    """A DLPack capsule over C-contiguous memory that `owner` keeps, a reference to which is held until the other
    library lets go of it, on any thread. BufferError if DLPack has no code for the dtype."""
    if dtype not in CODES:
        raise BufferError(f"DLPack has no elements of {dtype}")
    code, bits = CODES[dtype]
    room = ctypes.create_string_buffer(_MANAGED.size + 8 * len(shape))
    cell = (room, owner)
    shape_at = ctypes.addressof(room) + _MANAGED.size
    _MANAGED.pack_into(
        room, 0, address, *device, len(shape), code, bits, 1, shape_at, 0, 0, id(cell), _DELETE_ADDRESS
    )  # fmt: skip
    struct.pack_into(f"{len(shape)}q", room, _MANAGED.size, *shape)
    _keep(cell)
    return _new(ctypes.addressof(room), _PLAIN, _FORGET_ADDRESS)


def _end(pointer: int) -> None:
    """What the other library calls: the end of what `capsule` kept."""
    cell_at = _MANAGED.unpack(ctypes.string_at(pointer, _MANAGED.size))[-2]
    _drop(ctypes.cast(cell_at, ctypes.py_object))


def _end_unused(dying: int) -> None:
    """The end of a capsule: nobody may have taken it over."""
    if _is_valid(dying, _PLAIN):
        _end(_pointer_of(dying, _PLAIN))


_delete, _forget = _DELETER(_end), _DELETER(_end_unused)
_keep(_delete)
_keep(_forget)
_DELETE_ADDRESS, _FORGET_ADDRESS = (ctypes.cast(each, ctypes.c_void_p).value for each in (_delete, _forget))

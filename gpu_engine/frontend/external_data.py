"""External tensor data: memory-mapped, and never from outside the model's folder.

A tensor's path comes from the model, so it is hostile input (CVE-2022-25882, CVE-2024-27318,
CVE-2025-51480). It must be relative, without "..", and every component is opened below the previous one without
following a symbolic link; the file must be a regular one with a single name (no hard link).
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel, UnsafeModel
from gpu_engine.ir.dtypes import STRING, DType


class ExternalData:
    """The data files of one model; each is mapped once. `folder` is None for a model that came from memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def array(self, fields: Mapping[str, str], dtype: DType, shape: tuple[int, ...], name: str) -> NDArray[Any]:
        """The tensor that `fields` (location, offset, length) points to, read-only."""
        location = fields.get("location", "")
        if self.folder is None:
            raise InvalidModel(f"tensor {name!r} lies in {location!r}, but the model came from memory: pass its path")
        if dtype == STRING:
            raise InvalidModel(f"tensor {name!r}: strings cannot be external data")
        if location not in self._maps:
            self._maps[location] = _map_file(self.folder, location)
        data = self._maps[location]
        offset, packed = int(fields.get("offset", 0)), _packed_nbytes(dtype, shape)
        length = int(fields.get("length", packed))
        if offset < 0 or length != packed or offset + length > data.size:
            raise InvalidModel(
                f"tensor {name!r} ({dtype}{list(shape)}) wants {packed} bytes; {location!r} should hold {length} at "
                f"{offset} and has {data.size}"
            )
        return _decode(data[offset : offset + length], dtype, shape)


def _map_file(folder: Path, location: str) -> NDArray[np.uint8]:
    parts = PurePosixPath(location).parts
    if not parts or "\0" in location or "\\" in location or PurePosixPath(location).is_absolute() or ".." in parts:
        raise UnsafeModel(f"external data {location!r} is not a path inside the model's folder")
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            os.close(parent)
            parent = inner
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    except FileNotFoundError as error:
        raise InvalidModel(f"external data {location!r} is not in {folder}") from error
    except OSError as error:
        raise UnsafeModel(f"external data {location!r} is a link or no file: {error.strerror}") from error
    finally:
        os.close(parent)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise UnsafeModel(f"external data {location!r} is not a regular file with a single name")
        if status.st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(file)


def _bits(dtype: DType) -> int:
    """The packed width: 4 or 2 for the types that share a byte."""
    name = str(dtype)
    return 4 if name in ("int4", "uint4", "float4_e2m1fn") else 2 if name in ("int2", "uint2") else dtype.itemsize * 8


def _packed_nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return (count * _bits(dtype) + 7) // 8


def _decode(data: NDArray[np.uint8], dtype: DType, shape: tuple[int, ...]) -> NDArray[Any]:
    bits = _bits(dtype)
    if bits >= 8:
        return data.view(dtype).reshape(shape)
    per_byte = 8 // bits
    codes = (data[:, None] >> (np.arange(per_byte, dtype=np.uint8) * bits)) & ((1 << bits) - 1)
    flat = codes.ravel()[: int(np.prod(shape, dtype=np.int64))].astype(np.uint8)
    if str(dtype).startswith("int"):
        signed = (flat.astype(np.int8) << (8 - bits)) >> (8 - bits)
        return signed.astype(dtype).reshape(shape)
    return flat.astype(dtype).reshape(shape) if str(dtype).startswith("uint") else flat.view(dtype).reshape(shape)

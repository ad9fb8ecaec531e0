"""Values that are not one tensor: sequences, optionals and maps, as nested structures over a flat list of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.dtypes import DType


@dataclass(frozen=True)
class Known:
    """A tensor whose contents are part of the structure."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> NDArray[Any]:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Maps:
    """A sequence of maps, as a tensor with a row for each map and a column for each of their keys."""

    keys: tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """A map that a caller brings, as a tensor of its keys in ascending order and one of their values."""


Structure = int | None | Known | Maps | Pairs | tuple[Any, ...]
"""The rank of a tensor, None for an optional that holds nothing, a tuple of structures for a sequence."""


def structure_of(value: Any) -> Structure:
    """The structure of a caller's value: a list or tuple is a sequence, None an empty optional, a dict a map, all else
    a tensor."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return Pairs()
    return tuple(map(structure_of, value)) if isinstance(value, list | tuple) else int(np.ndim(value))


def flatten(value: Any, dtype: DType | None = None, key: DType | None = None) -> list[Any]:
    """The tensors of a value, in order; a dict's keys and values become tensors of the types that are declared."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        keys = sorted(value)
        return [np.array(keys, key), np.array([value[key] for key in keys], dtype)]
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, list | tuple) else [value]


def flat_names(name: str, structure: Structure) -> list[str]:
    """A name for every tensor of a value called `name`: name[0], name[1], ... in a sequence."""
    if structure is None:
        return []
    if isinstance(structure, tuple):
        return [leaf for i, item in enumerate(structure) for leaf in flat_names(f"{name}[{i}]", item)]
    return [name]


def nest(structure: Structure, tensors: Iterator[Any]) -> Any:
    """The value of this structure, its tensors taken from the iterator; sequences are lists, maps dicts."""
    if structure is None:
        return None
    if isinstance(structure, Maps):
        return [dict(zip(structure.keys, row, strict=True)) for row in next(tensors).tolist()]
    return [nest(item, tensors) for item in structure] if isinstance(structure, tuple) else next(tensors)

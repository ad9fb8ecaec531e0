"""Sequences and optionals while a model is imported: their structure is known, so none of them reaches the Graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.ir.graph import Value
from gpu_engine.ir.structure import Maps, Structure


@dataclass(frozen=True, eq=False)
class SequenceValue:
    """A sequence whose length the importer knows."""

    elements: tuple[Value, ...]

    def __getattr__(self, name: str) -> Any:
        raise InvalidModel(f"a sequence where a tensor is wanted: it has no {name}")


@dataclass(frozen=True, eq=False)
class AbsentValue:
    """An optional that holds nothing; one that holds something is what it holds."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidModel(f"an empty optional where a tensor is wanted: it has no {name}")


@dataclass(frozen=True, eq=False)
class MapsValue:
    """A sequence of maps: a tensor with a row for each and a column for each key."""

    rows: Value
    keys: tuple[int, ...] | tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        raise InvalidModel(f"a sequence of maps where a tensor is wanted: it has no {name}")


@dataclass(frozen=True, eq=False)
class PairsValue:
    """A map that a caller brings: its keys [n] in ascending order, and their values [n]."""

    keys: Value
    values: Value

    def __getattr__(self, name: str) -> Any:
        raise InvalidModel(f"a map where a tensor is wanted: it has no {name}")


Emitted = Value | SequenceValue | AbsentValue | MapsValue | PairsValue
"""What a name can mean while nodes are emitted."""


def structure_of_emitted(value: Emitted) -> Structure:
    """How callers see it."""
    if isinstance(value, AbsentValue):
        return None
    if isinstance(value, MapsValue):
        return Maps(value.keys)
    if isinstance(value, PairsValue):
        raise UnsupportedModel("a map among the inputs is an output too")
    return tuple(element.rank for element in value.elements) if isinstance(value, SequenceValue) else value.rank


def tensors_of(value: Emitted) -> tuple[Value, ...]:
    """The tensors it consists of, in order."""
    if isinstance(value, AbsentValue):
        return ()
    if isinstance(value, MapsValue):
        return (value.rows,)
    if isinstance(value, PairsValue):
        return (value.keys, value.values)
    return value.elements if isinstance(value, SequenceValue) else (value,)

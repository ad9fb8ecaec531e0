"""The symbolic extents among the parameters of an operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from gpu_engine.ir.dims import Dim, Sym


def op_dims(op: Any) -> list[Sym]:
    """The symbolic extents among the parameters of `op`."""
    found: list[Sym] = []
    for name in _field_names(op.__class__):
        _collect_dims(getattr(op, name), found)
    return found


def _collect_dims(field: Any, found: list[Sym]) -> None:
    if isinstance(field, Sym):
        found.append(field)
    elif isinstance(field, tuple):
        for item in field:
            _collect_dims(item, found)


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def resolve(op: Any, values: Mapping[Dim, int]) -> Any:
    """`op` with every symbolic extent among its parameters replaced by its value."""

    def visit(field: Any) -> Any:
        if isinstance(field, Sym):
            return values[field]
        return tuple(map(visit, field)) if isinstance(field, tuple) else field

    changed = {name: visit(getattr(op, name)) for name in _field_names(op.__class__)}
    return dataclasses.replace(op, **changed)

"""Whether an attribute's value is of the kind that its operator's signature declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from gpu_engine.frontend.model import ModelGraph

KINDS: dict[Any, tuple[type, ...]] = {
    int: (int,), float: (int, float), str: (str,), bytes: (str, bytes), bool: (int,), ModelGraph: (ModelGraph,),
}  # fmt: skip
NAMES: dict[type, str] = {np.ndarray: "a tensor", tuple: "a list", ModelGraph: "a graph"}


def of_kind(function: Callable[..., Any], name: str, value: Any) -> bool:
    """Whether `value` is what the parameter `name` of `function` is annotated with."""
    return _is(value, _hints(function).get(name, Any))


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return next((text for kind, text in NAMES.items() if isinstance(value, kind)), f"{type(value).__name__} {value!r}")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:
        return {}


def _is(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return True
    if hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, argument) for argument in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(_is(item, arguments[0]) for item in value)
    if origin is np.ndarray:
        return isinstance(value, np.ndarray)
    return hint not in KINDS or isinstance(value, KINDS[hint])

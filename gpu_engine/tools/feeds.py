"""One request's inputs for every command: arrays from files, or random data by dtype and shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InputError
from gpu_engine.ir.dtypes import BOOL, INT8, UINT8, is_float, is_integer, limits
from gpu_engine.plan.plan import Port
from gpu_engine.runtime.engine import Engine
from gpu_engine.structured import StructuredEngine
from gpu_engine.tools.files import named_inputs

Array = NDArray[Any]
Feed = dict[str, Array]

NO_TENSORS = "the inputs decide what the model computes, so they cannot be random: give --input"
_SHAPE = re.compile(r"(?:(?P<name>.+?)\s*[:=\[]\s*)?(?P<extents>\d+(?:\s*[x,]\s*\d+)*|)\]?")


@dataclass(frozen=True)
class Request:
    """What one request is made of: files as `gpu-engine run` takes them, or random data of these shapes."""

    inputs: Sequence[str] = ()
    shapes: Sequence[str] = ()
    seed: int = 0


def feed_of(engine: Engine | StructuredEngine, request: Request) -> Feed:
    """The arrays of a request by name; ValueError and InputError as its parts raise them."""
    if request.inputs:
        return named_inputs(request.inputs, engine.input_names)
    if isinstance(engine, StructuredEngine):
        raise InputError(NO_TENSORS)
    shapes = parse_shapes(request.shapes, engine.input_names)
    return random_feed(engine.inputs, shapes, engine.plan.batching.symbol, request.seed)


def parse_shapes(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{input: shape} from "images:1x3x48x320", "images=1,3,48,320", "images[1,3,48,320]", or the extents alone where
    the model has one input; ValueError for anything else."""
    found = {}
    for text in texts:
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"a shape is written NAME:1x3x224x224, given {text!r}")
        name = match["name"] or (names[0] if len(names) == 1 else "")
        if name not in names:
            raise ValueError(f"the shape {text!r} names none of the inputs {', '.join(names)}")
        found[name] = tuple(int(extent) for extent in re.findall(r"\d+", match["extents"]))
    return found


def random_feed(ports: Sequence[Port], shapes: Mapping[str, tuple[int, ...]], batch: str | None, seed: int) -> Feed:
    """Random inputs for one request: one row where a shape is not given.

    Floats are normal; integers of 8 bits take every value; others, which are mostly indices and masks, are 0 or 1, and
    one alone, mostly a length or a count, is 1.
    InputError for strings, for a shape of another rank, and for other open extents whose shape is not given.
    """
    draw = np.random.default_rng(seed)
    return {port.name: _random(port, _shape(port, shapes.get(port.name), batch), draw) for port in ports}


def _shape(port: Port, given: tuple[int, ...] | None, batch: str | None) -> tuple[int, ...]:
    if given is not None:
        if len(given) != len(port.shape):
            raise InputError(f"the shape {list(given)} has another rank than the input {port}")
        return given
    shape = tuple(1 if str(dim) == batch else dim for dim in port.shape)
    known = tuple(dim for dim in shape if isinstance(dim, int))
    if len(known) != len(shape):
        example = "x".join(str(dim) if isinstance(dim, int) else "?" for dim in shape)
        raise InputError(f"the input {port} has open extents: give --shape {port.name}:{example}, or --input")
    return known


def _random(port: Port, shape: tuple[int, ...], draw: np.random.Generator) -> Array:
    if is_float(port.dtype):
        return draw.standard_normal(shape).astype(port.dtype)
    if port.dtype in (INT8, UINT8):
        low, high = limits(port.dtype)
        return draw.integers(low, high + 1, shape, port.dtype)
    if is_integer(port.dtype) or port.dtype == BOOL:
        return draw.integers(0, 2, shape).astype(port.dtype) if math.prod(shape) > 1 else np.ones(shape, port.dtype)
    raise InputError(f"the input {port} cannot be random: give --input")

"""The fuzz cases by number: a model, where it lies, and inputs for what was compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import STRING, DType
from gpu_engine.runtime.engine import Engine
from gpu_engine.structured import StructuredEngine
from tests.fuzz_hazards import hazard
from tests.fuzz_mutations import mutated, pick

HAZARD_SHARE, FILE_SHARE = 0.2, 0.3
MAX_ELEMENTS = 1 << 20
DATA_INTEGERS = (0, 1, 1, 2, 2, 3, 4, 5, 7, -1, 100, 2**31, 2**62, -(2**63))


@dataclass(frozen=True)
class FuzzCase:
    """A model as bytes; it is read from a file if `from_file`. `inputs` are those of the model it was made from."""

    number: int
    what: str
    model: bytes
    inputs: tuple[Any, ...]
    from_file: bool


def fuzz_case(first_seed: int, number: int) -> FuzzCase:
    """The case: the same for equal arguments and an equal version of `onnx`."""
    generator = np.random.default_rng((first_seed, number))
    from_file = bool(generator.random() < FILE_SHARE)
    if generator.random() < HAZARD_SHARE:
        model, what = hazard(generator)
        return FuzzCase(number, what, model, (), from_file)
    origin, model, mutations = mutated(generator)
    return FuzzCase(number, f"{origin.name}: {mutations}", model, origin.inputs, from_file or origin.external)


def inputs_for(engine: Engine | StructuredEngine, case: FuzzCase) -> list[Any] | None:
    """Small inputs that the engine should take; None where the model wants large ones."""
    generator = np.random.default_rng(case.number)
    given = [*case.inputs, *[None] * 100]
    if isinstance(engine, StructuredEngine):
        kinds = [port.dtype or np.dtype(np.float32) for port in engine.inputs]
        return [_array(generator, kind, (2,)) if old is None else old for kind, old in zip(kinds, given, strict=False)]
    extents: dict[str, dims.Dim] = {}
    arrays = []
    for port, old in zip(engine.inputs, given, strict=False):
        names = sorted(name for extent in port.shape for name in dims.symbols(extent))
        extents = {name: int(pick(generator, (1, 2, 3))) for name in names} | extents
        shape = tuple(max(0, dims.number(dims.substitute(extent, extents))) for extent in port.shape)
        fits = isinstance(old, np.ndarray) and old.dtype == port.dtype and _takes(port.shape, old.shape)
        if not fits and dims.product(shape) > MAX_ELEMENTS:  # type: ignore[operator]
            return None
        arrays.append(old if fits else _array(generator, port.dtype, shape))
    return arrays


def _takes(declared: tuple[dims.Dim, ...], shape: tuple[int, ...]) -> bool:
    """Whether the shape may be one of the declared form."""
    return len(declared) == len(shape) and all(
        not isinstance(a, int) or a == b for a, b in zip(declared, shape, strict=True)
    )


def _array(generator: Generator, dtype: DType, shape: tuple[int, ...]) -> Any:
    if dtype == STRING:
        return np.full(shape, "a b", object)
    if dtype.kind in "iu":
        values = np.array([pick(generator, DATA_INTEGERS) for _ in range(int(np.prod(shape)))], np.int64)
        return values.astype(dtype).reshape(shape)
    with np.errstate(all="ignore"):
        return generator.standard_normal(shape).astype(dtype)

"""Models of which callers' values decide what there is to compile: one engine for each structure they bring."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from gpu_engine.errors import DependsOnValues, EngineClosed, InputError
from gpu_engine.ir.dtypes import BOOL, DType, is_integer
from gpu_engine.ir.structure import Known, Structure, flatten, structure_of
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.future import Future

Compile = Callable[[Mapping[str, Structure]], Engine]
MAX_ENGINES = 64
MAX_KNOWN_ELEMENTS = 64
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenInput:
    """An input as declared: the element type of its tensors, whether it may be a sequence, an optional or a map, and
    the type of a map's keys."""

    name: str
    dtype: DType | None
    wrapped: bool
    key: DType | None = None


class StructuredEngine:
    """An engine whose inputs are lists (sequences), None (empty optionals) or dicts (maps), or decide by value what is
    computed.

    How long a sequence is, what an optional holds and the ranks of their tensors decide what there is to compile, so
    the model is compiled when a structure is first seen; shapes and values may differ freely after that. Where even
    that leaves the graph open (a loop that grows a sequence as often as an input says), the contents of integer and
    bool inputs of up to MAX_KNOWN_ELEMENTS elements count as structure too. The MAX_ENGINES structures seen last are
    kept.
    """

    def __init__(self, inputs: Sequence[OpenInput], compile_structure: Compile, by_value: bool = False) -> None:
        self.inputs = tuple(inputs)
        self.input_names = tuple(given.name for given in inputs)
        self._compile, self._by_value, self._closed = compile_structure, by_value, False
        self._engines: dict[tuple[Structure, ...], Engine] = {}
        self._lock = threading.Lock()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines of the structures seen so far, for their statistics, plans and devices."""
        with self._lock:
            return tuple(self._engines.values())

    @property
    def healthy(self) -> bool:
        """As Engine.healthy, of all of them."""
        return all(engine.healthy for engine in self.engines)

    def run(self, inputs: Any) -> Any:
        """As Engine.run; inputs are a list in the order of the inputs or a dict by name."""
        engine, flat, named = self._prepare(inputs)
        outputs = engine.run(flat)
        return dict(zip(engine.output_names, outputs, strict=True)) if named else outputs

    def submit(
        self, inputs: Any, *, timeout: float | None = None, priority: int | None = None, block: bool = False
    ) -> Future[Any]:
        """As Engine.submit; outputs come as a list in the order of the outputs."""
        engine, flat, _ = self._prepare(inputs)
        return engine.submit(flat, timeout=timeout, priority=priority, block=block)

    async def run_async(
        self, inputs: Any, *, timeout: float | None = None, priority: int | None = None, block: bool = False
    ) -> Any:
        """As Engine.run_async, but a structure that was not seen before is compiled on the event loop's thread."""
        engine, flat, named = self._prepare(inputs)
        outputs = await engine.run_async(flat, timeout=timeout, priority=priority, block=block)
        return dict(zip(engine.output_names, outputs, strict=True)) if named else outputs

    def map(self, inputs: Iterable[Any]) -> Iterator[Any]:
        """The outputs of every item, in order."""
        return map(self.run, inputs)

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Close the engine of every structure."""
        with self._lock:
            self._closed, engines = True, list(self._engines.values())
        for engine in engines:
            engine.close(drain, timeout_s)

    def __enter__(self) -> StructuredEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _prepare(self, inputs: Any) -> tuple[Engine, list[Any], bool]:
        values, named = self._ordered(inputs)
        try:
            engine = self._engine(self._structures(values))
        except DependsOnValues as error:
            if self._by_value:
                raise
            _LOGGER.warning("the model is compiled for every value of its small integer inputs: %s", error)
            self._by_value = True
            engine = self._engine(self._structures(values))
        return engine, [leaf for pair in zip(self.inputs, values, strict=True) for leaf in self._tensors(*pair)], named

    def _tensors(self, given: OpenInput, value: Any) -> list[Any]:
        """What the engine gets of a value."""
        if self._is_known(given):
            return []
        try:
            return flatten(value, given.dtype, given.key)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"input {given.name!r}: {error}") from error

    def _ordered(self, inputs: Any) -> tuple[Sequence[Any], bool]:
        named = isinstance(inputs, Mapping)
        if named and set(inputs) != set(self.input_names):
            raise InputError(f"the model takes {', '.join(self.input_names)}, given {', '.join(map(str, inputs))}")
        values = [inputs[name] for name in self.input_names] if named else inputs
        if len(self.inputs) == 1 and not isinstance(values, list | tuple):
            values = [values]
        if not isinstance(values, list | tuple) or len(values) != len(self.inputs):
            raise InputError(f"give a list of {len(self.inputs)} inputs, {', '.join(self.input_names)}, or a dict")
        return values, named

    def _structures(self, values: Sequence[Any]) -> tuple[Structure, ...]:
        pairs = zip(self.inputs, values, strict=True)
        return tuple(_known(given, value) if self._is_known(given) else structure_of(value) for given, value in pairs)

    def _is_known(self, given: OpenInput) -> bool:
        integer = given.dtype is not None and (is_integer(given.dtype) or given.dtype == BOOL)
        return self._by_value and integer and not given.wrapped

    def _engine(self, structures: tuple[Structure, ...]) -> Engine:
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was closed")
            engine = self._engines.pop(structures, None)
            if engine is None:
                engine = self._compile(dict(zip(self.input_names, structures, strict=True)))
            self._engines[structures] = engine
            dropped = next(iter(self._engines)) if len(self._engines) > MAX_ENGINES else None
            old = None if dropped is None else self._engines.pop(dropped)
        if old is not None:
            old.close()
        return engine


def _known(given: OpenInput, value: Any) -> Known:
    array = np.asarray(value)
    if array.dtype != given.dtype or array.size > MAX_KNOWN_ELEMENTS:
        raise InputError(
            f"input {given.name!r} decides what is computed: an array of {given.dtype} of at most "
            f"{MAX_KNOWN_ELEMENTS} elements, not {array.dtype}{list(array.shape)}"
        )
    return Known(array.dtype, array.shape, array.tobytes())

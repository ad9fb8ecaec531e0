"""Models whose inputs are sequences or optionals: one engine for each structure that callers bring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from gpu_engine.errors import EngineClosed, InputError
from gpu_engine.ir.structure import Structure, flatten, structure_of
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.future import Future

Compile = Callable[[Mapping[str, Structure]], Engine]


class StructuredEngine:
    """An engine whose inputs hold lists (sequences) or None (empty optionals).

    How long a sequence is, what an optional holds and the ranks of their tensors decide what there is to compile, so
    the model is compiled when a structure is first seen; shapes and values may differ freely after that.
    """

    def __init__(self, names: tuple[str, ...], compile_structure: Compile) -> None:
        self.input_names = names
        self._compile, self._engines, self._lock = compile_structure, {}, threading.Lock()  # type: ignore[var-annotated]
        self._closed = False

    def run(self, inputs: Any) -> Any:
        """As Engine.run; inputs are a list in the order of the inputs or a dict by name."""
        engine, flat, named = self._prepare(inputs)
        return self._finish(engine, engine.run(flat), named)

    def submit(self, inputs: Any, *, timeout: float | None = None) -> Future[Any]:
        """As Engine.submit; outputs come as a list in the order of the outputs."""
        engine, flat, _ = self._prepare(inputs)
        return engine.submit(flat, timeout=timeout)

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
        named = isinstance(inputs, Mapping)
        if named and set(inputs) != set(self.input_names):
            raise InputError(f"the model takes {', '.join(self.input_names)}, given {', '.join(map(str, inputs))}")
        values = [inputs[name] for name in self.input_names] if named else inputs
        if not isinstance(values, list | tuple) or len(values) != len(self.input_names):
            raise InputError(f"give a list of {len(self.input_names)} inputs, {', '.join(self.input_names)}, or a dict")
        structures = tuple(map(structure_of, values))
        return self._engine(structures), flatten(list(values)), named

    def _engine(self, structures: tuple[Structure, ...]) -> Engine:
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was closed")
            if structures not in self._engines:
                self._engines[structures] = self._compile(dict(zip(self.input_names, structures, strict=True)))
            engine: Engine = self._engines[structures]
            return engine

    def _finish(self, engine: Engine, outputs: Any, named: bool) -> Any:
        return dict(zip(engine.output_names, outputs, strict=True)) if named else outputs

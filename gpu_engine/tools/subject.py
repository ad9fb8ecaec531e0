"""The engine under test, with one request for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_engine.compiler import compile
from gpu_engine.runtime.engine import Engine
from gpu_engine.structured import StructuredEngine
from gpu_engine.tools.feeds import Feed, Request, feed_of
from gpu_engine.tools.peers import Closable, Contender, Mode
from gpu_engine.tools.targets import Awaited, Called, Submitted

OURS = "gpu_engine"
QUICK_S = 1e-3
"""A request below that is awaited in order rather than told by a callback, which costs some microseconds."""


@dataclass(frozen=True)
class Subject:
    """A compiled model that has run `feed` twice; `first_s` and `run_s` are how long that took.

    `rows` is what a request holds; `engine` is the one that runs it.
    """

    engine: Engine
    feed: Feed
    rows: int
    compile_s: float
    first_s: float
    run_s: float
    run: Callable[[Any], Any]
    submit: Callable[[Any], Future[Any]]
    close: Callable[[], None]

    def target(self, mode: Mode) -> Closable:
        """The caller's thread for one request at a time, else the engine's queue."""
        if mode.latency:
            return Called(partial(self.run, self.feed), 0)
        if self.run_s < QUICK_S and not mode.open:
            return Awaited(self.submit, self.feed)
        return Submitted(self.submit, self.feed)

    def contender(self, mode: Mode) -> Contender:
        def infer() -> list[Any]:
            return list(self.run(self.feed).values())

        return Contender(OURS, self.target(mode), infer, "inputs and outputs", self.close)


def open_subject(model: Path, options: Mapping[str, Any], request: Request) -> Subject:
    """Compile with these options of compile(), make a request and run it once; raises what these raise."""
    started = time.perf_counter()
    engine = compile(model, **options)
    compile_s = time.perf_counter() - started
    try:
        feed = feed_of(engine, request)
        first_s, run_s = _timed(engine, feed), _timed(engine, feed)
        inner = engine if isinstance(engine, Engine) else engine.engines[-1]
        rows = inner.statistics().inference_count // 2
        close = partial(engine.close, drain=False)
        return Subject(inner, feed, rows, compile_s, first_s, run_s, engine.run, engine.submit, close)
    except BaseException:
        engine.close(drain=False)
        raise


def _timed(engine: Engine | StructuredEngine, feed: Feed) -> float:
    started = time.perf_counter()
    engine.run(feed)
    return time.perf_counter() - started

"""Networks for streams of several threads, and how many threads there are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.stream import CpuStream
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.ir.ops import Attention, Conv, LayerNorm, Map, MatMul, Pool, Reduce, Softmax
from gpu_engine.plan.plan import Plan
from tests.cpu_execution import lowered, run_slot
from tests.reference import graph_of

Array = NDArray[Any]
N, S = dims.symbol("N"), dims.symbol("S")
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def weights(*shape: int) -> Array:
    return (np.random.default_rng(shape).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


@contextmanager
def opened(plan: Plan, threads: int, cores: Sequence[int] = ()) -> Iterator[CpuStream]:
    stream = CpuStream(plan, 1, cores, threads)
    try:
        yield stream
    finally:
        stream.close()


def results(plan: Plan, inputs: Sequence[Array], threads: int, runs: int = 1) -> list[list[Array]]:
    """The outputs of every run on so many threads; of more runs if in none of them workers came in time."""
    found: list[list[Array]] = []
    with opened(plan, threads) as stream:
        while len(found) < runs or (threads > 1 and len(found) < 20 and not came(stream)):
            found.append(run_slot(stream.slots[0], plan, inputs))
    return found


def came(stream: CpuStream) -> bool:
    """Whether all workers took part if anything was shared."""
    assert stream._team is not None
    first, *others = stream._team.parts()
    return not first or all(others)


def transformer(builder: Builder, x: Value) -> Value:
    """A block over [N, S, 64] whose steps are of many sizes."""
    q, k, v = (builder.emit(MatMul(), x, builder.constant(weights(64, 64))) for _ in range(3))
    y = builder.emit(Attention(0.125), q, k, v)
    y = builder.emit(LayerNorm(2, 1e-5), builder.emit(Map(X + Y), y, x))
    means = builder.emit(Reduce("mean", (1, 2), True), y)
    wide = builder.emit(MatMul(epilogue=expr.tanh(X)), y, builder.constant(weights(64, 256)))
    y = builder.emit(MatMul(), wide, builder.constant(weights(256, 64)))
    return builder.emit(Softmax(2), builder.emit(Map(X * Y), y, means))


def network(builder: Builder, x: Value) -> Value:
    """Convolutions of every form over [N, 3, S, S]."""

    def conv(x: Value, inside: int, outside: int, size: int, stride: int = 1, group: int = 1) -> Value:
        pad, weight = (size // 2,) * 2, builder.constant(weights(outside, inside // group, size, size))
        return builder.emit(Conv((stride,) * 2, pad, pad, (1, 1), group), x, weight)

    x = conv(x, 3, 16, 3, stride=2)
    x = builder.emit(Map(expr.maximum(X, 0)), conv(x, 16, 48, 1))
    x = conv(x, 48, 48, 3, group=48)
    x = builder.emit(Pool("max", (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), False), conv(x, 48, 24, 1))
    x = builder.emit(Map(X + Y), conv(x, 24, 24, 3), x)
    return builder.emit(Reduce("mean", (2, 3), False), conv(x, 24, 136, 1))


NETWORKS: Mapping[str, tuple[Graph, Callable[[int], tuple[int, ...]]]] = {
    "transformer": (graph_of({"x": (N, S, 64)}, transformer), lambda s: (2, s, 64)),
    "network": (graph_of({"x": (N, 3, S, S)}, network), lambda s: (1 + s % 2, 3, 8 + s, 8 + s)),
}


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def ends_with(threads: int) -> bool:
    """Whether so many threads are left: the system lists one that was joined for a moment longer."""
    deadline = time.monotonic() + 5
    while native_threads() != threads and time.monotonic() < deadline:
        time.sleep(1e-3)
    return native_threads() == threads


def large() -> tuple[Plan, Array]:
    graph, shape = NETWORKS["transformer"]
    return lowered(graph), weights(*shape(128))

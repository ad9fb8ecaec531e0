"""OpenVINO's equivalence matrix on the CPU device: `python -m tests.equivalence [--pairwise]`.

Streams x requests x batch, timeout and submit interval, inputs of their own or views of one array, every dtype: every
result equals that of the request alone, bit for bit with `deterministic`, else within the dtype's tolerance. All points
run in both modes; `--pairwise` runs a few in which every two values of two axes meet.

The points of one engine share it, one after another, and several engines are served at the same time: most of a point
is waiting.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

import gpu_engine
from gpu_engine.ir.dtypes import ONNX_NUMBER
from gpu_engine.runtime.arrays import Array
from gpu_engine.runtime.engine import Engine

STREAMS, REQUESTS, BATCHES = (1, 2), (1, 3, 8, 9, 16, 64), (1, 4, 8, 16, 32, 64, 128, 256)
TIMEOUTS_MS, INTERVALS_MS, SHARED = (0.0, 1.0), (0.0, 10.0), (False, True)
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
TOLERANCE = {"f2": 1e-2, "f4": 1e-5, "f8": 1e-12}
WIDTH = 24
ENGINES_AT_ONCE = 8
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Case:
    """One point of the matrix."""

    streams: int
    requests: int
    batch: int
    timeout_ms: float
    interval_ms: float
    shared: bool
    dtype: str


def matrix() -> list[Case]:
    """All points."""
    axes = (STREAMS, REQUESTS, BATCHES, TIMEOUTS_MS, INTERVALS_MS, SHARED, DTYPES)
    return [Case(*values) for values in itertools.product(*axes)]


@cache
def model(dtype: str) -> bytes:
    """x [N, WIDTH] turned around, and a product of it where the type has one; else all of it joined to itself."""
    kind, generator = np.dtype(dtype), np.random.default_rng(0)
    number = ONNX_NUMBER[kind]
    nodes = [helper.make_node("Gather", ["x", "order"], ["y"], axis=1)]
    weights = {"order": np.arange(WIDTH)[::-1].copy()}
    if dtype in ("i1", "i2", "u1", "u2", "?"):
        nodes.append(helper.make_node("Concat", ["x", "y"], ["z"], axis=1))
        width = 2 * WIDTH
    else:
        weights["w"] = (generator.standard_normal((WIDTH, WIDTH)) * 3).astype(kind)
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["z"]))
        width = WIDTH
    ports = [helper.make_tensor_value_info(n, number, ["N", w]) for n, w in (("x", WIDTH), ("y", WIDTH), ("z", width))]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "matrix", ports[:1], ports[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


@cache
def alone(dtype: str, requests: int, deterministic: bool) -> tuple[Array, list[list[Array]]]:
    """Rows, and what each of them gives in an engine that batches nothing."""
    generator = np.random.default_rng(requests)
    everything = (generator.standard_normal((requests, WIDTH)) * 4).astype(dtype)
    everything.setflags(write=False)
    with gpu_engine.compile(model(dtype), device="cpu", batch=1, deterministic=deterministic, warmup=False) as engine:
        return everything, [engine.run([everything[i : i + 1]]) for i in range(requests)]


def differences(cases: Sequence[Case], deterministic: bool) -> list[str]:
    """How results differ from those of the requests alone; all cases have the same engine."""
    (setting,) = {engine_of(case) for case in cases}
    streams, batch, timeout_ms, dtype = setting
    with gpu_engine.compile(
        model(dtype),
        device="cpu",
        streams=streams,
        batch=batch,
        batch_timeout_ms=timeout_ms,
        deterministic=deterministic,
        warmup=False,
    ) as engine:
        assert isinstance(engine, Engine)
        return [text for case in cases for text in _differences(engine, case, deterministic)]


def _differences(engine: Engine, case: Case, deterministic: bool) -> list[str]:
    everything, expected = alone(case.dtype, case.requests, deterministic)
    inputs = [everything[i : i + 1] if case.shared else everything[i : i + 1].copy() for i in range(case.requests)]
    before = engine.statistics().inference_count
    futures = []
    for x in inputs:
        futures.append(engine.submit([x]))
        time.sleep(case.interval_ms / 1000)
    lost = [i for i, future in enumerate(futures) if not _ends(future)]
    counts = engine.statistics()
    if lost:
        return [f"{case}: requests {lost} were not answered in {PATIENCE_S:g} s: {counts}"]
    pairs = list(zip([future.result() for future in futures], expected, strict=True))
    wrong = [i for i, (a, b) in enumerate(pairs) if not all(map(agree(case.dtype, deterministic), a, b))]
    found = [f"{case}: requests {wrong} differ"] * bool(wrong)
    rows = counts.inference_count - before
    if rows != case.requests or max(counts.batch_sizes) > case.batch:
        found.append(f"{case}: {rows} rows ran, in batches {counts.batch_sizes}")
    return found


def _ends(future: Future[Any]) -> bool:
    return bool(wait([future], PATIENCE_S).done)


def engine_of(case: Case) -> tuple[int, int, float, str]:
    """The part of a case that its engine is compiled for."""
    return case.streams, case.batch, case.timeout_ms, case.dtype


def pairwise(cases: Sequence[Case], seed: int = 0) -> list[Case]:
    """Few cases in which every two values of two axes meet that meet in any: of random ones that with the most new."""

    def pairs(case: Case) -> set[tuple[object, ...]]:
        return set(itertools.combinations(enumerate(astuple(case)), 2))

    generator = random.Random(seed)
    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        tried = [*generator.sample(cases, 50), next(case for case in cases if pairs(case) & left)]
        chosen.append(max(tried, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


def agree(dtype: str, deterministic: bool) -> Any:
    """Whether two outputs are the same, as a function."""
    if deterministic or dtype not in TOLERANCE:
        return lambda a, b: (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    bound = TOLERANCE[dtype]
    return lambda a, b: a.dtype == b.dtype and np.allclose(a, b, rtol=bound, atol=bound)


def run(cases: Sequence[Case], modes: Sequence[bool]) -> list[str]:
    """The differences of all cases in these modes of `deterministic`; several engines at the same time."""
    by_engine = defaultdict(list)
    for case in cases:
        by_engine[engine_of(case)].append(case)
    jobs = [(points, mode) for points in by_engine.values() for mode in modes]
    with ThreadPoolExecutor(ENGINES_AT_ONCE) as pool:
        return [text for found in pool.map(lambda job: differences(*job), jobs) for text in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairwise", action="store_true", help="every two values of two axes meet, and no more")
    parser.add_argument("--seed", type=int, default=0, help="of the points of --pairwise")
    arguments = parser.parse_args()
    cases = pairwise(matrix(), arguments.seed) if arguments.pairwise else matrix()
    found = run(cases, (False, True))
    print("\n".join([*found, f"{len(cases)} of {len(matrix())} points, deterministic and not: {len(found)} differ"]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

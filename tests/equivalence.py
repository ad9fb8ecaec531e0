"""OpenVINO's equivalence matrix on the CPU device: `python -m tests.equivalence [--seconds N]`.

Streams x requests x batch, timeout and submit interval, inputs of their own or views of one array, every dtype: every
result equals that of the request alone, bit for bit with `deterministic`, else within the dtype's tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

import gpu_engine
from gpu_engine.ir.dtypes import ONNX_NUMBER
from gpu_engine.runtime.engine import Engine

STREAMS, REQUESTS, BATCHES = (1, 2), (1, 3, 8, 9, 16, 64), (1, 4, 8, 16, 32, 64, 128, 256)
TIMEOUTS_MS, INTERVALS_MS, SHARED = (0.0, 1.0), (0.0, 10.0), (False, True)
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
TOLERANCE = {"f2": 1e-2, "f4": 1e-5, "f8": 1e-12}
WIDTH = 24


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


def differences(case: Case, deterministic: bool) -> list[str]:
    """How results differ from those of the requests alone."""
    generator = np.random.default_rng(case.requests)
    everything = (generator.standard_normal((case.requests, WIDTH)) * 4).astype(case.dtype)
    everything.setflags(write=False)
    inputs = [everything[i : i + 1] if case.shared else everything[i : i + 1].copy() for i in range(case.requests)]
    options: dict[str, Any] = {"device": "cpu", "deterministic": deterministic, "warmup": False}
    with gpu_engine.compile(model(case.dtype), batch=1, **options) as alone:
        expected = [alone.run([x]) for x in inputs]
    with gpu_engine.compile(
        model(case.dtype), streams=case.streams, batch=case.batch, batch_timeout_ms=case.timeout_ms, **options
    ) as engine:
        assert isinstance(engine, Engine)
        futures = []
        for x in inputs:
            futures.append(engine.submit([x]))
            time.sleep(case.interval_ms / 1000)
        pairs = list(zip([future.result(60) for future in futures], expected, strict=True))
        counts = engine.statistics()
    wrong = [i for i, (a, b) in enumerate(pairs) if not all(map(agree(case.dtype, deterministic), a, b))]
    found = [f"{case}: requests {wrong} differ"] * bool(wrong)
    if counts.inference_count != case.requests or max(counts.batch_sizes) > case.batch:
        found.append(f"{case}: {counts.inference_count} rows ran, in batches {counts.batch_sizes}")
    return found


def agree(dtype: str, deterministic: bool) -> Any:
    """Whether two outputs are the same, as a function."""
    if deterministic or dtype not in TOLERANCE:
        return lambda a, b: (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    bound = TOLERANCE[dtype]
    return lambda a, b: a.dtype == b.dtype and np.allclose(a, b, rtol=bound, atol=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, help="stop after so long; points come in random order")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cases, found, done = matrix(), [], 0
    random.Random(arguments.seed).shuffle(cases)
    ends = time.monotonic() + (arguments.seconds or float("inf"))
    for case in cases:
        found += differences(case, deterministic=bool(done % 2))
        done += 1
        if time.monotonic() > ends:
            break
    print("\n".join([*found, f"{done} of {len(cases)} points, {len(found)} differ"]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

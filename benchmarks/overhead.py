"""What a request costs beside its arithmetic: `python -m benchmarks.overhead`.

The model is MatMul 64x64 + Relu, 8 kFLOP a row. Every row of the table is measured in turn, in several rounds, so that
whatever else the machine does hits all of them; the best round counts. ONNX Runtime runs with one thread, as its
documentation advises for models this small, and is asked for the same bytes; `run` must not be behind it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import gpu_engine

WIDTH = 64
IN_FLIGHT = 1024
RUN_MANY_ROWS, RUN_MANY_BATCH = 262_144, 1024
Array = NDArray[Any]


@dataclass
class Case:
    """`work` does `items` items; `target` is how many a second there have to be, None for a peer."""

    name: str
    items: int
    work: Callable[[], Any]
    target: int | None = None
    best_s: float = float("inf")

    @property
    def rate(self) -> float:
        """Items a second in the best round."""
        return self.items / self.best_s


def small_model() -> onnx.ModelProto:
    """x [N, 64] -> Relu(MatMul(x, w)) [N, 64]."""
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Relu", ["product"], ["y"])]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "small", ports[:1], ports[1:], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def our_cases(opened: ExitStack, model: onnx.ModelProto, row: Array, rows: Array, items: int) -> list[Case]:
    alone = opened.enter_context(gpu_engine.compile(model, device="cpu"))
    shared = opened.enter_context(gpu_engine.compile(model, device="cpu", streams=1, batch=64))
    bulk = opened.enter_context(gpu_engine.compile(model, device="cpu", streams="auto", batch=RUN_MANY_BATCH))

    def run() -> None:
        for _ in range(items):
            alone.run(row)

    def submit() -> None:
        for _ in range(items // IN_FLIGHT):
            for future in [shared.submit(row) for _ in range(IN_FLIGHT)]:
                future.result()

    return [
        Case("gpu_engine run, one thread, batch 1", items, run),
        Case(f"gpu_engine submit, {IN_FLIGHT} in flight", items // IN_FLIGHT * IN_FLIGHT, submit, 50_000),
        Case(f"gpu_engine run_many, batch {RUN_MANY_BATCH}", len(rows), lambda: bulk.run_many(rows), 8_000_000),
    ]


def peer_cases(opened: ExitStack, model: onnx.ModelProto, row: Array, rows: Array, items: int) -> list[Case]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    threads = opened.enter_context(ThreadPoolExecutor(2))
    feed = {"x": row}

    def run() -> None:
        for _ in range(items):
            session.run(None, feed)

    def submit() -> None:
        for _ in range(items // IN_FLIGHT):
            for future in [threads.submit(session.run, None, feed) for _ in range(IN_FLIGHT)]:
                future.result()

    def batches() -> None:
        for start in range(0, len(rows), RUN_MANY_BATCH):
            session.run(None, {"x": rows[start : start + RUN_MANY_BATCH]})

    return [
        Case("onnxruntime run, one thread, batch 1", items, run),
        Case(f"onnxruntime in a ThreadPoolExecutor, {IN_FLIGHT} in flight", items // IN_FLIGHT * IN_FLIGHT, submit),
        Case(f"onnxruntime run, batch {RUN_MANY_BATCH}", len(rows), batches),
    ]


def measure(rounds: int, items: int) -> list[Case]:
    """All cases, measured."""
    model, random = small_model(), np.random.default_rng(1)
    row = random.standard_normal((1, WIDTH), np.float32)
    rows = random.standard_normal((RUN_MANY_ROWS, WIDTH), np.float32)
    with ExitStack() as opened:
        ours = our_cases(opened, model, row, rows, items)
        peers = peer_cases(opened, model, row, rows, items)
        cases = [case for pair in zip(ours, peers, strict=True) for case in pair]
        for _ in range(rounds):
            for case in cases:
                started = time.perf_counter()
                case.work()
                case.best_s = min(case.best_s, time.perf_counter() - started)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--items", type=int, default=8 * IN_FLIGHT, help="requests per round")
    arguments = parser.parse_args()
    missed = []
    cases = measure(arguments.rounds, max(arguments.items, IN_FLIGHT))
    cases[0].target = int(cases[1].rate)
    for case in cases:
        text = f"{case.name:56}{case.rate:12,.0f} items/s"
        if case.target is not None:
            reached = case.rate >= case.target
            text += f"   target {case.target:,}: {'reached' if reached else 'MISSED'}"
            missed += [case.name] * (not reached)
        print(text)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

"""The engines that `benchmarks.peers` compares, opened for one model: one thread, or as many inferences as cores.

Every engine gets the file as it is, computes in float32 where the file says so, and int8 exactly: ONNX Runtime's own
default lets sums of int8 products saturate on processors without VNNI. None of them may put two requests into a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnxruntime
import openvino

import gpu_engine
from benchmarks.inputs import Feed

Outputs = list[Any]


@dataclass(frozen=True)
class Opened:
    """`infer()` is one request and what it gives; `work(times)` does so many on each of `lanes` cores."""

    infer: Callable[[], Outputs]
    work: Callable[[int], None]
    close: Callable[[], None]


Opener = Callable[[str, Feed, int], Opened]


def open_ours(path: str, feed: Feed, lanes: int) -> Opened:
    """One stream of one core for each lane, and a caller for each."""
    engine = gpu_engine.compile(path, device="cpu", streams=lanes, threads=1, auto_batching=False)
    return _called(partial(engine.run, feed), lambda outputs: list(outputs.values()), lanes, engine.close)


def open_onnxruntime(path: str, feed: Feed, lanes: int) -> Opened:
    """One session that runs every request on its caller's thread."""
    session = exact_session(path)
    return _called(partial(session.run, None, feed), list, lanes, lambda: None)


def exact_session(path: str, optimized: bool = True) -> onnxruntime.InferenceSession:
    """One thread, and integer products that do not saturate."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_openvino(path: str, feed: Feed, lanes: int) -> Opened:
    """One request at a time, or its own queue with its throughput hint."""
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": lanes}
    config |= {"PERFORMANCE_HINT": "THROUGHPUT"} if lanes > 1 else {"NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()

    def infer() -> Outputs:
        found = request.infer(feed, share_inputs=True)
        return [found[port] for port in compiled.outputs]

    def one_by_one(times: int) -> None:
        for _ in range(times):
            request.infer(feed, share_inputs=True)

    if lanes == 1:
        return Opened(infer, one_by_one, lambda: None)
    queue = openvino.AsyncInferQueue(compiled)

    def queued(times: int) -> None:
        for _ in range(times * lanes):
            queue.start_async(feed, share_inputs=True)
        queue.wait_all()

    return Opened(infer, queued, lambda: None)


def _called(run: Callable[[], Any], outputs: Callable[[Any], Outputs], lanes: int, close: Callable[[], None]) -> Opened:
    """A call that blocks, made by one thread for each lane."""

    def one_by_one(times: int) -> None:
        for _ in range(times):
            run()

    if lanes == 1:
        return Opened(lambda: outputs(run()), one_by_one, close)
    callers = ThreadPoolExecutor(lanes)

    def at_once(times: int) -> None:
        for future in [callers.submit(one_by_one, times) for _ in range(lanes)]:
            future.result()

    def end() -> None:
        callers.shutdown()
        close()

    return Opened(lambda: outputs(run()), at_once, end)


OURS = "gpu_engine"
OPENERS: Mapping[str, Opener] = {OURS: open_ours, "ONNX Runtime": open_onnxruntime, "OpenVINO": open_openvino}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}

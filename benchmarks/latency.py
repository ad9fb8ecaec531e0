"""One request at a time on all cores, beside the peers' latency modes: `python -m benchmarks.latency`.

Wall time, in turns. Threads of ONNX Runtime spin for a while after a run, so that every turn begins with a rest and a
run that does not count; of all that do, the least and the median are shown. Every output is compared with ONNX
Runtime's, its optimisations off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import openvino

import gpu_engine
from benchmarks.contest import geometric_mean
from benchmarks.engines import exact_session
from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from benchmarks.real_model import Tolerance
from cpu_fallback.cores import usable_cores

DEFAULT = ("resnet50", "mobilenetv2", "minilm_l6_int8")
REST_S, TURN_S = 20e-3, 60e-3
Outputs = list[Any]


@dataclass
class Runner:
    """An engine with one model open; `times_s` are requests one after the other."""

    name: str
    run: Callable[[], Outputs]
    close: Callable[[], None] = lambda: None
    times_s: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Some more requests."""
        time.sleep(REST_S)
        self.run()
        end = time.perf_counter() + TURN_S
        while True:
            started = time.perf_counter()
            self.run()
            stopped = time.perf_counter()
            self.times_s.append(stopped - started)
            if stopped > end:
                return


def open_ours(path: str, feed: Feed, cores: int) -> Runner:
    engine = gpu_engine.compile(path, device="cpu", hint="latency", threads=cores)
    return Runner("gpu_engine", lambda: list(engine.run(feed).values()), engine.close)


def open_onnxruntime(path: str, feed: Feed, cores: int) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Runner("onnxruntime", lambda: list(session.run(None, feed)))


def open_openvino(path: str, feed: Feed, cores: int) -> Runner:
    config: Mapping[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": cores,
    }
    compiled = openvino.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()

    def run() -> Outputs:
        found = request.infer(feed, share_inputs=True)
        return [found[port] for port in compiled.outputs]

    return Runner("openvino", run)


def agrees(found: Outputs, expected: Outputs, tolerance: Tolerance) -> bool:
    """Whether all arrays are as near as the model demands."""
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        near = np.allclose(ours, theirs, tolerance.rtol, tolerance.atol, equal_nan=True)
        if not near or np.abs(ours - theirs).mean() > tolerance.mean:
            return False
    return True


def measure(name: str, cores: int, rounds: int) -> float:
    """Print a model's times; how many times as fast as the faster peer this engine is, by the least times."""
    model = MODELS[name]
    path, feed = str(model.path()), model.feed(*model.timed_shape)
    expected = list(exact_session(path, optimized=False).run(None, feed))
    runners = [opener(path, feed, cores) for opener in (open_ours, open_onnxruntime, open_openvino)]
    checks = [agrees(runner.run(), expected, model.tolerance) for runner in runners]
    for _ in range(rounds):
        for runner in runners:
            runner.turn()
    for runner in runners:
        runner.close()
    least = [min(runner.times_s) * 1e3 for runner in runners]
    middle = [statistics.median(runner.times_s) * 1e3 for runner in runners]
    cells = [
        f"{runner.name} {low:8.3f} {mid:8.3f}{'' if check else ' DIFFERS'}"
        for runner, low, mid, check in zip(runners, least, middle, checks, strict=True)
    ]
    ratio = min(least[1:]) / least[0]
    print(f"{name:24} {'   '.join(cells)}   ratio {ratio:5.2f} {min(middle[1:]) / middle[0]:5.2f}", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cores", type=int, default=len(usable_cores().numbers))
    arguments = parser.parse_args()
    print(f"ms on {arguments.cores} cores: least, median; ratio of the faster peer to gpu_engine: by least, by median")
    ratios = [measure(name, arguments.cores, arguments.rounds) for name in arguments.models]
    print(f"geometric mean of the ratios: {geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()

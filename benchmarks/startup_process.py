"""One fresh process of `benchmarks.startup`: imports, compiles, runs, and prints what each took as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STREAMS, RUNS = 2, 4
THIRD_PARTIES = {"gpu_engine": ("numpy", "onnx", "llvmlite.binding"), "onnxruntime": ("numpy", "onnxruntime")}
OWN = {"gpu_engine": ("gpu_engine.compiler", "cpu_fallback.device"), "onnxruntime": ()}


def open_ours(path: str) -> Callable[[Any], Any]:
    module = importlib.import_module("gpu_engine")
    engine = module.compile(path, device="cpu", streams=STREAMS)
    return lambda feed: engine.run(feed)


def open_onnxruntime(path: str) -> Callable[[Any], Any]:
    module = importlib.import_module("onnxruntime")
    options = module.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


OPENERS = {"gpu_engine": open_ours, "onnxruntime": open_onnxruntime}


def imported_s(names: tuple[str, ...]) -> float:
    started = time.process_time()
    for name in names:
        importlib.import_module(name)
    return time.process_time() - started


def resident_nbytes() -> int:
    """Memory of this process, with the files that it maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    engine, path, inputs = sys.argv[1:]
    found = {"third_parties_s": imported_s(THIRD_PARTIES[engine]), "own_s": imported_s(OWN[engine])}
    feed = dict(importlib.import_module("numpy").load(inputs))
    started, began = time.perf_counter(), time.process_time()
    run = OPENERS[engine](path)
    run(feed)
    found |= {"first_result_s": time.perf_counter() - started, "processor_s": time.process_time() - began}
    with ThreadPoolExecutor(STREAMS) as callers:
        list(callers.map(run, [feed] * (RUNS * STREAMS)))
    print(json.dumps(found | {"resident_nbytes": resident_nbytes()}))


if __name__ == "__main__":
    main()

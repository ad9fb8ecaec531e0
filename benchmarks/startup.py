"""What starting costs: `python -m benchmarks.startup [MODEL...]`.

Fresh processes load a model and run it once, with an empty object cache ("cold"), then with the one that the first
filled ("warm"), then ONNX Runtime does. All have compiled Python files at hand, as installed packages do. Imports are
timed apart, in CPU time, from what follows: from the call of compile to the first result, on the clock and in CPU time.
Resident memory is that after runs on two streams, ONNX Runtime's after two concurrent runs of one thread each. The best
of several rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import MODELS

DEFAULT = ("resnet50", "minilm_l6_int8", "bert_base")
COLD_S, WARM_S, MEMORY_RATIO = 6.0, 0.5, 1.2
Measured = dict[str, float]


def measure(engine: str, path: str, inputs: Path, cache: Path, bytecode: Path) -> Measured:
    """One process; see startup_process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"GPU_ENGINE_CACHE": str(cache), "PYTHONPYCACHEPREFIX": str(bytecode)}
    command = [sys.executable, "-m", "benchmarks.startup_process", engine, path, str(inputs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: Measured = json.loads(done.stdout)
    return found


def best(measured: list[Measured]) -> Measured:
    return {name: min(one[name] for one in measured) for name in measured[0]}


def measure_model(name: str, rounds: int, place: Path) -> dict[str, Measured]:
    """{"cold", "warm", "onnxruntime"} for a model of the catalogue."""
    model = MODELS[name]
    path, inputs, bytecode = str(model.path()), place / f"{name}.npz", place / "bytecode"
    feed: dict[str, Any] = model.feed(*model.timed_shape)
    np.savez(inputs, **feed)
    found: dict[str, list[Measured]] = {"cold": [], "warm": [], "onnxruntime": []}
    measure("gpu_engine", path, inputs, place / f"{name}.first", bytecode)
    for i in range(rounds):
        cache = place / f"{name}.{i}"
        for kind, engine in (("cold", "gpu_engine"), ("warm", "gpu_engine"), ("onnxruntime", "onnxruntime")):
            found[kind].append(measure(engine, path, inputs, cache, bytecode))
    return {kind: best(measured) for kind, measured in found.items()}


def table_row(label: str, row: Measured) -> str:
    imports = row["third_parties_s"] + row["own_s"]
    times = f"{imports:7.2f} s{row['own_s']:11.2f} s{row['first_result_s']:12.2f} s{row['processor_s']:7.2f} s"
    return f"{label:32}{times}{row['resident_nbytes'] / 1e6:8.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    missed = []
    print(f"{'':32}{'imports':>9}{'of them own':>13}{'first result':>14}{'its CPU':>9}{'resident':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            found = measure_model(name, arguments.rounds, Path(folder))
            for kind, row in found.items():
                print(table_row(f"{name} {kind}", row))
            ratio = found["warm"]["resident_nbytes"] / found["onnxruntime"]["resident_nbytes"]
            print(f"{name}: resident {ratio:.2f} times ONNX Runtime's")
            within = found["cold"]["first_result_s"] <= COLD_S and found["warm"]["first_result_s"] <= WARM_S
            missed += [name] * (not within or ratio > MEMORY_RATIO)
    print(f"targets: cold {COLD_S} s, warm {WARM_S} s, memory {MEMORY_RATIO}: missed by {', '.join(missed) or 'none'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

"""ONNX Runtime in a process of its own, because models that nobody vetted may crash or hang it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.conformance_check import difference

LIMIT_S = 20.0
RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
"""Parts of names of operators whose results are not defined."""


class Pipes:
    """Two one-way pipes as one connection."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = Connection(reading, writable=False), Connection(writing, readable=False)
        self.poll, self.recv, self.send = self._reading.poll, self._reading.recv, self._writing.send

    def close(self) -> None:
        self._reading.close()
        self._writing.close()


class Reference:
    """Answers from the process, which is started when it is first needed and again when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: Pipes | None = None

    def outputs(self, model: bytes, inputs: Mapping[str, Any], *, judge: bool = False) -> Mapping[str, Any] | None:
        """{name: output} of ONNX Runtime, or of onnx's own evaluator if that is the judge; None where it refuses,
        crashes or takes too long."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._pipes is not None
        try:
            self._pipes.send((model, dict(inputs), judge))
            if self._pipes.poll(LIMIT_S):
                answer: Mapping[str, Any] | None = self._pipes.recv()
                return answer
        except (EOFError, OSError):
            pass
        self.close()
        return None

    def close(self) -> None:
        if self._process is not None and self._pipes is not None:
            self._process.kill()
            self._process.wait()
            self._pipes.close()
            self._process = None

    def _start(self) -> None:
        self.close()
        their_end, our_end = os.pipe()
        answers, their_answers = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz_reference", str(their_end), str(their_answers)],
            pass_fds=(their_end, their_answers),
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_end)
        os.close(their_answers)
        self._pipes = Pipes(answers, our_end)


def disagreement(model: bytes, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs by more than rounding, empty if nothing does or the results are not defined."""
    if any(name.encode() in model for name in RANDOM) or _wraps(model):
        return ""
    scale = max((_largest(array) for array in expected.values()), default=0.0)
    ours = [_as_given(actual.get(name), array) for name, array in expected.items()]
    return difference(ours, list(expected.values()), 1e-3, 1e-4 * (1 + scale))


def _wraps(model: bytes) -> bool:
    """Whether ONNX Runtime counts in 32 bits what does not fit them: the extents that CenterCropPad is given."""
    if b"CenterCropPad" not in model:
        return False
    given = [numpy_helper.to_array(tensor) for tensor in onnx.ModelProto.FromString(model).graph.initializer]
    return any(array.dtype == np.int64 and (abs(array) >= 2**31).any() for array in given)


def _as_given(array: Any, expected: Any) -> Any:
    """ONNX Runtime gives numbers of 8 bits as their bits."""
    bits = isinstance(array, np.ndarray) and isinstance(expected, np.ndarray) and expected.dtype == np.uint8
    return array.view(np.uint8) if bits and array.dtype.name.startswith("float8") else array


def _largest(array: Any) -> float:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
        return 0.0
    wide = np.abs(array.astype(np.float64))
    return float(wide[np.isfinite(wide)].max(initial=0.0))


def main(arguments: Sequence[str]) -> None:
    """Answer requests from one pipe on another until it is closed."""
    pipes = Pipes(*map(int, arguments))
    onnxruntime.set_default_logger_severity(4)
    while True:
        try:
            model, inputs, judge = pipes.recv()
        except EOFError:
            return
        pipes.send((_specified if judge else _answer)(model, inputs))


def _specified(model: bytes, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    try:
        evaluator = ReferenceEvaluator(onnx.load_model_from_string(model))
        with np.errstate(all="ignore"):
            return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))
    except Exception:
        return None


def _answer(model: bytes, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])

"""ONNX Runtime and OpenVINO as contenders of a benchmark, each in its own mode for latency or throughput.

Both compute in float32 where the file says so, and int8 exactly: ONNX Runtime's own default lets sums of int8 products
saturate on processors without VNNI. Neither puts two requests into a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gpu_engine.errors import DeviceError
from gpu_engine.runtime.late import load
from gpu_engine.tools.feeds import Feed
from gpu_engine.tools.load import Target
from gpu_engine.tools.targets import Called, Notified


class Closable(Target, Protocol):
    def close(self) -> None:
        """End what the target started."""
        ...


@dataclass(frozen=True)
class Mode:
    """How many cores there are, how many requests a caller keeps in flight, whether its load is an open loop, and
    whether even one request at a time goes through the engine's queue."""

    cores: int
    in_flight: int
    open: bool = False
    queue: bool = False

    @property
    def latency(self) -> bool:
        """Whether one request at a time is to have all cores."""
        return self.in_flight == 1 and not self.open and not self.queue


@dataclass(frozen=True)
class Contender:
    """An engine that has loaded the model: `infer` is one request with its outputs in order, `copies` says which of
    inputs and outputs a request copies."""

    name: str
    target: Closable
    infer: Callable[[], list[Any]]
    copies: str
    close: Callable[[], None]


Opener = Callable[[Path, Feed, Mode], Contender]


def open_onnxruntime(model: Path, feed: Feed, mode: Mode) -> Contender:
    """One session; every request on one core and as many at a time as there are cores, or alone on all of them."""
    options = _needed("onnxruntime:SessionOptions")()
    options.intra_op_num_threads = mode.cores if mode.latency else 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = _needed("onnxruntime:InferenceSession")(str(model), options, providers=["CPUExecutionProvider"])
    infer = partial(session.run, None, feed)
    target = Called(infer, 0 if mode.latency else mode.cores)
    return Contender("onnxruntime", target, infer, "outputs", target.close)


def open_openvino(model: Path, feed: Feed, mode: Mode) -> Contender:
    """Its performance hint for latency or throughput, with its own queue of requests."""
    hint = "LATENCY" if mode.latency else "THROUGHPUT"
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": mode.cores, "PERFORMANCE_HINT": hint}
    compiled = _needed("openvino:Core")().compile_model(str(model), "CPU", config)
    request = compiled.create_infer_request()

    def infer() -> list[Any]:
        found = request.infer(feed, share_inputs=True)
        return [found[port] for port in compiled.outputs]

    target: Closable = Called(infer, 0) if mode.latency else _queued(compiled, feed, mode)
    return Contender("openvino", target, infer, "nothing", target.close)


def _queued(compiled: Any, feed: Feed, mode: Mode) -> Notified:
    """OpenVINO's queue, with as many requests as the load keeps in flight; its own choice for an open loop."""
    queue = _needed("openvino:AsyncInferQueue")(compiled, 0 if mode.open else mode.in_flight)
    queue.set_callback(lambda _, told: told[0](told[1]))
    return Notified(lambda number, finished: queue.start_async(feed, (finished, number), share_inputs=True))


PEERS: Mapping[str, Opener] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def peer(name: str) -> Opener:
    """The opener of that name; ValueError for an unknown one, DeviceError with the command that installs it."""
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    _needed(f"{name}:__version__")
    return PEERS[name]


def _needed(place: str) -> Any:
    package = place.split(":")[0]
    try:
        return load(place)
    except ImportError as error:
        raise DeviceError(f"{package} is not installed: python -m pip install {package}") from error

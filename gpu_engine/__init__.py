"""An ONNX inference engine for throughput.

engine = gpu_engine.compile("model.onnx", device="auto", streams=2)
outputs = engine.run(inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_engine.errors import (
    DependsOnValues,
    DeviceError,
    DeviceLost,
    EngineClosed,
    ExecutionError,
    ForkedEngineError,
    GpuEngineError,
    InputError,
    InvalidModel,
    ModelError,
    OutOfMemory,
    QueueFull,
    RequestBusy,
    RequestCancelled,
    RequestTimeout,
    UnsafeModel,
    UnsupportedModel,
)
from gpu_engine.options import PerformanceMode, Scheduler, TimeoutAction
from gpu_engine.runtime.late import NAMES, load

if TYPE_CHECKING:
    from gpu_engine.compiler import compile
    from gpu_engine.runtime.device_tensors import DeviceTensor
    from gpu_engine.runtime.engine import Engine
    from gpu_engine.runtime.request_pool import RequestPool
    from gpu_engine.runtime.reusable import RequestState

__all__ = [
    "DependsOnValues",
    "DeviceError",
    "DeviceLost",
    "DeviceTensor",
    "Engine",
    "EngineClosed",
    "ExecutionError",
    "ForkedEngineError",
    "GpuEngineError",
    "InputError",
    "InvalidModel",
    "ModelError",
    "OutOfMemory",
    "PerformanceMode",
    "QueueFull",
    "RequestBusy",
    "RequestCancelled",
    "RequestPool",
    "RequestState",
    "RequestTimeout",
    "Scheduler",
    "TimeoutAction",
    "UnsafeModel",
    "UnsupportedModel",
    "compile",
]


def __getattr__(name: str) -> Any:
    """Names whose modules need NumPy or onnx are imported when they are first used."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(NAMES[name])

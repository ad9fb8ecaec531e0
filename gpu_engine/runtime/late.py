"""The one place that imports modules when they are first used: devices, whose libraries may lack, and slow names."""

from __future__ import annotations

import importlib
from typing import Any

DEVICES = {
    "cpu": "cpu_fallback.device:CpuDevice",
    "cuda": "gpu_engine.gpu.cuda:CudaDevice",
    "interpret": "gpu_engine.gpu.interpret:InterpretDevice",
}
DEVICE_COUNTS = {"cuda": "gpu_engine.gpu.cuda:device_count"}
KERNEL_COMPILER = "gpu_engine.gpu.offline:compile_binary"
"""Needs Triton, which a bundle does without."""
NAMES = {
    "compile": "gpu_engine.compiler:compile",
    "DeviceTensor": "gpu_engine.runtime.device_tensors:DeviceTensor",
    "Engine": "gpu_engine.runtime.engine:Engine",
    "RequestState": "gpu_engine.runtime.reusable:RequestState",
    "RequestPool": "gpu_engine.runtime.request_pool:RequestPool",
}


WRAP_FUTURE = "asyncio:wrap_future"
"""With asyncio come ssl and email, which few callers need."""
ADMIT_ASYNC = "gpu_engine.runtime.asynchronous:admit"
STREAM = "gpu_engine.runtime.asynchronous:stream"


def load(place: str) -> Any:
    """What "module:name" names; ImportError if the module, or one that it needs, is not there."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)

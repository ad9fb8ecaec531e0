"""The exception tree: every error that this package raises on purpose.

GpuEngineError
├── ModelError               the model file or the graph in it
│   ├── InvalidModel         truncated, malformed, cyclic, dangling names, shapes that contradict
│   ├── UnsupportedModel     well formed, but holds operators or forms that the engine lacks
│   │   └── DependsOnValues  what there is to compile depends on the contents of inputs
│   └── UnsafeModel          external data that points outside the model's folder
├── InputError               what a caller passed to run() or submit(); also a ValueError
├── DeviceError              a device that is absent, refused, or that failed
│   ├── DeviceLost           it failed for good: the engine is unhealthy and refuses requests
│   └── OutOfMemory          also a MemoryError; raised before allocating wherever the size is known
├── ExecutionError           a step failed on these inputs; names the ONNX node
├── QueueFull                the bounded queue is full
├── RequestTimeout           a request expired before it was dispatched; also a TimeoutError
├── RequestCancelled         a request object was cancelled; also a concurrent.futures.CancelledError
├── RequestBusy              a request object is used while it runs
└── EngineClosed             the engine was closed before the request ran
    └── ForkedEngineError    the engine belongs to the process that this one was forked from
"""

from __future__ import annotations

import concurrent.futures


class GpuEngineError(Exception):
    """The root of the tree."""


class ModelError(GpuEngineError):
    """The model cannot be used."""


class InvalidModel(ModelError):
    """The model contradicts the ONNX specification or itself."""


class UnsupportedModel(ModelError):
    """The model is well formed but needs what the engine does not have; lists everything missing at once."""


class DependsOnValues(UnsupportedModel):
    """The ranks or the number of the tensors in the graph depend on what inputs contain."""


class UnsafeModel(ModelError):
    """The model asks to read outside its own folder."""


class InputError(GpuEngineError, ValueError):
    """An input has the wrong name, dtype, rank, extent or kind."""


class DeviceError(GpuEngineError):
    """The device is absent, refused, or failed."""


class DeviceLost(DeviceError):
    """The device failed in a way that no later call survives; only a new process can use it again."""


class OutOfMemory(DeviceError, MemoryError):
    """The memory asked for is not there."""


class ExecutionError(GpuEngineError):
    """A step failed while it ran; the message names the ONNX node and the types involved."""


class QueueFull(GpuEngineError):
    """The engine's bounded queue holds `max_queue_size` requests already."""


class RequestTimeout(GpuEngineError, TimeoutError):
    """The request expired in the queue."""


class RequestCancelled(GpuEngineError, concurrent.futures.CancelledError):
    """The request object was cancelled before its result was there."""


class RequestBusy(GpuEngineError):
    """The request object runs, and what was asked of it has to wait until it is idle."""


class EngineClosed(GpuEngineError):
    """The engine was closed."""


class ForkedEngineError(EngineClosed):
    """The engine was made before this process was forked: no thread serves it here."""

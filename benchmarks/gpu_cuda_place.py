"""A GPU as a place to measure on; CuPy and PyTorch are imported with this module."""

from __future__ import annotations

from typing import Any

import cupy
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_places import Activity, Effort, Run, event_times
from gpu_engine.gpu.cuda import CudaDriver
from gpu_engine.gpu.offline import compile_binary


class CudaPlace:
    """See `gpu_places.Place`. The first GPU."""

    engine, kernels, torch, scale = "cuda", "cuda", "cuda", 1 << 20
    effort = Effort(0.4, 10, 1000, 3)

    def driver(self, arch: int) -> CudaDriver:
        return CudaDriver(0, arch, compile_binary)

    def replayable(self, driver: CudaDriver, run: Run) -> Run:
        """A CUDA graph of the launches, on the driver's stream."""
        run()
        driver.finish()
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        return lambda: graph.launch(stream)

    def engine_times(self, driver: CudaDriver, run: Run) -> list[float]:
        with driver.active():
            return event_times(run, self.effort, cupy.cuda.Event, driver.finish, _cupy_seconds)

    def torch_times(self, run: Run) -> list[float]:
        return event_times(run, self.effort, _torch_event, torch.cuda.synchronize, _torch_seconds)

    def activities(self, run: Run) -> list[Activity]:
        """As PyTorch's profiler sees the device, whoever started what it did."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        events = [event for event in found.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
        return sorted(map(_activity, events), key=lambda one: one.start_s)


def _cupy_seconds(first: Any, last: Any) -> float:
    return float(cupy.cuda.get_elapsed_time(first, last)) / 1e3


def _torch_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _torch_seconds(first: Any, last: Any) -> float:
    return float(first.elapsed_time(last)) / 1e3


def _activity(event: Any) -> Activity:
    """Times are microseconds."""
    copy = event.name.startswith(("Memcpy", "Memset"))
    return Activity(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6, copy)

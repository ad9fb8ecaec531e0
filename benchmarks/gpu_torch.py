"""One network through PyTorch, over the weights that our engine has: as it is, or compiled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_networks import NEAR, Network, distance
from benchmarks.gpu_ours import figures
from benchmarks.gpu_places import Place, wall_times
from benchmarks.inputs import Feed
from benchmarks.torch_graph import torch_module


@dataclass(frozen=True)
class Prepared:
    """A module on its device with one batch there, and the same batch on the host, pinned where there is a GPU."""

    module: Any
    inputs: tuple[Any, ...]
    hosted: tuple[Any, ...]


def prepared(network: Network, place: Place, rows: int) -> Prepared:
    """Images lie channels last, as they are fastest."""
    _multiply_in(network.precision)
    feed: Feed = network.feed(rows)
    module: Any = torch_module(network.graph(), [array.shape for array in feed.values()]).eval()
    module = module.to(place.torch, memory_format=torch.channels_last)
    hosted = tuple(map(_tensor, feed.values()))
    if place.torch != "cpu":
        hosted = tuple(tensor.pin_memory() for tensor in hosted)
    inputs = tuple(_laid(tensor.to(place.torch)) for tensor in hosted)
    return Prepared(module, inputs, hosted)


def _multiply_in(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def _tensor(array: Any) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _laid(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def measure(network: Network, place: Place, rows: int, compiled: bool) -> dict[str, Any]:
    """`device` and `host` as `gpu_ours.measure` has them; `compile_s` is what compiling took, 0.0 for eager mode."""
    ready = prepared(network, place, rows)
    module, compile_s = ready.module, 0.0
    with torch.inference_mode():
        if compiled:
            module, compile_s = _compiled(ready, network, place)

        def with_copies() -> Any:
            moved = [_laid(tensor.to(place.torch, non_blocking=True)) for tensor in ready.hosted]
            for target, source in zip(ready.inputs, moved, strict=True):
                target.copy_(source)
            return [output.cpu() for output in module(*ready.inputs)]

        device = figures(place.torch_times(lambda: module(*ready.inputs)), rows)
        host = figures(wall_times(with_copies, place.effort), rows)
    return {"compile_s": compile_s, "device": device, "host": host}


def _compiled(ready: Prepared, network: Network, place: Place) -> tuple[Any, float]:
    """The module with CUDA graphs over inputs that stay where they are; on the CPU only traced."""
    for tensor in ready.inputs:
        torch._dynamo.mark_static_address(tensor)
    options = {"backend": "eager"} if place.torch == "cpu" else {"mode": "max-autotune"}
    started_s = time.perf_counter()
    module = torch.compile(ready.module, dynamic=False, **options)  # type: ignore[call-overload]
    found = [output.float().cpu().numpy() for output in module(*ready.inputs)]
    compile_s = time.perf_counter() - started_s
    expected = [output.float().cpu().numpy() for output in ready.module(*ready.inputs)]
    off = max(distance(one, other) for one, other in zip(found, expected, strict=True))
    if off > NEAR[network.precision]:
        raise AssertionError(f"what torch.compile made is {off:.1e} from eager mode")
    return module, compile_s

"""The ceilings of a device, measured on the spot, and the engine's pointwise and norm kernels beside them."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper, parser

from benchmarks.gpu_networks import HEAD, NARROW, Network
from benchmarks.gpu_places import Place, opened
from benchmarks.gpu_replay import replay
from benchmarks.skeletons import converted
from gpu_engine.passes.batchability import prove
from gpu_engine.tools.bundles import imported

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIDE, COPIED, COLUMNS = 8, 1024, 1024
"""Of a square product, by the root of the place's scale; elements of a copy, by the scale; of a kernel's row."""
KERNELS = {
    "pointwise": "g (float[n, m] x, float[n, m] z) => (float[n, m] y) { a = Gelu (x)  y = Add (a, z) }",
    "softmax": "g (float[n, 1024] x) => (float[n, 1024] y) { y = Softmax <axis = -1> (x) }",
    "layer norm": """g (float[n, 1024] x) => (float[n, 1024] y) {
        y = LayerNormalization <axis = -1> (x, scale, shift) }""",
}


def rates(place: Place) -> dict[str, Any]:
    """{"copy": bytes read and written a second, a precision: multiplications and additions a second of a product}."""
    found = {"copy": _copy_rate(place)}
    for precision in TYPES:
        found[precision] = _matrix_rate(place, precision)
    return found


def _copy_rate(place: Place) -> float:
    source = torch.rand(COPIED * place.scale, dtype=torch.float32, device=place.torch)
    target = torch.empty_like(source)
    seconds = median(place.torch_times(lambda: target.copy_(source)))
    return 2 * source.nbytes / seconds


def _matrix_rate(place: Place, precision: str) -> float:
    side = SIDE * math.isqrt(place.scale)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    a, b = (torch.randn(side, side, device=place.torch).to(TYPES[precision]) for _ in range(2))
    return 2 * side**3 / median(place.torch_times(lambda: a @ b))


def kernels(place: Place, ceilings: dict[str, Any]) -> dict[str, Any]:
    """{kernel: {precision: share of the copy rate}} for tensors of float32 and float16, several times as large as the
    caches."""
    return {name: {precision: _share(place, name, precision, ceilings["copy"]) for precision in ("fp32", "fp16")}
            for name in KERNELS}  # fmt: skip


def kernel_network(name: str, precision: str) -> Network:
    model = parser.parse_model(HEAD + KERNELS[name])
    for key in ("scale", "shift") if name == "layer norm" else ():
        model.graph.initializer.append(numpy_helper.from_array(np.linspace(0.5, 1, COLUMNS, dtype=np.float32), key))
    onnx.checker.check_model(model)
    model = converted(model, NARROW[precision]) if precision in NARROW else model
    return Network(name, precision, bytes(model.SerializeToString()))


def _share(place: Place, name: str, precision: str, copy_rate: float) -> float:
    device: Any = opened(place.kernels, "fp32")
    graph = imported(kernel_network(name, precision).model)
    plan, driver = device.lower(graph, prove(graph)), place.driver(getattr(device, "arch", 0))
    rows = place.scale * COPIED // COLUMNS // 8
    random = np.random.default_rng(0)
    dtype = np.float16 if precision == "fp16" else np.float32
    feed = {port.name: random.standard_normal((rows, COLUMNS), np.float32).astype(dtype) for port in plan.input_ports}
    nbytes = (len(feed) + 1) * rows * COLUMNS * np.dtype(dtype).itemsize
    with driver.active():
        ready = replay(plan, driver, feed)
        driver.finish()
        run = place.replayable(driver, ready.run)
    return nbytes / median(place.engine_times(driver, run)) / copy_rate

"""What only a GPU can show: kernels of full size, streams at the same time, memory that comes back.

`python -m pytest -m gpu tests/test_gpu_device.py`, and `python -m benchmarks.gpu --check-only` with much more.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import gpu_engine
from benchmarks.gpu_networks import HEAD, NEAR, distance
from gpu_engine.gpu.options import PRECISIONS
from gpu_engine.runtime.late import DEVICES, load

pytestmark = pytest.mark.gpu

PRODUCT = "g (float[n, 512] x) => (float[n, 1024] y) { a = MatMul (x, w)  b = Relu (a)  y = MatMul (b, v) }"
CONVOLUTION = """g (float[n, 64, h, w] x) => (float[n, 96, h, w] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, filters)  s = Sigmoid (c)  y = Mul (c, s) }"""
ATTENTION = """g (float[b, 12, s, 64] q, float[b, 12, s, 64] k, float[b, 12, s, 64] v) => (float[b, 12, s, 64] y) {
    t = Transpose <perm = [0, 1, 3, 2]> (k)  a = MatMul (q, t)  e = Mul (a, root)
    p = Softmax <axis = -1> (e)  y = MatMul (p, v) }"""
CHOICE = "g (float[n, m] x) => (float[n, k] y, int64[n, k] i) { y, i = TopK <axis = 1> (x, count) }"
FOLD = """g (float[n, m] x) => (float[n] y) {
    axis = Constant <value = int64[1] {1}> ()  y = ReduceSum <keepdims = 0> (x, axis) }"""


def model_of(text: str, **weights: Any) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def random(*shape: int) -> Any:
    return np.random.default_rng().standard_normal(shape, np.float32)


def product() -> onnx.ModelProto:
    return model_of(PRODUCT, w=random(512, 2048) / 23, v=random(2048, 1024) / 45)


CASES: dict[str, tuple[onnx.ModelProto, list[list[Any]]]] = {
    "product": (product(), [[random(rows, 512)] for rows in (1, 17, 2048)]),
    "convolution": (
        model_of(CONVOLUTION, filters=random(96, 64, 3, 3) / 24),
        [[random(1, 64, 56, 56)], [random(9, 64, 29, 31)]],
    ),
    "attention": (
        model_of(ATTENTION, root=np.array(0.125, np.float32)),
        [[random(2, 12, s, 64) for _ in range(3)] for s in (128, 197)],
    ),
    "fold": (model_of(FOLD), [[random(3, 1 << 20)], [random(1 << 16, 5)]]),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_full_size(name: str, precision: str) -> None:
    model, inputs = CASES[name]
    with (
        gpu_engine.compile(model, device="cuda", precision=precision) as ours,
        gpu_engine.compile(model, device="cpu", warmup=False) as cpu,
    ):
        for feed in inputs:
            off = distance(ours.run(feed)[0], cpu.run(feed)[0])
            assert off < NEAR[precision], feed[0].shape


def test_kernels_in_cuda_c() -> None:
    model, x = model_of(CHOICE, count=np.array([5])), random(33, 4000)
    with gpu_engine.compile(model, device="cuda") as ours, gpu_engine.compile(model, device="cpu") as cpu:
        for found, expected in zip(ours.run([x]), cpu.run([x]), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_streams_at_the_same_time_keep_their_results_apart() -> None:
    model, rng = product(), np.random.default_rng()
    requests = [rng.standard_normal((int(rows), 512), np.float32) for rows in rng.integers(1, 40, 200)]
    with (
        gpu_engine.compile(model, device="cuda", streams=4, batch=32) as engine,
        gpu_engine.compile(model, device="cpu", warmup=False) as cpu,
        ThreadPoolExecutor(8) as clients,
    ):
        found = list(clients.map(lambda x: engine.submit(x).result(), requests))
        for x, y in zip(requests, found, strict=True):
            assert distance(y, cpu.run(x)) < NEAR["fp32"]


def test_a_result_is_the_same_every_time() -> None:
    x = random(777, 512)
    with gpu_engine.compile(product(), device="cuda", streams=2) as engine:
        first = engine.run(x)
        for _ in range(20):
            np.testing.assert_array_equal(engine.run(x), first)


def test_closing_gives_the_memory_back() -> None:
    device = load(DEVICES["cuda"])(0, source=lambda kernel, arch: None)
    free: list[int] = []
    for _ in range(4):
        with gpu_engine.compile(product(), device="cuda", streams=2) as engine:
            engine.run(random(4096, 512))
        del engine
        gc.collect()
        free.append(device.free_memory())
    assert free[0] - free[-1] < 32 << 20

"""What has to be right before `benchmarks.gpu` measures: networks, sizes that hit tails, and streams under load.

Each of these raises AssertionError with what is wrong. `benchmarks.gpu_commands` has the checks that are programs.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from onnx import numpy_helper, parser

import gpu_engine
from benchmarks.gpu_networks import HEAD, NEAR, Network, distance
from benchmarks.gpu_places import Place
from benchmarks.inputs import Array
from gpu_engine.errors import InputError

DISTINCT_ROWS = 5
CLIENTS, REQUESTS, WIDTH = 8, 40, 48
STREAMS = 4
WHOLE_ROWS = (1, 2, 3, 5, 7, 8)
SIZES: dict[str, tuple[str, tuple[tuple[tuple[int, ...], ...], ...]]] = {
    "product": (
        "g (float[b, m, k] x, float[b, k, n] z) => (float[b, m, n] y) { y = MatMul (x, z) }",
        (((1, 1, 1), (1, 1, 1)), ((2, 3, 5), (2, 5, 7)), ((1, 17, 33), (1, 33, 65)), ((3, 129, 257), (3, 257, 31)),
         ((2, 0, 5), (2, 5, 7)), ((1, 3, 0), (1, 0, 4)), ((1, 1, 1000), (1, 1000, 3))),
    ),
    "convolution": (
        """g (float[n, c, h, w] x, float[o, c, 3, 3] z) => (float[n, o, p, q] y) {
            y = Conv <pads = [1, 1, 1, 1]> (x, z) }""",
        (((1, 3, 5, 7), (5, 3, 3, 3)), ((2, 17, 9, 9), (33, 17, 3, 3)), ((3, 1, 1, 1), (1, 1, 3, 3)),
         ((0, 3, 5, 5), (4, 3, 3, 3)), ((1, 65, 31, 29), (130, 65, 3, 3))),
    ),
    "softmax": (
        "g (float[n, m] x) => (float[n, m] y) { y = Softmax <axis = -1> (x) }",
        (((1, 1),), ((7, 3),), ((0, 5),), ((3, 1025),), ((5, 5000),)),
    ),
    "sums": (
        """g (float[n, m, k] x) => (float[n, k] y) {
            a = Constant <value = int64[1] {1}> ()  y = ReduceSum <keepdims = 0> (x, a) }""",
        (((1, 1, 1),), ((3, 7, 5),), ((2, 0, 3),), ((0, 4, 3),), ((2, 1023, 129),)),
    ),
    "pointwise": (
        "g (float[n, m] x, float[m] z) => (float[n, m] y) { a = Mul (x, z)  b = Tanh (a)  y = Add (b, x) }",
        (((1, 1), (1,)), ((3, 7), (7,)), ((0, 3), (3,)), ((1, 1000003), (1000003,)), ((129, 1025), (1025,))),
    ),
    "attention": (
        """g (float[h, s, 40] q, float[h, t, 40] k, float[h, t, 40] v) => (float[h, s, 40] y) {
            r = Transpose <perm = [0, 2, 1]> (k)  a = MatMul (q, r)
            p = Softmax <axis = -1> (a)  y = MatMul (p, v) }""",
        (((1, 1, 40),) * 3, ((3, 7, 40),) * 3, ((2, 129, 40),) * 3, ((1, 5, 40), (1, 77, 40), (1, 77, 40))),
    ),
    "turn": (
        "g (float[n, m, k] x) => (float[k, n, m] y) { y = Transpose <perm = [2, 0, 1]> (x) }",
        (((1, 1, 1),), ((3, 5, 7),), ((0, 2, 3),), ((2, 33, 65),), ((31, 129, 3),)),
    ),
}  # fmt: skip
SMALL = 2000
"""Elements of the largest tensor of a size that a rehearsal looks at."""


def network(exact: Network, one: Network, place: Place, rows: tuple[int, ...]) -> dict[str, Any]:
    """A network in its precision beside ONNX Runtime in float32; the largest relative distance of an output."""
    session = onnxruntime.InferenceSession(exact.model, providers=["CPUExecutionProvider"])
    distinct = min(DISTINCT_ROWS, max(rows))
    expected = session.run(None, exact.feed(distinct))
    worst = 0.0
    with _engine(one.model, place, one.engine_precision) as engine:
        for count in rows:
            found = engine.run({name: _rows(array, count) for name, array in one.feed(distinct).items()})
            pairs = zip(found.values(), expected, strict=True)
            worst = max(worst, *(distance(array, _rows(wanted, count)) for array, wanted in pairs))
    if not worst <= NEAR[one.precision]:
        raise AssertionError(f"a relative distance of {worst:.1e} where {NEAR[one.precision]:.0e} is allowed")
    return {"distance": worst}


def _rows(array: Array, count: int) -> Array:
    """So many rows: those that are there, again and again."""
    return np.resize(array, (count, *array.shape[1:]))


def sizes(place: Place) -> dict[str, Any]:
    """Odd, large and empty extents of every kind of kernel, one compilation each, beside the CPU device."""
    rehearsal, cases = place.engine == "cpu", 0
    for name, (text, shapes) in SIZES.items():
        model = bytes(parser.parse_model(HEAD + text).SerializeToString())
        for precision in ("fp32", "fp16"):
            with (
                _engine(model, place, precision, device=place.kernels) as ours,
                gpu_engine.compile(model, device="cpu", warmup=False) as cpu,
            ):
                for one in shapes:
                    if rehearsal and max(map(math.prod, one)) > SMALL:
                        continue
                    feed = [_random(shape, seed) for seed, shape in enumerate(one)]
                    off = distance(ours.run(feed)[0], cpu.run(feed)[0])
                    if not off <= NEAR[precision]:
                        raise AssertionError(f"{name} of {one} in {precision} is {off:.1e} from the CPU's")
                    cases += 1
    return {"cases": cases}


def _random(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def streams(place: Place) -> dict[str, Any]:
    """Threads send requests of mixed rows to four streams, every tenth of NaN or of a wrong shape: every answer is its
    own request's, and nobody else's is disturbed."""
    random = np.random.default_rng(7)
    first, second = (random.standard_normal(shape, np.float32) / 7 for shape in ((WIDTH, 64), (64, 16)))
    text = "g (float[n, 48] x) => (float[n, 16] y) { a = MatMul (x, first)  b = Tanh (a)  y = MatMul (b, second) }"
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend([numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")])
    wrong: list[str] = []
    guard = threading.Lock()

    def client(engine: Any, number: int) -> None:
        for one in range(REQUESTS):
            found = _answer(engine, number * REQUESTS + one, first, second)
            if found:
                with guard:
                    wrong.append(found)

    with (
        _engine(model, place, "fp32", streams=STREAMS, batch=8) as engine,
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        for done in [threads.submit(client, engine, number) for number in range(CLIENTS)]:
            done.result()
        served = engine.statistics()
    if wrong:
        raise AssertionError(f"{len(wrong)} answers are wrong: {'; '.join(wrong[:3])}")
    return {"requests": CLIENTS * REQUESTS, "executions": served.execution_count}


def _answer(engine: Any, number: int, first: Array, second: Array) -> str:
    """What is wrong with the answer to a request of its own; "" if nothing."""
    random = np.random.default_rng(number)
    x = random.standard_normal((WHOLE_ROWS[number % len(WHOLE_ROWS)], WIDTH), np.float32)
    poisoned, misshapen = number % 20 == 3, number % 20 == 13
    if misshapen:
        try:
            engine.submit(x[:, :-1])
        except InputError:
            return ""
        return f"request {number} of a wrong shape was admitted"
    if poisoned:
        x[...] = np.nan
    found = engine.submit(x).result()
    expected = np.tanh(x.astype(np.float64) @ first) @ second
    if poisoned:
        return "" if np.isnan(found).all() else f"request {number} of NaN gave numbers"
    off = distance(found, expected)
    return "" if off <= NEAR["fp32"] else f"request {number} is off by {off:.1e}"


def _engine(model: Any, place: Place, precision: str, device: str | None = None, **options: Any) -> Any:
    device = device or place.engine
    asked = None if device == "cpu" else precision
    return gpu_engine.compile(model, device=device, precision=asked, warmup=False, **options)

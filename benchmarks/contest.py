"""Contenders for the same work, timed in turns: many short samples of CPU time each, beside the machine's peak."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.lowering import lower_node
from cpu_fallback.native import LIBRARY, Target, attributes, compile_module
from cpu_fallback.pages import PAGES
from cpu_fallback.vector_math import mangled
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Node, Op, TensorType, Value
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Array = NDArray[Any]
SAMPLE_S = 300e-6
LEAST_SAMPLES = 9
PEAK_STEPS, PEAK_CHAINS = 5000, 12


@dataclass
class Contender:
    """`run(times)` does the work so often; `times_s` are CPU seconds of one run, a sample each."""

    name: str
    run: Callable[[int], Any]
    keep: Any = field(default=None, repr=False)
    compile_s: float = 0.0
    times_s: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        return min(self.times_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)


def contest(
    contenders: Sequence[Contender],
    seconds: float,
    clock: Callable[[], int] = time.thread_time_ns,
    sample_s: float = SAMPLE_S,
) -> None:
    """Sample all contenders in turns for so long, and at least `LEAST_SAMPLES` times; `clock` tells nanoseconds."""
    repeats = [_repeats(contender, sample_s) for contender in contenders]
    end = time.perf_counter() + seconds
    while len(contenders[0].times_s) < LEAST_SAMPLES or time.perf_counter() < end:
        for contender, count in zip(contenders, repeats, strict=True):
            started_ns = clock()
            contender.run(count)
            contender.times_s.append((clock() - started_ns) / count / 1e9)


def _repeats(contender: Contender, sample_s: float) -> int:
    """How many runs take `sample_s`. Doubled until it shows: what one run takes may be mostly the start of threads."""
    contender.run(1)
    times = 1
    while True:
        started = time.perf_counter()
        contender.run(times)
        taken_s = time.perf_counter() - started
        if taken_s >= sample_s / 2:
            return max(1, round(times * sample_s / taken_s))
        times *= 2


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage is collected in between."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def speed(first: Contender, other: Contender) -> float:
    """How many times as fast as `other` the first is: the median over samples taken side by side."""
    return float(np.median(np.array(other.times_s) / np.array(first.times_s)))


def halved(code: Code, total: Reg) -> Reg:
    """One multiply-add of floats that stay finite."""
    half = literal(total.type, 0.5)
    return code.call(total.type, f"llvm.fma.{mangled(total.type)}", total, half, half)


def peak(
    target: Target, multiplied: Callable[[Code, Reg], Reg] = halved, scalar: str = "float"
) -> tuple[Contender, float]:
    """Multiply-adds on registers alone, and how many operations one run is if each of the vector instructions that
    `multiplied` writes is one for every lane of 4 bytes, and counts twice."""
    lanes, code = target.vector_nbytes // 4, Code()
    kind = vector(lanes, scalar)

    def body(_: Reg, sums: list[Reg]) -> list[Reg]:
        return [multiplied(code, total) for total in sums]

    sums = code.loop(i64(0), i64(PEAK_STEPS), i64(1), body, [literal(kind, i + 1) for i in range(PEAK_CHAINS)])
    for i, total in enumerate(sums):
        code.store(total, code.at(Reg("%out", "ptr"), i64(i * target.vector_nbytes)), 4)
    text = "\n".join([*code.declarations.values(), code.text("peak", "ptr %out", attributes(target))])
    engine = compile_module(text, target)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("peak"))
    out = np.zeros(PEAK_CHAINS * lanes, np.float32)
    pointer = out.ctypes.data
    run = Contender("peak", lambda times: [function(pointer) for _ in range(times)], keep=(engine, out))
    return run, 2.0 * lanes * PEAK_CHAINS * PEAK_STEPS


Emit = Callable[[Lowering, Any, Node, tuple[int, ...], tuple[int, ...], Target], bool]


def native(emit: Emit, op: Op, operands: Sequence[Array], target: Target, constants: Sequence[int] = ()) -> Contender:
    """This engine's steps for one operation of these operands, run one after the other by one thread."""
    kinds = [TensorType(array.dtype, array.shape) for array in operands]
    known = [array if i in constants else None for i, array in enumerate(operands)]
    node = Node(op, tuple(map(Value, kinds, known)), tuple(map(Value, op.infer(*kinds))), "a benchmark")
    lowering = Lowering(lower_node)
    numbers, out = tuple(map(lowering.number, node.inputs)), lowering.number(node.outputs[0])
    assert emit(lowering, op, node, numbers, (out,), target), f"{op} of {kinds} has no native form"
    arrays = dict(zip(numbers, operands, strict=True))
    for i, buffer in enumerate(lowering.buffers):
        if buffer.constant is not None:
            arrays[i] = buffer.constant
        elif i not in arrays:
            arrays[i] = PAGES.zeros(evaluator(list(buffer.shape), [])(), buffer.dtype)
    started = time.thread_time()
    calls = []
    for step in lowering.steps:
        assert isinstance(step.kernel, Native)
        address = LIBRARY.addresses([step.kernel.kernel], target)[step.kernel.kernel]
        words = [arrays[w.buffer].ctypes.data if isinstance(w, Address) else w for w in step.kernel.words]
        block = np.array(words, np.int64)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
        calls.append((function, block, block.ctypes.data))

    def run(times: int) -> Array:
        for _ in range(times):
            for function, _block, pointer in calls:
                function(pointer, 0, 1)
        return arrays[out]

    return Contender("ours", run, keep=arrays, compile_s=time.thread_time() - started)


def ort(model: bytes, feeds: Mapping[str, Array], output: str) -> Contender:
    """ONNX Runtime with one thread, inputs and outputs bound."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output(output)

    def run(times: int) -> Any:
        for _ in range(times):
            session.run_with_iobinding(binding)
        return binding

    return Contender("ort", run, keep=(session, binding, feeds))


def result(contender: Contender) -> Array:
    """What the contender computes."""
    found = contender.run(1)
    return np.asarray(found.copy_outputs_to_cpu()[0]) if contender.name == "ort" else np.asarray(found)


def placed(array: Array) -> Array:
    """A copy in large pages, as an engine's own memory is."""
    copy = PAGES.zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def row(
    name: str, contenders: Sequence[Contender], operations: float, top: tuple[Contender, float], nbytes: int
) -> str:
    """The first contender beside the others and the peak, as a line of text."""
    rates = [f"{operations / contender.best_s / 1e9:7.1f}" for contender in contenders]
    ratios = [f"{speed(contenders[0], contender):6.2f}" for contender in contenders[1:]]
    best = top[1] / top[0].best_s / 1e9
    mine = contenders[0]
    share = operations / mine.best_s / 1e9 / best
    return (
        f"{name:40}{' '.join(rates)}  {share:5.0%} of {best:4.0f}  {' '.join(ratios)}"
        f"  {nbytes / mine.best_s / 1e9:6.1f} GB/s  {mine.compile_s * 1e3:4.0f} ms"
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))

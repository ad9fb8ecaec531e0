"""Matrix products of one thread: this engine's kernels beside numpy.matmul and ONNX Runtime, interleaved.

    python -m benchmarks.gemm [--seconds 0.5] [--only TEXT] [--narrow]

For every shape: GFLOP/s of CPU time, the least of many short samples taken in turns, and the fraction of the peak of
the multipliers that was measured between them. `--narrow` generates code for AVX2 on a machine that has more.
Every result is checked against float64.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from threadpoolctl import threadpool_limits

from cpu_fallback.calls import Address, Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.gemm import emit_product
from cpu_fallback.lowering import lower_node
from cpu_fallback.native import LIBRARY, Target, attributes, compile_module, host
from cpu_fallback.pages import PAGES
from cpu_fallback.vector_math import mangled
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Node, TensorType, Value
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.lower import Lowering

Array = NDArray[Any]
SAMPLE_S = 300e-6
NARROW = Target("haswell", "", 32, masked=False, halves=True)


@dataclass(frozen=True)
class Case:
    """a [batch, m, k] times b [batch, k, n], or [k, n] where b is constant."""

    m: int
    k: int
    n: int
    batch: int = 1
    constant: bool = True
    transpose_b: bool = False
    epilogue: str = ""

    @property
    def name(self) -> str:
        lead = f"{self.batch} x " if self.batch > 1 else ""
        form = "" if self.constant else " dynamic"
        return f"{lead}{self.m} x {self.k} x {self.n}{' bt' * self.transpose_b}{form}{' ' + self.epilogue * bool(self.epilogue)}"

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


CASES = (
    *(Case(m, 768, 768) for m in (1, 2, 4, 8, 16, 37, 64, 128, 512)),
    *(Case(m, 384, 384) for m in (1, 8, 128)),
    Case(128, 768, 3072, epilogue="gelu"), Case(512, 768, 3072, epilogue="gelu"), Case(128, 768, 3072, epilogue="bias"),
    Case(1, 3072, 768), Case(128, 3072, 768, epilogue="residual"), Case(512, 3072, 768),
    Case(256, 256, 256), Case(1024, 1024, 1024), Case(1, 2048, 1000), Case(8, 2048, 1000), Case(1, 4096, 4096),
    Case(3136, 64, 64), Case(3136, 64, 256), Case(784, 512, 128, epilogue="relu"), Case(196, 1024, 256),
    Case(12544, 16, 96, epilogue="relu"), Case(1000, 100, 10), Case(1000, 768, 1), Case(128, 8, 768),
    Case(128, 64, 128, batch=12, constant=False, transpose_b=True), Case(128, 128, 64, batch=12, constant=False),
    Case(128, 64, 128, batch=12, constant=False), Case(512, 512, 512, constant=False), Case(4, 512, 512, constant=False),
    Case(1, 512, 512, constant=False), Case(1, 64, 512, batch=12, constant=False, transpose_b=True),
    Case(1, 512, 64, batch=12, constant=False), Case(7, 7, 7, batch=64, constant=False),
)  # fmt: skip


@dataclass
class Contender:
    """Something that computes the case; `best_s` is the least CPU time of one run so far."""

    name: str
    run: Callable[[int], object]
    repeats: int = 1
    best_s: float = math.inf
    keep: Any = field(default=None, repr=False)

    def calibrate(self) -> None:
        self.run(1)
        started = time.perf_counter()
        self.run(1)
        self.repeats = max(1, int(SAMPLE_S / max(1e-7, time.perf_counter() - started)))

    def sample(self) -> None:
        started = time.thread_time_ns()
        self.run(self.repeats)
        self.best_s = min(self.best_s, (time.thread_time_ns() - started) / self.repeats / 1e9)


def peak(target: Target) -> Contender:
    """Multiply-adds on registers alone; one run is 2**16 of them for every lane."""
    lanes, chains = target.vector_nbytes // 4, 12
    code, kind = Code(), vector(target.vector_nbytes // 4, "float")
    half = literal(kind, 0.5)

    def body(_: Reg, sums: list[Reg]) -> list[Reg]:
        return [code.call(kind, f"llvm.fma.{mangled(kind)}", total, half, half) for total in sums]

    steps = (1 << 16) // chains
    sums = code.loop(i64(0), i64(steps), i64(1), body, [literal(kind, i) for i in range(chains)])
    for i, total in enumerate(sums):
        code.store(total, code.at(Reg("%out", "ptr"), i64(i * target.vector_nbytes)), 4)
    text = "\n".join([*code.declarations.values(), code.text("peak", "ptr %out", attributes(target))])
    engine = compile_module(text, target)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("peak"))
    out = np.zeros(chains * lanes, np.float32)
    pointer = out.ctypes.data
    contender = Contender("peak", lambda times: [function(pointer) for _ in range(times)], keep=(engine, out))
    contender.flops = 2 * lanes * chains * steps  # type: ignore[attr-defined]
    return contender


def epilogue_of(name: str, n: int) -> tuple[Any, list[Array]]:
    """(expression or None, its operands without the residual)."""
    x, y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
    bias = np.linspace(-1, 1, n, dtype=np.float32)
    match name:
        case "bias":
            return x + y, [bias]
        case "relu":
            return expr.maximum(x + y, 0.0), [bias]
        case "gelu":
            z = x + y
            return 0.5 * z * (1 + expr.erf(z * math.sqrt(0.5))), [bias]
        case "residual":
            return x + y + expr.arg(2, FLOAT32), [bias]
    return None, []


def operands_of(case: Case) -> list[Array]:
    """a, b and the operands of the epilogue."""
    random = np.random.default_rng(0)
    shape = (case.n, case.k) if case.transpose_b else (case.k, case.n)
    a = random.standard_normal((case.batch, case.m, case.k), dtype=np.float32)
    b = random.standard_normal(shape if case.constant else (case.batch, *shape), dtype=np.float32)
    extras = epilogue_of(case.epilogue, case.n)[1]
    if case.epilogue == "residual":
        extras.append(random.standard_normal((case.batch, case.m, case.n), dtype=np.float32))
    arrays = [a / np.float32(math.sqrt(case.k)), b, *extras]
    placed = [PAGES.zeros(array.shape, np.float32) for array in arrays]
    for place, array in zip(placed, arrays, strict=True):
        place[...] = array
    return placed


def exact(case: Case, operands: Sequence[Array]) -> Array:
    a, b, *extras = (x.astype(np.float64) for x in operands)
    result = a @ (b.swapaxes(-1, -2) if case.transpose_b else b)
    root = epilogue_of(case.epilogue, case.n)[0]
    if root is None:
        return result
    x = result + extras[0]
    match case.epilogue:
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5)))
        case "residual":
            return x + extras[1]
    return x


def ours(case: Case, operands: list[Array], target: Target) -> Contender:
    op = MatMul(transpose_b=case.transpose_b, epilogue=epilogue_of(case.epilogue, case.n)[0])
    kinds = [TensorType(array.dtype, array.shape) for array in operands]
    inputs = tuple(
        Value(kind, array if i == 1 and case.constant else None)
        for i, (kind, array) in enumerate(zip(kinds, operands, strict=True))
    )
    node = Node(op, inputs, tuple(map(Value, op.infer(*kinds))), case.name)
    lowering = Lowering(lower_node)
    numbers, out = tuple(map(lowering.number, inputs)), lowering.number(node.outputs[0])
    assert emit_product(lowering, op, node, numbers, (out,), target)
    arrays = dict(zip(numbers, operands, strict=True))
    for i, buffer in enumerate(lowering.buffers):
        if i not in arrays or buffer.constant is not None:
            shape = evaluator(list(buffer.shape), [])()
            arrays[i] = PAGES.zeros(shape, np.float32) if buffer.constant is None else buffer.constant
    started = time.thread_time()
    calls = []
    for step in lowering.steps:
        assert isinstance(step.kernel, Native)
        address = LIBRARY.addresses([step.kernel.kernel], target)[step.kernel.kernel]
        block = np.array(
            [arrays[w.buffer].ctypes.data if isinstance(w, Address) else w for w in step.kernel.words], np.int64
        )  # fmt: skip
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
        calls.append((function, block, block.ctypes.data))
    compile_s = time.thread_time() - started

    def run(times: int) -> Array:
        for _ in range(times):
            for function, _, pointer in calls:
                function(pointer, 0, 1)
        return arrays[out]

    contender = Contender("ours", run, keep=arrays)
    contender.compile_s = compile_s  # type: ignore[attr-defined]
    return contender


def numpy_contender(case: Case, operands: list[Array]) -> Contender:
    """The product alone: NumPy has no epilogue."""
    a, b = operands[:2]
    b = b.swapaxes(-1, -2) if case.transpose_b else b
    if case.constant:
        a = a.reshape(-1, case.k)
    out = np.empty((*a.shape[:-1], case.n), np.float32)

    def run(times: int) -> Array:
        for _ in range(times):
            np.matmul(a, b, out=out)
        return out

    return Contender("numpy", run)


def onnx_contender(case: Case, operands: list[Array]) -> Contender:
    a, b, *extras = operands
    nodes, made = [], "product"
    b_name = "b"
    if case.transpose_b:
        nodes.append(helper.make_node("Transpose", ["b"], ["bt"], perm=[*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]))
        b_name = "bt"
    nodes.append(helper.make_node("MatMul", ["a", b_name], [made]))
    for kind, names in {"bias": ["Add"], "relu": ["Add", "Relu"], "gelu": ["Add", "Gelu"], "residual": ["Add", "Add"]}.get(
        case.epilogue, []) and [(case.epilogue, {"bias": ["Add"], "relu": ["Add", "Relu"], "gelu": ["Add", "Gelu"],
                                "residual": ["Add", "Add"]}[case.epilogue])]:  # fmt: skip
        taken = iter(f"e{i}" for i in range(len(extras)))
        for i, name in enumerate(names):
            others = [next(taken)] if name == "Add" else []
            nodes.append(helper.make_node(name, [made, *others], [f"t{i}"]))
            made = f"t{i}"
    known = {"b": b} if case.constant else {}
    known |= {f"e{i}": array for i, array in enumerate(extras) if array.ndim == 1}
    feeds = {"a": a} | ({} if case.constant else {"b": b})
    feeds |= {f"e{i}": array for i, array in enumerate(extras) if array.ndim > 1}
    graph = helper.make_graph(
        nodes, "case", [helper.make_tensor_value_info(name, 1, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(made, 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in known.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    out = np.empty((case.batch, case.m, case.n), np.float32)
    binding.bind_output(
        made, "cpu", 0, np.float32, out.shape, onnxruntime.OrtValue.ortvalue_from_numpy(out).data_ptr()
    ) if False else binding.bind_output(made)

    def run(times: int) -> Array:
        for _ in range(times):
            session.run_with_iobinding(binding)
        return out

    run(1)
    np.copyto(out, binding.copy_outputs_to_cpu()[0])
    return Contender("onnxruntime", run, keep=(session, binding, feeds))


def measure(case: Case, target: Target, seconds: float) -> str:
    operands = operands_of(case)
    contenders = [
        ours(case, operands, target),
        numpy_contender(case, operands),
        onnx_contender(case, operands),
        peak(target),
    ]
    truth = exact(case, operands)
    errors = [np.abs(np.asarray(contender.run(1)).reshape(truth.shape) - truth).max() for contender in contenders[::2]]
    assert errors[0] < 2 * errors[1] + 1e-6, f"{case.name}: off by {errors[0]}, ONNX Runtime by {errors[1]}"
    for contender in contenders:
        contender.calibrate()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        for contender in contenders:
            contender.sample()
    mine, other, peer, top = contenders
    rates = [case.flops / contender.best_s / 1e9 for contender in (mine, other, peer)]
    best = top.flops / top.best_s / 1e9  # type: ignore[attr-defined]
    nbytes = 4 * (operands[0].size + operands[1].size + case.batch * case.m * case.n)
    return (
        f"{case.name:38} {rates[0]:7.1f} {rates[1]:7.1f} {rates[2]:7.1f} {rates[0] / best:6.0%} of {best:4.0f}"
        f" {max(rates[1:]) and rates[0] / max(rates[1:]):6.2f}x {nbytes / mine.best_s / 1e9:6.1f} GB/s"
        f" {mine.compile_s * 1e3:5.0f} ms"  # type: ignore[attr-defined]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--only", default="")
    parser.add_argument("--narrow", action="store_true")
    chosen = parser.parse_args()
    host()
    print(f"{'m x k x n':38} {'ours':>7} {'numpy':>7} {'ort':>7} {'peak':>15} {'ratio':>6}")
    with threadpool_limits(1):
        for case in CASES:
            if chosen.only in case.name:
                print(measure(case, NARROW if chosen.narrow else host(), chosen.seconds), flush=True)


if __name__ == "__main__":
    main()

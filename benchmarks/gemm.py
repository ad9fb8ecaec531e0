"""Matrix products of one thread: this engine's kernels beside numpy.matmul and ONNX Runtime, in turns.

    python -m benchmarks.gemm [--seconds 0.5] [--only TEXT] [--narrow]

For every shape: GFLOP/s of CPU time (products of bytes count the same), the least of many short samples; the fraction
of the peak of the multipliers in float32 that was measured between them; how many times as fast as the others (the
median of samples side by side, NumPy without the epilogue); memory traffic if everything moves once; and the CPU time
of compiling. `--narrow` generates code for AVX2 on a machine that has more. Every result is checked against float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import helper
from threadpoolctl import threadpool_limits

from benchmarks.contest import Contender, contest, geometric_mean, native, ort, peak, placed, result, row, speed
from cpu_fallback.gemm import emit_product
from cpu_fallback.native import Target, host
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import MatMul

Array = NDArray[Any]
NARROW = Target("haswell", "", 32, masked=False, halves=True)
STEPS = {"bias": ["Add"], "relu": ["Add", "Relu"], "gelu": ["Add", "Gelu"], "residual": ["Add", "Add"]}


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
    bytes: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.batch} x" * (self.batch > 1), f"{self.m} x {self.k} x {self.n}", "bt" * self.transpose_b]
        parts += ["dynamic" * (not self.constant), self.epilogue, "uint8 int8" * self.bytes]
        return " ".join(filter(None, parts))

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


CASES = (
    *(Case(m, 768, 768) for m in (1, 2, 4, 8, 16, 37, 64, 128, 512)),
    *(Case(m, 384, 384) for m in (1, 8, 128)),
    Case(128, 768, 3072, epilogue="gelu"), Case(512, 768, 3072, epilogue="gelu"), Case(128, 768, 3072, epilogue="bias"),
    Case(1, 3072, 768), Case(128, 3072, 768, epilogue="residual"), Case(512, 3072, 768),
    Case(256, 256, 256), Case(1024, 1024, 1024), Case(1, 2048, 1000), Case(8, 2048, 1000), Case(1, 4096, 4096),
    Case(3136, 64, 64), Case(3136, 64, 64, epilogue="relu"), Case(3136, 64, 256), Case(784, 512, 128, epilogue="relu"),
    Case(196, 1024, 256), Case(12544, 16, 96, epilogue="relu"), Case(1000, 100, 10), Case(1000, 768, 1),
    Case(128, 8, 768), Case(1, 1280, 1000), Case(3136, 96, 384, epilogue="gelu"),
    Case(197, 192, 768, epilogue="gelu"), Case(197, 768, 192, epilogue="residual"),
    Case(197, 192, 576, epilogue="bias"),
    Case(128, 64, 128, batch=12, constant=False, transpose_b=True), Case(128, 128, 64, batch=12, constant=False),
    Case(128, 64, 128, batch=12, constant=False), Case(512, 512, 512, constant=False),
    Case(4, 512, 512, constant=False), Case(1, 512, 512, constant=False),
    Case(1, 64, 512, batch=12, constant=False, transpose_b=True),
    Case(1, 512, 64, batch=12, constant=False), Case(7, 7, 7, batch=64, constant=False),
    Case(1, 768, 768, bytes=True), Case(16, 768, 768, bytes=True), Case(128, 768, 768, bytes=True),
    Case(128, 768, 3072, bytes=True), Case(512, 3072, 768, bytes=True),
)  # fmt: skip


def epilogue_of(case: Case) -> tuple[Expr | None, list[Array]]:
    """The expression, and its operands."""
    x, y = expr.arg(0, FLOAT32), expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32)
    bias = np.linspace(-1, 1, case.n, dtype=np.float32)
    match case.epilogue:
        case "bias":
            return y, [bias]
        case "relu":
            return expr.maximum(y, 0.0), [bias]
        case "gelu":
            return 0.5 * y * (1 + expr.erf(y * math.sqrt(0.5))), [bias]
        case "residual":
            full = np.random.default_rng(1).standard_normal((case.batch, case.m, case.n), dtype=np.float32)
            return x + expr.arg(1, FLOAT32) + expr.arg(2, FLOAT32), [bias, full]
    return None, []


def operands_of(case: Case) -> list[Array]:
    """a, b and the operands of the epilogue."""
    random = np.random.default_rng(0)
    shape = (case.n, case.k) if case.transpose_b else (case.k, case.n)
    shapes = (case.batch, case.m, case.k), shape if case.constant else (case.batch, *shape)
    if case.bytes:
        kinds = np.uint8, np.int8
        return [
            placed(random.integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, own, kind))
            for kind, own in zip(kinds, shapes, strict=True)
        ]
    a, b = (random.standard_normal(own, dtype=np.float32) for own in shapes)
    return [placed(array) for array in (a / np.float32(math.sqrt(case.k)), b, *epilogue_of(case)[1])]


def exact(case: Case, operands: Sequence[Array]) -> Array:
    a, b, *extras = (x.astype(np.float64) for x in operands)
    x = a @ (b.swapaxes(-1, -2) if case.transpose_b else b)
    for name, extra in zip(STEPS.get(case.epilogue, []), [*extras, None], strict=False):
        if extra is not None:
            x = x + extra
        elif name == "Relu":
            x = np.maximum(x, 0)
        elif name == "Gelu":
            x = 0.5 * x * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5)))
    return np.asarray(x)


def numpy_contender(case: Case, operands: Sequence[Array]) -> Contender:
    """The product alone."""
    a, b = operands[:2]
    b = b.swapaxes(-1, -2) if case.transpose_b else b
    a = a.reshape(-1, case.k) if case.constant else a
    out = np.empty((*a.shape[:-1], case.n), np.float32)

    def run(times: int) -> Array:
        for _ in range(times):
            np.matmul(a, b, out=out)
        return out

    return Contender("numpy", run)


def onnx_contender(case: Case, operands: Sequence[Array]) -> Contender:
    a, b, *extras = operands
    nodes, made, right = [], "product", "b"
    if case.transpose_b:
        nodes.append(helper.make_node("Transpose", ["b"], ["bt"], perm=[*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]))
        right = "bt"
    nodes.append(helper.make_node("MatMulInteger" if case.bytes else "MatMul", ["a", right], [made]))
    names = iter(f"e{i}" for i in range(len(extras)))
    for step in STEPS.get(case.epilogue, []):
        operand = [next(names)] if step == "Add" else []
        nodes.append(helper.make_node(step, [made, *operand], [f"{made}_"]))
        made += "_"
    given = {"a": a, "b": b} | {f"e{i}": extra for i, extra in enumerate(extras)}
    known = {name: x for name, x in given.items() if (name == "b" and case.constant) or x.ndim == 1}
    feeds = {name: x for name, x in given.items() if name not in known}
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in given.items()}
    graph = helper.make_graph(
        nodes, "case", [helper.make_tensor_value_info(name, kinds[name], x.shape) for name, x in feeds.items()],
        [helper.make_tensor_value_info(made, 6 if case.bytes else 1, None)],
        [onnx.numpy_helper.from_array(x, name) for name, x in known.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort(model.SerializeToString(), feeds, made)


def measure(case: Case, target: Target, seconds: float) -> tuple[str, float]:
    """The line for a case, and how many times as fast as ONNX Runtime it was."""
    operands = operands_of(case)
    op = MatMul(transpose_b=case.transpose_b, epilogue=epilogue_of(case)[0], accumulate=INT32 if case.bytes else None)
    ours = native(emit_product, op, operands, target, (1,) if case.constant else ())
    others = [onnx_contender(case, operands), *([] if case.bytes else [numpy_contender(case, operands)])]
    truth = exact(case, operands)
    errors = [np.abs(result(contender).reshape(truth.shape) - truth).max() for contender in (ours, others[0])]
    assert errors[0] <= 2 * errors[1] + (0 if case.bytes else 1e-6), f"{case.name}: off by {errors}"
    top = peak(target)
    contest([ours, *others, top[0]], seconds)
    nbytes = sum(x.nbytes for x in operands) + truth.size * 4
    return row(case.name, [ours, *others], case.operations, top, nbytes), speed(ours, others[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--only", default="")
    parser.add_argument("--narrow", action="store_true")
    chosen = parser.parse_args()
    own = host()
    print(f"{'m x k x n':40}{'ours':>7} {'ort':>7} {'numpy':>7}  {'of peak':13} / ort / numpy", flush=True)
    ratios = []
    with threadpool_limits(1):
        for case in CASES:
            if chosen.only in case.name:
                line, ratio = measure(case, NARROW if chosen.narrow else own, chosen.seconds)
                ratios.append(ratio)
                print(line, flush=True)
    print(f"geometric mean of the ratios to ONNX Runtime: {geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()

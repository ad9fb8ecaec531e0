"""Attention of one thread: this engine's kernel beside ONNX Runtime's MultiHeadAttention and PyTorch's, in turns.

    python -m benchmarks.attention [--seconds 1]

Columns as in benchmarks/gemm.py; products alone count as operations. Queries, keys and values lie as projections leave
them, [batch, tokens, heads, features]; PyTorch gets them by head, which is how it wants them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper

from benchmarks.contest import Contender, contest, geometric_mean, native, ort, peak, placed, result, row, speed
from cpu_fallback.fused_attention import emit_turned_attention
from cpu_fallback.native import host
from gpu_engine.ir.ops import Attention
from gpu_engine.plan.turned_attention import TurnedAttention, View

Array = NDArray[Any]
TURN = (0, 2, 1, 3)


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    queries: int
    keys: int
    features: int
    causal: bool = False

    @property
    def name(self) -> str:
        text = f"{self.batch} x {self.heads} heads, {self.queries} x {self.keys}, {self.features} features"
        return text + " causal" * self.causal

    @property
    def operations(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.features

    @property
    def scale(self) -> float:
        return float(self.features**-0.5)


CASES = (
    Case(1, 12, 128, 128, 64), Case(1, 12, 512, 512, 64), Case(1, 12, 128, 128, 32), Case(1, 3, 197, 197, 64),
    Case(8, 12, 16, 16, 32), Case(1, 6, 1500, 1500, 64), Case(1, 8, 64, 2048, 64), Case(1, 12, 1, 128, 64),
    Case(1, 12, 256, 256, 64, causal=True),
)  # fmt: skip


def ours(case: Case, operands: list[Array]) -> Contender:
    shapes = [(case.batch, case.heads, array.shape[1], case.features) for array in operands]
    views = tuple(View(shape, TURN, (0, 0, 0, 0)) for shape in shapes)
    op = TurnedAttention(Attention(case.scale, causal=case.causal), views, TURN)
    return native(emit_turned_attention, op, operands, host())


def runtime(case: Case, operands: list[Array]) -> Contender:
    flat = {name: x.reshape(*x.shape[:2], -1) for name, x in zip("qkv", operands, strict=True)}
    attributes = {"num_heads": case.heads, "scale": case.scale, "unidirectional": int(case.causal)}
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", **attributes)
    infos = [helper.make_tensor_value_info(name, 1, x.shape) for name, x in flat.items()]
    graph = helper.make_graph([node], "case", infos, [helper.make_tensor_value_info("y", 1, None)])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ort(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString(), flat, "y")


def pytorch(case: Case, operands: list[Array]) -> Contender:
    q, k, v = (torch.from_numpy(x.transpose(TURN).copy()) for x in operands)

    def run(times: int) -> Any:
        for _ in range(times):
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.scale, is_causal=case.causal)
        return y.numpy()

    return Contender("torch", run)


def measure(case: Case, seconds: float) -> tuple[str, float]:
    random = np.random.default_rng(0)
    operands = [
        placed(random.standard_normal((case.batch, tokens, case.heads, case.features), dtype=np.float32))
        for tokens in (case.queries, case.keys, case.keys)
    ]
    contenders = [ours(case, operands), runtime(case, operands), pytorch(case, operands)]
    factors = [x.transpose(TURN).astype(np.float64) for x in operands]
    (truth,) = Attention(case.scale, causal=case.causal).evaluate(np, *factors)
    assert np.abs(result(contenders[0]) - truth.transpose(TURN)).max() < 3e-6, case.name
    top = peak(host())
    contest([*contenders, top[0]], seconds)
    nbytes = sum(x.nbytes for x in operands) + truth.size * 4
    return row(case.name, contenders, case.operations, top, nbytes), speed(contenders[0], contenders[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    host()
    print(f"{'':40}{'ours':>7} {'ort':>7} {'torch':>7}  {'of peak':13} / ort / torch", flush=True)
    ratios = []
    for case in CASES:
        line, ratio = measure(case, chosen.seconds)
        ratios.append(ratio)
        print(line, flush=True)
    print(f"geometric mean of the ratios to ONNX Runtime: {geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()

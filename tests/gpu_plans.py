"""Golden plans of the GPU: `python -m tests.gpu_plans` compares them, `--update` rewrites them.

A golden plan is a text under tests/golden/plans: every launch of an inference for sm_90 with the model's usual inputs,
its kernel's family, its grid and what it writes. A change of fusion, of tiles or of shapes shows as a diff.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from gpu_engine.gpu.launches import Launch
from gpu_engine.plan.plan import Plan
from tests.offline import executed, plan_of

PLANS = Path(__file__).parent / "golden" / "plans"
EXPORTS = ("resnet50", "mobilenetv2", "bert_base")
ARCH, PRECISION = 90, "fp32"


def blocks() -> tuple[bytes, Feed]:
    """A residual block, an attention block over its pixels, and a product of many elements for few results."""
    rng = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f"), name)

    constants = [weights("w0", 32, 3, 3, 3), weights("w1", 32, 32, 3, 3), weights("b1", 32), weights("w2", 1024, 10)]
    constants += [weights(name, 32, 32) for name in ("q_w", "k_w", "v_w")] + [
        weights("scale", 32),
        weights("shift", 32),
    ]
    shapes = {"tokens": [0, 32, -1], "heads": [0, 32, 4, 8], "joined": [0, 32, 32]}
    constants += [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    constants.append(numpy_helper.from_array(np.array(8**-0.5, "f"), "root"))
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["r1"]),
        helper.make_node("Reshape", ["r1", "tokens"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["t"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["t", "scale", "shift"], ["normal"], axis=-1),
    ]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["normal", f"{name}_w"], [f"{name}_0"]),
            helper.make_node("Reshape", [f"{name}_0", "heads"], [f"{name}_1"]),
            helper.make_node("Transpose", [f"{name}_1"], [name], perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Mul", ["scores", "root"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "joined"], ["context"]),
        helper.make_node("Add", ["context", "t"], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["row"]),
        helper.make_node("MatMul", ["row", "w2"], ["y"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "blocks", [image], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return model.SerializeToString(), {"x": rng.standard_normal((1, 3, 8, 16), np.float32)}


def export(name: str) -> Callable[[], tuple[bytes, Feed]]:
    """How to get a model of the catalogue with its usual inputs; benchmarks.fetch.Unavailable where it is not there."""
    model = MODELS[name]
    return lambda: (model.path().read_bytes(), model.feed(*model.timed_shape))


GOLDEN: dict[str, Callable[[], tuple[bytes, Feed]]] = {"blocks": blocks, **{name: export(name) for name in EXPORTS}}


def text_of(plan: Plan, feed: Feed) -> str:
    """A line for every launch, and what they sum up to."""
    lines, kernels = [], set()
    for step, grid, numbers in executed(plan, feed):
        assert isinstance(step.kernel, Launch)
        kernels.add(step.kernel.kernel)
        results = [plan.buffers[buffer] for buffer in step.outputs]
        written = " ".join(f"{found.dtype}[{', '.join(map(str, map(numbers, found.shape)))}]" for found in results)
        lines.append(f"{step.kernel.kernel.name:16}{'x'.join(map(str, grid)):>8}  {written}")
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
    head = f"# {shapes}; {PRECISION}, sm_{ARCH}: {len(lines)} launches of {len(kernels)} kernels"
    return "\n".join([head, *lines, ""])


def difference(name: str) -> str:
    """A unified diff from the golden plan to the one that lowering gives now; empty if they are equal."""
    model, feed = GOLDEN[name]()
    found = text_of(plan_of(model, PRECISION, ARCH), feed)
    path = PLANS / f"{name}.txt"
    golden = path.read_text() if path.exists() else ""
    return "".join(difflib.unified_diff(golden.splitlines(True), found.splitlines(True), str(path.name), "now"))


def update(name: str) -> None:
    model, feed = GOLDEN[name]()
    PLANS.mkdir(parents=True, exist_ok=True)
    (PLANS / f"{name}.txt").write_text(text_of(plan_of(model, PRECISION, ARCH), feed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_plans", description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(GOLDEN), choices=GOLDEN)
    parser.add_argument("--update", action="store_true", help="rewrite the golden plans to what lowering gives now")
    options = parser.parse_args(arguments)
    differences = [difference(name) for name in options.model]
    print("".join(differences) or "all plans are as they were")
    if options.update:
        for name in options.model:
            update(name)
    return 1 if any(differences) and not options.update else 0


if __name__ == "__main__":
    sys.exit(main())

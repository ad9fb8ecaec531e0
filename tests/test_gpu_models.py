"""Real models through the GPU's kernels, interpreted, beside the CPU device: convolutional ones on small images.

`python -m pytest -m "models or not models" tests/test_gpu_models.py` runs them all, within half an hour on two cores.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.utils
import pytest

pytest.importorskip("triton")

import gpu_engine
from benchmarks.fetch import Unavailable
from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.planning import kernels_of
from tests.gpu_plans import EXPORTS, GOLDEN, blocks, difference
from tests.offline import executed, plan_of

IMAGES = ("resnet18", "resnet50", "mobilenetv2", "mobilenetv3_large", "efficientnet_b0", "resnet18_qdq")
DEEP = ("vit_base",)
SHAPES: dict[str, tuple[int, ...]] = {
    "silero_vad": (2, 576, 16000),
    "ppocr_cls_v2": (1, 48, 48),
    "ppocrv4_det": (1, 64, 64),
    "ppocrv4_rec": (1, 48, 64),
    "unet": (1, 32, 32),
    "bert_small_sdpa": (2, 9),
    "bert_base": (1, 7),
    "vit_tiny": (1,),
    "smart_turn_v3_2_int8": (1,),
}
DEFAULT = ("silero_vad", "ppocr_cls_v2")
LAUNCHES = {"resnet50": 60, "mobilenetv2": 60, "bert_base": 100}
DISTINCT = {"resnet50": (42, 20), "mobilenetv2": (40, 20), "bert_base": (23, 15)}
"""Kernels that a plan has for any number of rows, and that one inference launches.

What differs between kernels is what machine code has as constants: the extents of a tile, whether sums are in parts,
the epilogue, and what of a window is known. From one row to thousands a layer has up to five tiles, with tf32 and
float16 two more for programs that walk over tiles: their 42 and 23 are such pairs of tile and epilogue, each once.
Extents, strides and what divides rows are parameters.
"""


def smaller(name: str, side: int = 64) -> tuple[bytes, Feed]:
    """A network for images of any size, and one small image."""
    proto = onnx.load(MODELS[name].path())
    (port,) = proto.graph.input
    for axis, text in ((2, "height"), (3, "width")):
        port.type.tensor_type.shape.dim[axis].dim_param = text
    del proto.graph.value_info[:]
    image = np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32)
    return proto.SerializeToString(), {port.name: image}


def shallower(name: str, norms: int = 2) -> tuple[bytes, Feed]:
    """A transformer up to the input of its layer normalization number `norms`, from 0 on, and one image."""
    proto = onnx.load(MODELS[name].path())
    ends = [node.input[0] for node in proto.graph.node if node.op_type == "LayerNormalization"]
    cut = onnx.utils.Extractor(proto).extract_model([port.name for port in proto.graph.input], [ends[norms]])
    return cut.SerializeToString(), MODELS[name].feed(1)


def case(name: str) -> tuple[bytes, Feed]:
    try:
        if name in IMAGES:
            return smaller(name)
        if name in DEEP:
            return shallower(name)
        model = MODELS[name]
        return model.path().read_bytes(), model.feed(*SHAPES[name])
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.models]) for name in (*SHAPES, *IMAGES, *DEEP)],
)
def test_the_gpu_gives_what_the_cpu_gives(name: str) -> None:
    model, feed = case(name)
    tolerance = MODELS[name].tolerance
    with (
        gpu_engine.compile(model, device="interpret", auto_batching=False) as ours,
        gpu_engine.compile(model, device="cpu", auto_batching=False) as cpu,
    ):
        found, expected = ours.run(feed), cpu.run(feed)
    for port, array in expected.items():
        np.testing.assert_allclose(found[port], array, tolerance.rtol, 2 * tolerance.atol, err_msg=port)
        assert tolerance.mean == math.inf or np.abs(found[port] - array).mean() <= tolerance.mean


@pytest.mark.models
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_an_inference(name: str, precision: str) -> None:
    model = MODELS[name]
    try:
        data = model.path().read_bytes()
    except Unavailable as reason:
        pytest.skip(str(reason))
    plan = plan_of(data, precision, 90)
    arrays = [step.source for step in plan.steps if isinstance(step.kernel, ArrayCall)]
    assert not arrays
    whole, used = DISTINCT[name]
    assert len(kernels_of(plan)) <= whole
    for batch in (1, 16, 64):
        steps = [step.kernel for step, *_ in executed(plan, model.feed(batch, *model.timed_shape[1:]))]
        assert len(steps) <= LAUNCHES[name]
        assert len({step.kernel for step in steps}) <= used


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.models] if name in EXPORTS else []) for name in GOLDEN]
)
def test_golden_plan(name: str) -> None:
    """`python -m tests.gpu_plans --update` rewrites it."""
    try:
        changes = difference(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not changes, changes


def test_blocks_give_what_the_cpu_gives() -> None:
    model, feed = blocks()
    with (
        gpu_engine.compile(model, device="interpret", auto_batching=False) as ours,
        gpu_engine.compile(model, device="cpu", auto_batching=False) as cpu,
    ):
        for rows in (1, 3):
            many = {name: np.repeat(array, rows, axis=0) for name, array in feed.items()}
            np.testing.assert_allclose(ours.run(many)["y"], cpu.run(many)["y"], 1e-4, 1e-4)

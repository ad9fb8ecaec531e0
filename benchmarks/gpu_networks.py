"""What `benchmarks.gpu` runs: networks out of skeletons in four precisions, with random inputs of any batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper, parser

from benchmarks import skeletons
from benchmarks.inputs import Array, Feed
from gpu_engine.ir.graph import Graph
from gpu_engine.tools.bundles import imported

IMAGE = {"pixel_values": (3, 224, 224)}
TEXT = {"input_ids": (128,), "attention_mask": (128,)}
ROWS: dict[str, Mapping[str, tuple[int, ...]]] = {
    "resnet50": IMAGE,
    "mobilenetv2": IMAGE,
    "efficientnet_b0": IMAGE,
    "vit_base": IMAGE,
    "bert_base": TEXT,
    "distilbert": TEXT,
    "whisper_tiny_encoder": {"input_features": (80, 3000)},
    "unet": {"image": (3, 224, 224)},
    "tiny_image": {"image": (3, 8, 8)},
    "tiny_text": {"input_ids": (5,), "attention_mask": (5,)},
}
"""One row of every input."""
NETWORKS = tuple(name for name in ROWS if not name.startswith("tiny"))
TINY = tuple(name for name in ROWS if name.startswith("tiny"))
"""Networks of a rehearsal, whose kernels are interpreted."""
NARROW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
NEAR = {"fp32": 1e-5, "tf32": 4e-3, "fp16": 4e-3, "bf16": 3e-2}
"""Relative distance that rounding may bring about in a whole network, about four times what it is for the worst of them
(mobilenetv2); another network's results are at 1 and more."""
GAINS = {"efficientnet_b0": 0.8}
"""Activations grow a hundredfold in this network with weights drawn anew, and rounding with them."""
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
TEXTS = {
    "tiny_image": """g (float[batch, 3, 8, 8] image) => (float[batch, 10] logits) {
        c = Conv <pads = [1, 1, 1, 1]> (image, filters)  r = Relu (c)  p = GlobalAveragePool (r)
        f = Flatten (p)  logits = MatMul (f, head) }""",
    "tiny_text": """g (int64[batch, s] input_ids, int64[batch, s] attention_mask) => (float[batch, s, 16] states) {
        e = Gather (words, input_ids)  p = MatMul (e, wide)  a = Gelu (p)
        states = LayerNormalization <axis = -1> (a, scale, shift) }""",
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny_image": {"filters": (8, 3, 3, 3), "head": (8, 10)},
    "tiny_text": {"words": (40, 8), "wide": (8, 16), "scale": (16,), "shift": (16,)},
}
VOCABULARY = {"tiny_text": 40}
WORDS = 30522


@dataclass(frozen=True)
class Network:
    """A model whose tensors are float32, or of 16 bits where the precision says so; `precision` is what the engine is
    to multiply in."""

    name: str
    precision: str
    model: bytes

    @property
    def engine_precision(self) -> str:
        """A model of 16 bits multiplies in its own type."""
        return "fp32" if self.precision in NARROW else self.precision

    def graph(self) -> Graph:
        """Optimized, as every device lowers it."""
        return imported(self.model)

    def feed(self, rows: int, seed: int = 0) -> Feed:
        """Random inputs of so many rows; other ones for every seed."""
        return {name: self._array(name, (rows, *shape), seed) for name, shape in ROWS[self.name].items()}

    def _array(self, name: str, shape: tuple[int, ...], seed: int) -> Array:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name == "input_ids":
            return random.integers(0, VOCABULARY.get(self.name, WORDS), shape)
        if name == "attention_mask":
            return np.ones(shape, np.int64)
        return random.standard_normal(shape, np.float32).astype(DTYPES.get(self.precision, np.dtype(np.float32)))


@cache
def network(name: str, precision: str, folder: Path = skeletons.FOLDER) -> Network:
    """A network by name, of a skeleton in `folder`; `Unavailable` where there is none."""
    model = _tiny(name) if name in TINY else skeletons.load(name, folder, GAINS.get(name, 1.0))
    if precision in NARROW:
        model = skeletons.converted(model, NARROW[precision])
    return Network(name, precision, bytes(model.SerializeToString()))


def _tiny(name: str) -> ModelProto:
    model = parser.parse_model(HEAD + TEXTS[name])
    random = np.random.default_rng(3)
    for key, shape in SHAPES[name].items():
        array = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    onnx.checker.check_model(model)
    return model


def distance(found: Array, expected: Array) -> float:
    """The norm of the difference over that of what is expected; infinite for other shapes and where anything is not
    finite."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    size = float(np.linalg.norm(b.ravel()))
    error = float(np.linalg.norm((a - b).ravel()))
    return error / size if size else error

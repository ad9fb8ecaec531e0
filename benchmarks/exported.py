"""Models that other frameworks export here, on demand, with random weights."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.audio import log_mel, speech
from benchmarks.fetch import Export
from benchmarks.inputs import Array, Feed, photos, tokens
from benchmarks.packaged import FIVE_BATCHES, SEQUENCES
from benchmarks.real_model import RealModel, Shape, Tolerance

TIMM_NEEDS = ("torch", "torchvision", "timm", "onnxscript")
BERT_NEEDS = ("torch", "transformers", "onnxscript")
TORCH_NEEDS = ("torch", "onnxscript")
ROWS_OF_16 = ((1,), (3,), (2,), (17,), (64,))


def _photo_feed(dtype: type[np.generic], rows: int) -> Feed:
    return {"pixel_values": photos(rows, 224, 224).astype(dtype)}


def _noise_feed(rows: int) -> Feed:
    """What the statistics were calibrated on; drawn pages make these random networks explode to 1e4."""
    images = np.random.default_rng(0).standard_normal((rows, 3, 224, 224))
    return {"pixel_values": images.astype(np.float32)}


def _timm_on_noise(name: str, atol: float) -> RealModel:
    return RealModel(name, Export(TIMM_NEEDS), _noise_feed, FIVE_BATCHES, Tolerance(atol), large=True)


def _timm(name: str, atol: float, dtype: type[np.generic] = np.float32) -> RealModel:
    feed = partial(_photo_feed, dtype)
    return RealModel(name, Export(TIMM_NEEDS), feed, FIVE_BATCHES, Tolerance(atol), True)


def _quantized(name: str, atol: float) -> RealModel:
    """Rounding ties fall either way: `atol` is two steps of resnet18's output, more through mobilenetv2's layers."""
    source, feed = Export(TIMM_NEEDS, "benchmarks.quantized"), partial(_photo_feed, np.float32)
    return RealModel(name, source, feed, FIVE_BATCHES, Tolerance(atol), large=True)


def _bert_feed(rows: int, length: int) -> Feed:
    ids, mask = tokens(rows, length)
    return {"input_ids": ids, "attention_mask": mask}


def _transformer(name: str, atol: float) -> RealModel:
    return RealModel(name, Export(BERT_NEEDS), _bert_feed, SEQUENCES, Tolerance(atol), large=True, timed=(1, 128))


def _signed(rows: int, mean: float) -> Array:
    """Rows around a mean: its sign takes a branch."""
    return (np.random.default_rng(rows).standard_normal((rows, 16)) * 0.1 + mean).astype(np.float32)


def _cond_feed(rows: int) -> Feed:
    return {"x": _signed(rows, 1.0 if rows % 2 else -1.0)}


def _loop_feed(rows: int, terms: int = 2) -> Feed:
    """Trips: the sum of 0, 1, 2 and so on, [terms]."""
    return {"x": _signed(rows, 0.0), "n": np.arange(terms, dtype=np.int64)}


def _flowers(rows: int) -> Feed:
    """Lengths and widths of leaves in cm: [rows, 4]."""
    return {"X": np.random.default_rng(rows).uniform((4, 2, 1, 0), (8, 4.5, 7, 2.5), (rows, 4)).astype(np.float32)}


def _estimator(name: str, atol: float) -> RealModel:
    """Sums of 50 trees' probabilities, or of exponentials, in float32: their order is free."""
    source = Export(("sklearn",), "benchmarks.estimators", ("skl2onnx==1.20.0",))
    shapes: tuple[Shape, ...] = ((1,), (3,), (2,), (50,), (257,))
    return RealModel(name, source, _flowers, shapes, Tolerance(atol), large=True)


EXPORTS = (
    _timm("resnet18", 5e-6),
    _timm("resnet50", 5e-6),
    _timm("mobilenetv2", 1e-5),
    _timm_on_noise("mobilenetv3_large", 5e-6),
    _timm_on_noise("efficientnet_b0", 5e-6),
    _timm("convnext_tiny", 5e-6),
    _timm("vit_tiny", 5e-6),
    _timm("vit_tiny_fp16", 2e-3, np.float16),
    _timm("vit_base", 5e-6),
    _quantized("resnet18_qdq", 1.1e-2),
    _quantized("mobilenetv2_qdq", 1.6e-1),
    _transformer("bert_base", 1e-5),
    _transformer("bert_small_sdpa", 1e-5),
    _transformer("distilbert", 2e-6),
    RealModel(
        "whisper_tiny_encoder",
        Export(BERT_NEEDS),
        lambda rows: {"input_features": log_mel(speech(rows, 480000), 80)[:, :, :3000]},
        ((1,), (3,), (2,)),
        Tolerance(1e-5),
        large=True,
    ),
    RealModel(
        "unet",
        Export(TORCH_NEEDS),
        lambda *shape: {"image": photos(*shape)},
        ((1, 64, 96), (3, 64, 64), (2, 128, 48), (1, 224, 224), (1, 16, 16)),
        Tolerance(7.2e-6),
        large=True,
        timed=(1, 224, 224),
    ),
    RealModel("torch_cond", Export(TORCH_NEEDS), _cond_feed, ROWS_OF_16, Tolerance(2e-6), large=True, one_batch=False),
    RealModel(
        "torch_while_loop",
        Export(TORCH_NEEDS),
        _loop_feed,
        ((1, 2), (3, 3), (2, 5), (4, 1), (17, 4)),
        Tolerance(2e-6),
        large=True,
        one_batch=False,
        row_axes={"n": None},
    ),
    _estimator("sklearn_forest", 2e-6),
    _estimator("sklearn_logistic_zipmap", 2e-6),
)

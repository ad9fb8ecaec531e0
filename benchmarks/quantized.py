"""Quantize exported networks to int8 with QDQ pairs: `python -m benchmarks.quantized NAME FILE`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.inputs import Feed
from benchmarks.models import MODELS

FLOAT = {"resnet18_qdq": "resnet18", "mobilenetv2_qdq": "mobilenetv2"}


class _Images(CalibrationDataReader):
    """Four images of standard normal noise."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._feeds: Iterator[Feed] = iter(
            [{"pixel_values": generator.standard_normal((1, 3, 224, 224)).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def export_qdq(name: str, path: str) -> None:
    """uint8 activations per tensor, int8 weights per channel, int32 biases."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(str(MODELS[FLOAT[name]].path()), prepared)
        quantize_static(
            prepared,
            path,
            _Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


if __name__ == "__main__":
    export_qdq(*sys.argv[1:3])

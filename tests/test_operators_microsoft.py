"""Fused products, activations and retired operators against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel
from tests.microsoft_models import agree, numbers

CONVOLUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {"activation": "Relu"}),
    ("b", {"activation": "Tanh", "strides": [2, 1]}),
    ("bz", {"activation": "Sigmoid", "dilations": [2, 1]}),
    ("z", {"activation": "LeakyRelu", "activation_params": [0.1], "pads": [1, 0, 2, 1]}),
    ("bz", {"activation": "Clip", "activation_params": [-0.5, 0.25], "auto_pad": "SAME_UPPER"}),
    ("b", {"activation": "HardSigmoid", "activation_params": [0.25, 0.4], "group": 2}),
    ("bz", {"activation": "HardSwish", "kernel_shape": [3, 2]}),
    ("bz", {}),
]


@pytest.mark.parametrize(("given", "attributes"), CONVOLUTIONS)
def test_fused_conv(given: str, attributes: dict[str, Any]) -> None:
    x, w = numbers(2, 4, 7, 6), numbers(6, 4 // attributes.get("group", 1), 3, 2, seed=1)
    plain = {key: value for key, value in attributes.items() if not key.startswith("activation")}
    (y,) = onnxruntime_exactly(node_model("::Conv", {"x": x, "w": w}, plain, opset=21), {"x": x, "w": w})
    inputs = {
        "x": x,
        "w": w,
        "b": numbers(6, seed=2) if "b" in given else None,
        "z": numbers(*y.shape, seed=3) if "z" in given else None,
    }
    agree("FusedConv", inputs, known=("w", "b"), **attributes)
    nhwc = {key: v if v is None or key in "wb" else v.transpose(0, 2, 3, 1) for key, v in inputs.items()}
    model = node_model("FusedConv", inputs, attributes)
    (expected,) = onnxruntime_exactly(model, {key: v for key, v in inputs.items() if v is not None})
    agree("NhwcFusedConv", nhwc, known=("w", "b"), expected=[expected.transpose(0, 2, 3, 1)], **attributes)

"""Export networks with random weights from PyTorch: `python -m benchmarks.exports NAME FILE`.

Needs the `bench` extra. Weights are random but fixed by a seed; BatchNorm statistics come from one calibration pass,
without which activations explode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.export import Dim

BATCH = Dim("batch", min=1, max=1024)
TIMM = {"resnet18": "resnet18", "resnet50": "resnet50", "mobilenetv2": "mobilenetv2_100"}


def export_timm(name: str, path: str) -> None:
    """[batch, 3, 224, 224] to [batch, 1000]."""
    keep = _stub_torchvision()
    import timm

    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)
    model = _calibrate(timm.create_model(TIMM[name], pretrained=False), images)
    _export(model, (images[:2],), path, ({0: BATCH},), ["pixel_values"], ["logits"])
    del keep


def export_bert(name: str, path: str) -> None:
    """input_ids and attention_mask [batch, seq] to last_hidden_state [batch, seq, 768]."""
    from transformers import BertConfig, BertModel

    class Bert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = BertModel(BertConfig(attn_implementation="eager"))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return result

    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (2, 16))
    dims = {0: BATCH, 1: Dim("seq", min=2, max=512)}
    example = (ids, torch.ones_like(ids))
    _export(Bert().eval(), example, path, (dims, dims), ["input_ids", "attention_mask"], ["last_hidden_state"])


EXPORTS: dict[str, Callable[[str, str], None]] = {**dict.fromkeys(TIMM, export_timm), "bert_base": export_bert}


def _stub_torchvision() -> torch.library.Library:
    """Operators that torchvision looks up at import and a CPU build of torch lacks; alive while the library is."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _calibrate(model: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def _export(
    model: torch.nn.Module, example: tuple[Any, ...], path: str, shapes: Any, inputs: list[str], outputs: list[str]
) -> None:
    torch.onnx.export(
        model,
        example,
        path,
        dynamo=True,
        opset_version=20,
        external_data=False,
        dynamic_shapes=shapes,
        input_names=inputs,
        output_names=outputs,
    )


if __name__ == "__main__":
    EXPORTS[sys.argv[1]](*sys.argv[1:3])

"""Export networks with random weights from PyTorch: `python -m benchmarks.exports NAME FILE`.

Needs the `bench` extra. Weights are random but fixed by a seed; BatchNorm statistics come from one calibration pass,
without which activations explode. Example batches have 2 rows: torch.export takes an extent of 1 for a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch._higher_order_ops import while_loop
from torch.export import Dim

BATCH = Dim("batch", min=1, max=1024)
SEQUENCE = Dim("seq", min=2, max=512)
TIMM = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet_b0",
    "convnext_tiny": "convnext_tiny",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_tiny_fp16": "vit_tiny_patch16_224",
    "vit_base": "vit_base_patch16_224",
}


def export_timm(name: str, path: str) -> None:
    """[batch, 3, 224, 224] to [batch, 1000]; float16 in and out where the name ends so."""
    import timm

    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)
    model = _calibrate(timm.create_model(TIMM[name], pretrained=False), images)
    if name.endswith("_fp16"):
        model, images = model.half(), images.half()
    _export(model, (images[:2],), path, ({0: BATCH},), ["pixel_values"], ["logits"])


class _Tokens(torch.nn.Module):
    """A transformer whose forward takes input_ids and attention_mask and returns one named tensor of its result."""

    def __init__(self, model: torch.nn.Module, result: str) -> None:
        super().__init__()
        self.model, self.result = model, result

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[self.result]
        return result


def export_bert(name: str, path: str) -> None:
    """[batch, seq] to last_hidden_state [batch, seq, hidden]; the small one keeps the default SDPA attention."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    base, small = (
        BertConfig(attn_implementation="eager"),
        BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
    )
    _export_tokens(_Tokens(BertModel(base if name == "bert_base" else small), "last_hidden_state"), path)


def export_distilbert(name: str, path: str) -> None:
    """[batch, seq] to logits [batch, 2]."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    _export_tokens(_Tokens(DistilBertForSequenceClassification(DistilBertConfig()), "logits"), path)


def export_whisper(name: str, path: str) -> None:
    """Log-mel [batch, 80, 3000] to last_hidden_state [batch, 1500, 384]."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = WhisperEncoder(
                WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
            )

        def forward(self, input_features: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.model(input_features).last_hidden_state
            return result

    torch.manual_seed(0)
    example = (torch.randn(2, 80, 3000),)
    _export(Encoder().eval(), example, path, ({0: BATCH},), ["input_features"], ["last_hidden_state"])


class _Level(torch.nn.Sequential):
    """Twice convolution, normalization, ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            *(torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.BatchNorm2d(after), torch.nn.ReLU()),
            *(torch.nn.Conv2d(after, after, 3, padding=1), torch.nn.BatchNorm2d(after), torch.nn.ReLU()),
        )


class _UNet(torch.nn.Module):
    """https://arxiv.org/abs/1505.04597 with padding; H and W are multiples of 8."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.down = torch.nn.ModuleList([_Level(3, widths[0]), *(_Level(*pair) for pair in pairs)])
        self.up = torch.nn.ModuleList([torch.nn.ConvTranspose2d(wide, thin, 2, 2) for thin, wide in reversed(pairs)])
        self.join = torch.nn.ModuleList([_Level(2 * thin, thin) for thin, _ in reversed(pairs)])
        self.head = torch.nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [self.down[0](x)]
        for level in list(self.down)[1:]:
            kept.append(level(torch.nn.functional.max_pool2d(kept[-1], 2)))
        y = kept.pop()
        for up, join in zip(self.up, self.join, strict=True):
            y = join(torch.cat([kept.pop(), up(y)], 1))
        result: torch.Tensor = self.head(y)
        return result


def export_unet(name: str, path: str) -> None:
    """[batch, 3, H, W] to [batch, 2, H, W], all but the channels dynamic."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    shape = {0: BATCH, 2: 8 * Dim("h8", min=2, max=128), 3: 8 * Dim("w8", min=2, max=128)}
    _export(_calibrate(_UNet(), images), (images,), path, (shape,), ["image"], ["mask"])


class _Cond(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def above(x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.linear(x))

        def below(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) * 2 - self.linear(x)

        result: torch.Tensor = torch.cond(x.mean() > 0, above, below, (x,))
        return result


class _WhileLoop(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        def again(i: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return i < n.sum()

        def body(i: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return i + 1, torch.tanh(self.linear(h)) + 0.1 * h

        result: torch.Tensor = while_loop(again, body, (torch.zeros((), dtype=torch.int64), x))[1]
        return result


def export_cond(name: str, path: str) -> None:
    """[batch, 16] to the same: an If on the sign of the mean."""
    torch.manual_seed(0)
    _export(_Cond().eval(), (torch.randn(2, 16),), path, ({0: BATCH},), ["x"], ["y"])


def export_while_loop(name: str, path: str) -> None:
    """x [batch, 16] and n [terms] to [batch, 16]: a Loop that runs as often as n sums to."""
    torch.manual_seed(0)
    example = (torch.randn(2, 16), torch.tensor([2, 3]))
    shapes = ({0: BATCH}, {0: Dim("terms", min=1, max=64)})
    _export(_WhileLoop().eval(), example, path, shapes, ["x", "n"], ["y"])


EXPORTS: dict[str, Callable[[str, str], None]] = {
    **dict.fromkeys(TIMM, export_timm),
    **dict.fromkeys(("bert_base", "bert_small_sdpa"), export_bert),
    "distilbert": export_distilbert,
    "whisper_tiny_encoder": export_whisper,
    "unet": export_unet,
    "torch_cond": export_cond,
    "torch_while_loop": export_while_loop,
}


def _export_tokens(model: _Tokens, path: str) -> None:
    ids, shape = torch.randint(0, 1000, (2, 16)), {0: BATCH, 1: SEQUENCE}
    inputs = ["input_ids", "attention_mask"]
    _export(model.eval(), (ids, torch.ones_like(ids)), path, (shape, shape), inputs, [model.result])


def _stub_torchvision() -> torch.library.Library:
    """Operators that torchvision, imported by timm and transformers, looks up and a CPU build of torch lacks.

    They live as long as the library that is returned.
    """
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
    library = _stub_torchvision()
    EXPORTS[sys.argv[1]](*sys.argv[1:3])

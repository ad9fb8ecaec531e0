"""Train the demo's digit network and write it with its held-out images: `python -m benchmarks.train_digits`.

Data: scikit-learn's digits, 1,797 grey images of 8 x 8 from "Optical Recognition of Handwritten Digits" by E. Alpaydin
and C. Kaynak (https://archive.ics.uci.edu/dataset/80, CC BY 4.0). Every fourth image is held out. Needs the `bench`
extra; a fixed seed on one thread gives the same file on the same machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

FOLDER = Path(__file__).parent.parent / "gpu_engine" / "tools" / "demo_data"
EPOCHS, ROWS = 60, 64
Array = NDArray[Any]


def main() -> None:
    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)
    held_out = np.arange(len(labels)) % 4 == 0
    network = train(images[~held_out], labels[~held_out])
    with torch.no_grad():
        guesses = network(torch.from_numpy(images[held_out])[:, None]).argmax(1).numpy()
    accuracy = float((guesses == labels[held_out]).mean())
    assert accuracy >= 0.98, f"only {accuracy:.2%} of the held-out images are read right"
    FOLDER.mkdir(exist_ok=True)
    onnx.save(to_onnx(network), FOLDER / "digits.onnx")
    np.savez_compressed(
        FOLDER / "digits.npz",
        images=digits.images[held_out].astype(np.uint8),
        labels=labels[held_out].astype(np.uint8),
    )
    sizes = ", ".join(f"{path.name} {path.stat().st_size:,} bytes" for path in sorted(FOLDER.glob("digits.*")))
    print(f"{accuracy:.2%} of {held_out.sum()} held-out images are read right; {sizes}")


def network() -> nn.Sequential:
    """[batch, 1, 8, 8] to [batch, 10] logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train(images: Array, labels: Array) -> nn.Sequential:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = network()
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    steps = EPOCHS * (len(y) // ROWS + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y)).split(ROWS):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(_shifted(x[rows])), y[rows], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """The images moved by up to one pixel each way and slightly noisy, so that 1,347 of them go further."""
    padded = functional.pad(images, (1, 1, 1, 1))
    down, right = (int(torch.randint(0, 3, ())) for _ in range(2))
    return padded[:, :, down : down + 8, right : right + 8] + 0.05 * torch.randn_like(images)


def to_onnx(model: nn.Sequential) -> onnx.ModelProto:
    """The network as plain ONNX operators, with softmax, over a dynamic `batch`."""
    nodes, weights, value = [], [], "images"
    for number, layer in enumerate(model):
        inputs, output = [value], f"layer{number}"
        for name, weight in layer.named_parameters():
            weights.append(numpy_helper.from_array(weight.detach().numpy(), f"layer{number}.{name}"))
            inputs.append(weights[-1].name)
        operator, attributes = _operator(layer)
        nodes.append(helper.make_node(operator, inputs, [output], f"/{output}/{operator}", **attributes))
        value = output
    nodes.append(helper.make_node("Softmax", [value], ["probabilities"], "/Softmax", axis=1))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])
    result = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "digits", [images], [result], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _operator(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    match layer:
        case nn.Conv2d():
            return "Conv", {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
        case nn.MaxPool2d():
            return "MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}
        case nn.Linear():
            return "Gemm", {"transB": 1}
        case nn.Flatten():
            return "Flatten", {}
    return "Relu", {}


if __name__ == "__main__":
    main()

"""Writes the demo's second network, whose cost is its weights: `python -m benchmarks.wide_network`.

Its four layers of 2,048 have 64 MB of weights, which it says in a few operators over a range of numbers: they are
folded when it is compiled, so that the file has less than a kilobyte.
"""

from __future__ import annotations

import onnx

from gpu_engine.tools.demo import FOLDER

WIDTH, LAYERS = 2048, 4
_HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def wide_network() -> onnx.ModelProto:
    """features [batch, 2048] -> scores [batch, 2048]; the weights of a layer are sines."""
    constants = f"""<int64[2] square = {{{WIDTH}, {WIDTH}}}, float first = {{0}}, float last = {{{WIDTH**2}}},
        float step = {{1}}, float size = {{{(2 / WIDTH) ** 0.5:.6f}}}>"""
    nodes, value = ["numbers = Range (first, last, step)"], "features"
    for i in range(LAYERS):
        output = "scores" if i == LAYERS - 1 else f"layer{i}"
        nodes.append(f"""
            speed{i} = Constant <value_float = {1.7 + i / 3:.6f}> ()
            angles{i} = Mul (numbers, speed{i})
            sines{i} = Sin (angles{i})
            row{i} = Mul (sines{i}, size)
            weights{i} = Reshape (row{i}, square)
            sums{i} = MatMul ({value}, weights{i})
            {output} = Relu (sums{i})""")
        value = output
    ports = f"(float[batch, {WIDTH}] features) => (float[batch, {WIDTH}] scores)"
    model = onnx.parser.parse_model(f"{_HEAD} wide {ports} {constants} {{ {' '.join(nodes)} }}")
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    onnx.save(wide_network(), FOLDER / "wide.onnx")

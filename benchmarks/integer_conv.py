"""Integer convolutions of real networks on one thread: by tiles and by Winograd's algorithms, in turns.

    python -m benchmarks.integer_conv [--seconds 0.5]

Layers of ResNet-18 and MobileNetV2 as int16 images and weights that were bytes, with requantisation: billions of
multiply-adds a second of CPU time, counting those of direct convolution, by tiles, by F(2x2, 3x3) and by F(4x4, 3x3);
`*` marks what `integer_winograd_choice` takes. Beside them the most that the processor does on registers alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contest import contest, native, peak, placed
from cpu_fallback.code import Code, Reg
from cpu_fallback.integer_conv import emit_integer_conv
from cpu_fallback.integer_winograd_choice import best_integer_winograd
from cpu_fallback.native import Target, host
from cpu_fallback.tiles import pair_multiply_add
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, INT16, INT32
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.channels_last import LastConv

LAYERS = (
    (64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1), (4, 64, 224, 7, 2),
    (64, 128, 56, 3, 2), (256, 512, 14, 3, 2), (16, 96, 112, 1, 1), (144, 24, 56, 1, 1), (576, 96, 14, 1, 1),
)  # fmt: skip
"""(channels, outputs, extent, kernel, stride)"""
SUM = expr.cast(expr.arg(0, INT32), FLOAT32) * expr.arg(1, FLOAT32) + expr.arg(2, FLOAT32)
REQUANTIZED = expr.cast(expr.round_even(expr.minimum(expr.maximum(SUM, 0.0), 255.0)), INT16, saturate=True)


def squared(target: Target, code: Code, total: Reg) -> Reg:
    """Two multiply-adds in every lane of 4 bytes."""
    return pair_multiply_add(code, target, total, total, total)


def measure(layer: tuple[int, ...], target: Target, seconds: float) -> None:
    channels, outputs, extent, kernel, stride = layer
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (1, extent, extent, channels)).astype(INT16)
    w = np.clip(random.standard_normal((outputs, channels, kernel, kernel)) * 35, -127, 127).astype(INT16)
    scale, bias = (random.random(outputs, dtype=np.float32) for _ in range(2))
    pads = (kernel // 2,) * 2
    op = LastConv((stride,) * 2, pads, pads, (1, 1), 1, REQUANTIZED, False, INT32)
    operands = [placed(array) for array in (x, w, scale / 1000, bias)]
    forms = (0, 2, 4) if (kernel, stride) == (3, 1) else (0,)
    (result,) = op.form.infer(*(type_of(array) for array in (x.transpose(0, 3, 1, 2), w)))
    out = (1, *result.shape[2:], outputs)
    chosen = best_integer_winograd(op.form, w, x.shape, out, target)
    found = [native(partial(emit_integer_conv, m=m), op, operands, target, (1,)) for m in forms]
    top = peak(target, partial(squared, target), "i32")
    contest([*found, top[0]], seconds)
    products = np.prod(out, dtype=np.int64) * np.prod(w.shape[1:]) / 1e9
    rates = [
        f"{products / contender.best_s:7.1f}{'*' if m == chosen else ' '}"
        for m, contender in zip(forms, found, strict=True)
    ]
    name = f"{channels}->{outputs} {extent}x{extent} {kernel}x{kernel} s{stride}"
    print(f"{name:28}{' '.join(rates):28} peak {top[1] / top[0].best_s / 1e9:6.1f}", flush=True)


def type_of(array: NDArray[Any]) -> TensorType:
    return TensorType(array.dtype, array.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    chosen = parser.parse_args()
    print("billions of multiply-adds a second: by tiles, F(2x2, 3x3), F(4x4, 3x3)")
    for layer in LAYERS:
        measure(layer, host(), chosen.seconds)


if __name__ == "__main__":
    main()

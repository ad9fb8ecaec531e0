"""Engine operations: frozen dataclasses that know `infer` and `evaluate`.

`evaluate(xp, *arrays)` is the reference over an array module: constant folding runs it, tests compare with it, and a
device that has no kernel of its own for an operation uses it. `shape_arithmetic = True` says that it also works on
object arrays of symbolic extents; `deterministic = False` that it must not be folded, and
`folds = False` that it is not, although it could be.
"""

from gpu_engine.ir.ops.attention import Attention
from gpu_engine.ir.ops.image import Resize
from gpu_engine.ir.ops.linear import Conv, ConvTranspose, MatMul
from gpu_engine.ir.ops.movement import (
    Concat,
    Expand,
    Gather,
    GatherElements,
    GatherND,
    Iota,
    Pad,
    Reshape,
    Slice,
    Transpose,
)
from gpu_engine.ir.ops.pointwise import Map
from gpu_engine.ir.ops.pooling import Pool
from gpu_engine.ir.ops.recurrent import Recurrent
from gpu_engine.ir.ops.reduction import ArgReduce, LayerNorm, LocalResponseNorm, Reduce, Softmax
from gpu_engine.ir.ops.weights import Dequantize

__all__ = [
    "ArgReduce",
    "Attention",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Dequantize",
    "Expand",
    "Gather",
    "GatherElements",
    "GatherND",
    "Iota",
    "LayerNorm",
    "LocalResponseNorm",
    "Map",
    "MatMul",
    "Pad",
    "Pool",
    "Recurrent",
    "Reduce",
    "Reshape",
    "Resize",
    "Slice",
    "Softmax",
    "Transpose",
]

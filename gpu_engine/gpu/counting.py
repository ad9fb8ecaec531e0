"""Iota and ShapeTensor: tensors that extents alone make."""

from __future__ import annotations

from gpu_engine.gpu.printing import is_printable_dtype
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.walks import write_inside, write_tile
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, INT32, is_float, is_integer
from gpu_engine.ir.expr import arg, cast
from gpu_engine.ir.graph import Node, ShapeTensor
from gpu_engine.ir.ops import Iota
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
MOST_NUMBERS = 64
"""Values of a ShapeTensor that are a kernel's parameters."""


def lower_iota(lowering: Lowering, op: Iota, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    if not is_printable_dtype(op.dtype) or op.dtype == BOOL:
        return False
    text = KernelText(lowering, "iota")
    tile = write_tile(text, [(op.extent, [1])], op.dtype.itemsize, "tl.program_id(0)", flat=True)
    (index,) = tile.indices

    def body(mask: str | None) -> None:
        text.store(outputs[0], index, text.evaluate(cast(arg(0, INT32), op.dtype), {0: index}), mask)

    write_inside(text, tile, body)
    text.launch([tile.programs], inputs, outputs)
    return True


def lower_shape_tensor(lowering: Lowering, op: ShapeTensor, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """The numbers are parameters of one launch, which a captured graph repeats without asking the host."""
    if not (is_integer(op.dtype) or is_float(op.dtype)) or len(op.values) > MOST_NUMBERS:
        return False
    if not is_printable_dtype(op.dtype):
        return False
    text = KernelText(lowering, "numbers")
    for i, value in enumerate(op.values):
        text.store(outputs[0], str(i), text.let("x", _scalar(text, value, str(op.dtype))))
    text.launch([1], inputs, outputs)
    return True


def _scalar(text: KernelText, value: Dim, dtype: str) -> str:
    if isinstance(value, int):
        return f"tl.full([], {value}, tl.{dtype})"
    return f"({text.number(value)} + tl.full([], 0, tl.int32)).to(tl.{dtype})"

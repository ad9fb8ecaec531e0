"""What a graph demands of its extents beyond what its types prove: checked at every binding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Attention, Concat, Conv, ConvTranspose, Expand, Map, MatMul, Recurrent, Reduce, Reshape
from gpu_engine.plan.plan import Requirement

Pair = tuple[Dim, Dim, bool]


def node_requirements(node: Node) -> list[Requirement]:
    """The relations that must hold when the node runs and that its types leave open."""
    kinds = ", ".join(str(value.type) for value in node.inputs)
    what = f"{type(node.op).__name__} of {kinds}"
    open_pairs = (pair for pair in _pairs(node) if not _holds(*pair))
    return [Requirement(left, right, broadcast, node.source, what) for left, right, broadcast in open_pairs]


def _pairs(node: Node) -> Iterator[Pair]:
    shapes = [value.shape for value in node.inputs]
    result = node.outputs[0].shape
    match node.op:
        case Map():
            yield from _broadcasts(shapes, result)
        case Reduce(before=before) if before is not None:
            (element,) = Map(before).infer(*(value.type for value in node.inputs))
            yield from _broadcasts(shapes, element.shape)
        case Expand():
            yield from _broadcasts(shapes, result)
        case Reshape(shape=shape):
            yield dims.product(shapes[0]), dims.product(shape), False
        case Concat(axis=axis):
            for shape in shapes:
                yield from ((a, b, False) for i, (a, b) in enumerate(zip(shape, result, strict=True)) if i != axis)
        case MatMul() as op:
            a, b, *extras = shapes
            yield a[-2 if op.transpose_a else -1], b[-1 if op.transpose_b else -2], False
            yield from _broadcasts([a[:-2], b[:-2]], result[:-2])
            yield from _broadcasts(extras, result)
        case Conv() as op:
            yield shapes[0][1], shapes[1][1] * op.group, False
            yield from _broadcasts(shapes[2:], result)
        case Attention():
            q, k, v, *masks = shapes
            yield q[-1], k[-1], False
            yield v[-2], k[-2], False
            yield from _broadcasts([q[:-2], k[:-2], v[:-2]], result[:-2])
            yield from _broadcasts(masks, (*result[:-2], q[-2], k[-2]))
        case Recurrent() as op:
            for _, shape, wanted in op.operand_shapes(*shapes):
                yield from ((a, b, False) for a, b in zip(shape, wanted, strict=True))
        case ConvTranspose():
            yield shapes[0][1], shapes[1][0], False
            yield from _broadcasts(shapes[2:], result)


def _broadcasts(shapes: Sequence[tuple[Dim, ...]], result: tuple[Dim, ...]) -> Iterator[Pair]:
    for shape in shapes:
        aligned = result[len(result) - len(shape) :]
        yield from ((a, b, True) for a, b in zip(shape, aligned, strict=True))


def _holds(left: Dim, right: Dim, broadcast: bool) -> bool:
    return left == right or (broadcast and left == 1)

"""ScatterElements and ScatterND: a copy of the data, then a kernel that writes the updates into it.

With a reduction, updates of one place are combined in their order, so that results repeat: places that can coincide lie
on one line, and a line belongs to one thread, or to one warp whose lanes settle coincidences among themselves. Without
a reduction coinciding places are an error of the model, and any of their updates may win. Indices out of range write
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_engine.gpu.cuda_source import CudaText
from gpu_engine.gpu.kernel import TRITON_TYPES
from gpu_engine.gpu.maps import Walked, emit_walk
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, INT32, INT64, compute_dtype
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.scatter import scatter_along
from gpu_engine.plan.axes import Shape, contiguous_strides
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
THREADS = 256
WARP = 32
COMBINE = {
    "add": "return T(W(a) + W(b));",
    "mul": "return T(W(a) * W(b));",
    "max": "return a >= b || a != a ? a : b;",
    "min": "return a <= b || a != a ? a : b;",
}
"""NaN wins over numbers."""


@dataclass(frozen=True)
class Places:
    """`entries` updates for each of `lines`. `find(text)` gives C lines that turn `e` and `l` into the update's element
    `from`, its target `to` and whether that is `inside`. `lines_inner` says that neighbouring lines lie side by side in
    memory, else neighbouring entries do."""

    entries: Dim
    lines: Dim
    lines_inner: bool
    find: Callable[[CudaText], str]


def lower_scatter(lowering: Lowering, op: Array, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    data, indices, updates = node.inputs
    attributes = dict(op.attributes)
    reduction = str(attributes.get("reduction", "none"))
    if data.dtype not in TRITON_TYPES or indices.dtype not in (INT32, INT64) or updates.dtype != data.dtype:
        return False
    if reduction != "none" and (reduction not in COMBINE or data.dtype == BOOL):
        return False
    if op.function is scatter_along:
        places = _along(data.shape, indices.shape, int(attributes["axis"]), inputs[1])
    else:
        depth = indices.shape[-1]
        if not isinstance(depth, int) or not depth:
            return False
        places = _by_tuples(data.shape, indices.shape, depth, inputs[1])
    wide = data.dtype if reduction == "none" else compute_dtype(data.dtype)
    target = outputs[0] if wide == data.dtype else lowering.buffer(wide, data.shape)
    source = inputs[2] if wide == data.dtype else lowering.buffer(wide, updates.shape)
    _convert(lowering, inputs[0], target, data.shape)
    if source != inputs[2]:
        _convert(lowering, inputs[2], source, updates.shape)
    _launch(lowering, reduction, places, inputs[1], source, target)
    if target != outputs[0]:
        _convert(lowering, target, outputs[0], data.shape)
    return True


def _convert(lowering: Lowering, source: int, target: int, shape: Shape) -> None:
    """A copy as elements of the target's type."""
    kinds = [lowering.buffers[buffer].dtype for buffer in (source, target)]
    strides = contiguous_strides(shape)
    root = expr.cast(expr.arg(0, kinds[0]), kinds[1])
    emit_walk(lowering, "map", root, [Walked(source, strides)], Walked(target, strides), shape)


def _along(shape: Shape, places: Shape, axis: int, indices: int) -> Places:
    """Lines run along the axis: what differs in another coordinate never coincides."""
    own, steps = contiguous_strides(shape), contiguous_strides(places)
    others = [other for other in range(len(shape)) if other != axis]

    def find(text: CudaText) -> str:
        number, lines = text.parameter, [f"int rest = l, to = 0, from = e * {text.parameter(steps[axis])}, c;"]
        for other in reversed(others):
            lines.append(f"c = rest % {number(places[other])}; rest /= {number(places[other])};")
            lines.append(f"to += c * {number(own[other])}; from += c * {number(steps[other])};")
        extent = number(shape[axis])
        lines.append(f"long long i = {text.buffer(indices)}[from]; i += i < 0 ? {extent} : 0;")
        lines.append(f"bool inside = i >= 0 && i < {extent}; to += (int)i * {number(own[axis])};")
        return " ".join(lines)

    return Places(places[axis], dims.product(places[other] for other in others), axis != len(shape) - 1, find)


def _by_tuples(shape: Shape, places: Shape, depth: int, indices: int) -> Places:
    """A line is one element of the slices that are written."""
    own, inner = contiguous_strides(shape), dims.product(shape[depth:])

    def find(text: CudaText) -> str:
        number = text.parameter
        lines = [f"int to = l, from = e * {number(inner)} + l; bool inside = true; long long i;"]
        for j in range(depth):
            extent = number(shape[j])
            lines.append(f"i = {text.buffer(indices)}[e * {depth} + {j}]; i += i < 0 ? {extent} : 0;")
            lines.append(f"inside = inside && i >= 0 && i < {extent}; to += (int)i * {number(own[j])};")
        return " ".join(lines)

    few = isinstance(inner, int) and inner < WARP
    return Places(dims.product(places[:-1]), inner, not few, find)


def _launch(lowering: Lowering, reduction: str, places: Places, indices: int, source: int, target: int) -> None:
    text = CudaText(lowering, f"scatter_{reduction}")
    given, written = text.buffer(source), text.buffer(target)
    lines, entries, find = text.parameter(places.lines), text.parameter(places.entries), places.find(text)
    text.lines(f"int t = blockIdx.x * {THREADS} + threadIdx.x;")
    if reduction == "none":
        threads = places.lines * places.entries
        split = (f"t / {lines}", f"t % {lines}") if places.lines_inner else (f"t % {entries}", f"t / {entries}")
        text.lines(f"""
            if (t >= {text.parameter(threads)}) return;
            int e = {split[0]}, l = {split[1]};
            {find}
            if (inside) {written}[to] = {given}[from];""")
    elif places.lines_inner:
        threads = places.lines
        text.lines(f"""
            int l = t;
            if (l >= {lines}) return;
            for (int e = 0; e < {entries}; e++) {{
              {find}
              if (inside) {written}[to] = combined({written}[to], {given}[from]);
            }}""")
    else:
        threads = places.lines * WARP
        text.lines(_by_warps(find, lines, entries, given, written))
    before = "" if reduction == "none" else _combination(text.element(target), reduction)
    text.launch([dims.ceil_div(threads, THREADS)], THREADS, (source, indices), (target,), before=before)


def _combination(element: str, reduction: str) -> str:
    """Integers wrap, which C leaves open where they are signed."""
    floating = element in ("float", "double")
    return f"""
        typedef {element} T;
        typedef {element if floating else "unsigned long long"} W;
        typedef {"int" if element.endswith(("char", "short")) else element} Exchanged;
        __device__ __forceinline__ T combined(T a, T b) {{ {COMBINE[reduction]} }}"""


def _by_warps(find: str, lines: str, entries: str, given: str, written: str) -> str:
    """A warp takes 32 entries of its line at a time; the first lane of those with one target writes for all."""
    return f"""
        int l = t / 32, lane = t % 32;
        if (l >= {lines}) return;
        for (int first = 0; first < {entries}; first += 32) {{
          int e = first + lane, target = -1 - lane;
          T value = 0;
          if (e < {entries}) {{
            {find}
            if (inside) target = to, value = {given}[from];
          }}
          unsigned same = __match_any_sync(~0u, target);
          bool writes = target >= 0 && __ffs(same) - 1 == lane;
          T total = writes ? {written}[target] : T(0);
          for (int other = 0; other < 32; other++) {{
            T update = (T)__shfl_sync(~0u, (Exchanged)value, other);
            if (writes && (same >> other & 1)) total = combined(total, update);
          }}
          if (writes) {written}[target] = total;
          __syncwarp();
        }}"""

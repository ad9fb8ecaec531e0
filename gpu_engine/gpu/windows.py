"""Windows of images: where in memory the elements are that a convolution or a pool folds, and whether they exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_engine.gpu.epilogues import number
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.plan.axes import Shape, contiguous_strides


@dataclass(frozen=True)
class Axis:
    """A spatial axis of `extent` elements, `pitch` apart in memory, and its `count` windows of `taps` elements.

    Tap t of window i is element i * stride - before + t * step, which is there if it lies in [low, high); `inside` says
    that all do. With `phases` there are that many kinds of windows, each with its own weights: of kind q, tap t of
    window i is element i + (q + before) // phases - t, if the kernel has an element (q + before) % phases + t * phases.
    """

    extent: Dim
    pitch: Dim
    count: Dim
    taps: int
    stride: int
    before: Dim
    step: int
    low: Dim
    high: Dim
    inside: bool = False
    phases: int = 1
    kernel: int = 0


@dataclass(frozen=True)
class Image:
    """[N, spatial..., channels] in a buffer, whatever the order of axes in memory."""

    buffer: int
    batch: Dim
    batch_pitch: Dim
    channel_pitch: Dim
    axes: tuple[Axis, ...]

    @property
    def counts(self) -> Shape:
        """Extents that the rows of a result count: of the batch, then windows."""
        return (self.batch, *(axis.count for axis in self.axes))

    @property
    def planar(self) -> bool:
        """Whether neighbouring windows may be neighbours in memory, so that loads along them can be wide."""
        return self.axes[-1].pitch == 1

    def extent(self, text: KernelText, dim: Dim) -> str:
        """A number that counts elements of axes."""
        return text.number(dim) if self.planar else text.parameter(dim, hint=False)


def pitches(shape: Shape, *, planar: bool) -> tuple[Dim, Dim, Shape]:
    """(of the batch, of channels, of every spatial axis) of an image [N, spatial..., C], or [N, C, spatial...]."""
    batch, *rest = contiguous_strides(shape)
    return (batch, rest[0], tuple(rest[1:])) if planar else (batch, rest[-1], tuple(rest[:-1]))


def unravelled(text: KernelText, index: str, extents: Sequence[Dim], form: Form = number) -> list[str]:
    """Names of the indices along axes of which `index` counts the points; "0" along those of one element."""
    names: list[str] = []
    left = [i for i, extent in enumerate(extents) if extent != 1]
    for i in reversed(range(len(extents))):
        if i not in left:
            names.insert(0, "0")
        elif i == left[0]:
            names.insert(0, index)
        else:
            with text.apart(f"extent {i}"):
                names.insert(0, text.let("i", f"{index} % {form(text, extents[i])}"))
                index = text.let("i", f"{index} // {form(text, extents[i])}")
    return names


Form = Callable[[KernelText, Dim], str]


def _literal(text: KernelText, dim: Dim) -> str:
    return text.number(dim)


def sum_of(terms: Sequence[str]) -> str:
    return " + ".join(terms) or "0"


def scaled(text: KernelText, index: str, pitch: Dim) -> list[str]:
    """The term that `index` adds to a place, if any."""
    if index == "0" or pitch == 0:
        return []
    return [index if pitch == 1 else f"{index} * {number(text, pitch)}"]


@dataclass(frozen=True)
class Walked:
    """An image while a kernel walks it: names of each axis' window origins, and of the place of a window's origin."""

    image: Image
    origins: tuple[str, ...]
    place: str
    kinds: tuple[str, ...]

    def tap(self, text: KernelText, tap: str, axes: str = "", window_axes: str = "") -> tuple[str, list[str]]:
        """(terms added to the place of the origin, masks) of an element of the windows, counted by `tap`.

        `axes` indexes what has the shape of `tap`, `window_axes` what has that of the origins.
        """
        indices = unravelled(text, tap, [axis.taps for axis in self.image.axes], _literal)
        terms, masks = [], []
        for i, (index, origin, kind) in enumerate(zip(indices, self.origins, self.kinds, strict=True)):
            axis = self.image.axes[i]
            offset = "0" if index == "0" else text.let("tap", f"{index} * {axis.step}" if axis.step != 1 else index)
            with text.apart(f"axis {i}"):
                terms += scaled(text, offset, axis.pitch)
                high = self.image.extent(text, axis.high)
            if axis.inside:
                continue
            at = text.let("at", f"({origin}){window_axes}" + (f" + ({offset}){axes}" if offset != "0" else ""))
            masks.append(f"({at} >= {text.number(axis.low)}) & ({at} < {high})")
            if axis.kernel % axis.phases:
                masks.append(f"(({kind} + {index} * {axis.phases} < {axis.kernel}){axes})")
        return sum_of(terms), masks


def walk(text: KernelText, image: Image, rows: str, phase: str = "0", first: str = "") -> Walked:
    """Lines before the first tap; `rows` count the windows of all images, `first` is a term more of their place."""
    batch, *points = unravelled(text, rows, image.counts, image.extent)
    phases = unravelled(text, phase, [axis.phases for axis in image.axes], _literal)
    origins, kinds = [], []
    with text.apart("images"):
        terms = scaled(text, batch, image.batch_pitch) + [first] * bool(first)
    for i, (axis, point, q) in enumerate(zip(image.axes, points, phases, strict=True)):
        shift, kind = f" - {text.number(axis.before)}" if axis.before != 0 else "", "0"
        if axis.phases > 1:
            begun = text.let("q", f"{q} + {text.number(axis.before)}")
            shift, kind = f" + {begun} // {axis.phases}", text.let("q", f"{begun} % {axis.phases}")
        elif axis.step < 0:
            shift = f" + {text.number(axis.before)}"
        if point == "0":
            point = f"({rows} * 0)"
        with text.apart(f"stride {i}"):
            start = point if axis.stride == 1 and image.planar else f"{point} * {image.extent(text, axis.stride)}"
        origins.append(text.let("origin", f"{start}{shift}"))
        kinds.append(kind)
        with text.apart(f"axis {i}"):
            terms += scaled(text, origins[-1], axis.pitch)
    return Walked(image, tuple(origins), text.let("place", sum_of(terms)), tuple(kinds))


def valid(extent: Dim, before: Dim, after: Dim) -> tuple[Dim, Dim]:
    """The elements of an axis that windows may see: negative pads hide some."""
    return dims.maximum(0, -before), dims.minimum(extent, extent + after)


def never_outside(before: Dim, after: Dim) -> bool:
    """Whether windows lie in an axis wholly, for these pads."""
    return all(isinstance(pad, int) and pad <= 0 for pad in (before, after))

"""What tests and benchmarks know of a real model: its file, its client's inputs, shapes, how near answers must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fetch import Source, fetch
from benchmarks.inputs import Feed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """|ours - reference| <= atol + rtol * |reference|.

    `atol` is at least twice the distance of ONNX Runtime with all optimisations from itself with none, on a client's
    input: both engines are within that distance of the exact answer, in different directions. Where that distance is
    next to nothing (a saturated softmax) it is 16 units in the last place of a float32 output near 1; where ONNX
    Runtime is further from onnx's reference evaluator in float64 than from itself, twice that distance (magika: 1.5e-5
    against our 3.4e-7; voice detectors' states: 5.2e-6 against our 1.5e-6; unet: 3.6e-6).

    A rounding to int8 that falls the other way moves everything behind it. `mean` bounds the mean of the differences:
    it tells some moved values from a wrong network.
    """

    atol: float
    rtol: float = 0.0
    mean: float = math.inf


@dataclass(frozen=True)
class RealModel:
    """`shapes` are sets of extents that `feed` turns into inputs; the first has 1 row, the second 3 if it can.

    `row_axes` names the inputs whose rows are not on axis 0, None where all requests bring the same; `one_batch` says
    whether requests of one row each can share an execution. `state` are outputs that a client feeds back, each with
    its input; `feed` then takes the number of the call too.
    """

    name: str
    source: Source
    feed: Callable[..., Feed]
    shapes: tuple[Shape, ...]
    tolerance: Tolerance
    large: bool = False
    one_batch: bool = True
    row_axes: Mapping[str, int | None] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    timed: Shape = ()

    @property
    def timed_shape(self) -> Shape:
        """What benchmarks measure: the size that clients bring, where tests begin with a smaller one."""
        return self.timed or self.shapes[0]

    def path(self) -> Path:
        """The model file, fetched on the first call; raises `benchmarks.fetch.Unavailable`."""
        return fetch(self.name, self.source)

"""Argument words of a device's steps: addresses and numbers, all of a segment gathered at once when it is bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_engine.ir.dims import Dim
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.plan import Plan, root
from gpu_engine.plan.zones import Ints


@dataclass(frozen=True)
class Address:
    """The memory of a buffer, from `offset` bytes on."""

    buffer: int
    offset: Dim = 0


Word = Address | Dim


@dataclass(frozen=True)
class Gather:
    """Where each word comes from: `places` in [numbers, addresses of the segment's own buffers, addresses of constants,
    `literals`, addresses of `foreign` buffers, which earlier segments own]; `shifts` are (word, number to add)."""

    places: Ints
    literals: Ints
    foreign: tuple[int, ...]
    shifts: tuple[Ints, Ints]


def gather(
    plan: Plan, words: Sequence[Word], numbers: Numbers, owned: Sequence[int], constants: Mapping[int, int]
) -> Gather:  # fmt: skip
    """How to gather `words` for a segment that owns the root buffers `owned`; `constants` maps root buffers to places
    among the addresses of constants. All numbers but offsets have their places before: addresses lie behind them."""
    own = {buffer: i for i, buffer in enumerate(owned)}
    literals: dict[int, int] = {}
    foreign: dict[int, int] = {}
    kinds: list[tuple[int, int]] = []
    shifts: list[tuple[int, int]] = []
    for i, word in enumerate(words):
        if isinstance(word, Address):
            owner = root(plan.buffers, word.buffer)
            if owner in constants:
                kinds.append((2, constants[owner]))
            elif owner in own:
                kinds.append((1, own[owner]))
            else:
                kinds.append((4, foreign.setdefault(owner, len(foreign))))
            if word.offset != 0:
                shifts.append((i, numbers.place(word.offset)))
        elif isinstance(word, int):
            kinds.append((3, literals.setdefault(word, len(literals))))
        else:
            kinds.append((0, numbers.place(word)))
    sizes = (len(numbers), len(owned), max(constants.values(), default=-1) + 1, len(literals))
    starts = np.cumsum([0, *sizes])
    columns = np.array(shifts, np.intp).reshape(-1, 2)
    return Gather(
        np.array([starts[kind] + place for kind, place in kinds], np.intp),
        np.array([_signed(value) for value in literals], np.int64),
        tuple(foreign),
        (columns[:, 0].copy(), columns[:, 1].copy()),
    )


def _signed(word: int) -> int:
    """The 64 bits of a word as a signed number."""
    return word - (1 << 64) if word >= 1 << 63 else word

"""Array: an operator of the long tail as a function over an array module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_engine.ir import dims
from gpu_engine.ir.graph import TensorType


@dataclass(frozen=True)
class Array:
    """`function(xp, *arrays, **attributes)` returns an array, or a tuple of them; an absent operand is None.

    `outputs` are the types; a symbol among them that no operand has is data-dependent: it is bound when the step has
    run, to the extent that came out. `present` says which of the function's operands are given. With `host`, the
    function takes NumPy arrays on every device (strings, decoding). `mixes` are the axes that the function works
    along: along any other axis a place of every output depends on the same place of the first `aligned` operands
    alone, which have the same extent there. None: nothing is said.
    """

    function: Callable[..., Any]
    outputs: tuple[TensorType, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    present: tuple[bool, ...] = ()
    binds: tuple[str, ...] = ()
    deterministic: bool = True
    host: bool = False
    mixes: tuple[int, ...] | None = None
    aligned: int = 1

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return self.outputs

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        given = iter(arrays)
        operands = [next(given) if here else None for here in self.present] if self.present else arrays
        result = self.function(xp, *operands, **dict(self.attributes))
        results = result if isinstance(result, tuple) else (result,)
        return tuple(
            xp.asarray(array).astype(kind.dtype, copy=False) for array, kind in zip(results, self.outputs, strict=True)
        )


def unbound_symbols(outputs: tuple[TensorType, ...], inputs: tuple[TensorType, ...]) -> tuple[str, ...]:
    """The symbols of `outputs` that no input has, sorted: what only running can bind."""
    known = {name for kind in inputs for extent in kind.shape for name in dims.symbols(extent)}
    found = {name for kind in outputs for extent in kind.shape for name in dims.symbols(extent)}
    return tuple(sorted(name for name in found - known if name.startswith("u")))

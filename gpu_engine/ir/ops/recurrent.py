"""Recurrent: LSTM, GRU and RNN over time, behind the product of all inputs with their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import TensorType

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
OPTIONAL = ("bias", "lengths", "initial_h", "initial_c", "peepholes", "scale", "zero")
State = dict[str, Any]
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Recurrent:
    """https://onnx.ai/onnx/operators/onnx__LSTM.html, __GRU and __RNN, for `kind` "lstm", "gru" or "rnn".

    Operands, with T steps, B rows, D directions, H hidden and G gates (i o f c; z r h; one):
    inputs [T, B, D*G*H], the products of x with the input weights, biases included; weights [D, G*H, H]; then those
    that `present` names, in the order of OPTIONAL: bias [D, H], added to the hidden gate's product before the reset
    gate multiplies it (gru with `linear_before_reset`); lengths [B] int32, the steps of each row; initial_h and
    initial_c [D, B, H]; peepholes [D, 3*H] (i o f); scale and zero [D] or [D, G*H], with which the weights are int8 or
    uint8 and the state is quantised anew at every step, over all rows, as DynamicQuantizeLinear does.

    Results: [T, D, B, H], 0 beyond a row's length; the last state [D, B, H]; for lstm the last cell state as well.
    `reverse` says for each direction whether it runs backwards. `activations` holds per direction the functions of one
    element: f g h of lstm, f g of gru, f of rnn. `clip` bounds what enters them. Floats narrower than float32 are
    computed in float32 and the state is kept so.
    """

    kind: str
    reverse: tuple[bool, ...]
    activations: tuple[tuple[Expr, ...], ...]
    present: tuple[str, ...] = ()
    clip: float | None = None
    input_forget: bool = False
    linear_before_reset: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, weights = inputs[:2]
        directions, gates, hidden = weights.shape
        if x.rank != 3 or directions != len(self.reverse) or gates != GATES[self.kind] * hidden:
            raise InvalidModel(f"{self.kind} of {x} with recurrent weights {weights} in {len(self.reverse)} directions")
        steps, rows, width = x.shape
        if isinstance(width, int) and isinstance(gates, int) and width != directions * gates:
            raise InvalidModel(f"{self.kind} of {x} with recurrent weights {weights}")
        for name, operand, shape in self.operand_shapes(*(operand.shape for operand in inputs)):
            if len(operand) != len(shape):
                raise InvalidModel(f"{self.kind} with {name} {list(operand)} where {list(shape)} is needed")
        state = TensorType(x.dtype, (directions, rows, hidden))
        sequence = TensorType(x.dtype, (steps, directions, rows, hidden))
        return (sequence, state, state) if self.kind == "lstm" else (sequence, state)

    def operand_shapes(self, *shapes: Shape) -> list[tuple[str, Shape, Shape]]:
        """(name, shape, the shape it must have) of the inputs and the optional operands, for the shapes of all."""
        (steps, rows, _), (directions, gates, hidden) = shapes[:2]
        wanted = {"bias": (directions, hidden), "lengths": (rows,), "peepholes": (directions, 3 * hidden)}
        wanted |= dict.fromkeys(("initial_h", "initial_c"), (directions, rows, hidden))
        found: list[tuple[str, Shape, Shape]] = [("inputs", shapes[0], (steps, rows, directions * gates))]
        for name, shape in zip(self.present, shapes[2:], strict=True):
            found.append((name, shape, wanted.get(name, (directions, gates)[: max(1, len(shape))])))
        return found

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, weights, *rest = arrays
        wide = compute_dtype(x.dtype)
        given = dict(zip(self.present, rest, strict=True))
        x = x.astype(wide, copy=False)
        runs = [self._direction(xp, x, weights, given, d) for d in range(len(self.reverse))]
        sequences, *states = zip(*runs, strict=True)
        results = (xp.stack(sequences, axis=1), *(xp.stack(state) for state in states))
        return tuple(array.astype(arrays[0].dtype, copy=False) for array in results)

    def _direction(self, xp: Any, x: Any, weights: Any, given: State, d: int) -> tuple[Any, ...]:
        hidden, width = weights.shape[2], weights.shape[1]
        x = x[:, :, d * width : (d + 1) * width]
        own = {name: array if name == "lengths" else array[d].astype(x.dtype) for name, array in given.items()}
        zeros = xp.zeros((x.shape[1], hidden), x.dtype)
        h, c = own.get("initial_h", zeros), own.get("initial_c", zeros)
        product = _quantised_product(xp, weights[d], own) if "scale" in own else _product(xp, weights[d], x.dtype)
        step = {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[self.kind]
        sequence = xp.zeros((*x.shape[:2], hidden), x.dtype)
        order = range(x.shape[0])
        for t in reversed(order) if self.reverse[d] else order:
            new_h, new_c = step(xp, x[t], h, c, product, own, self.activations[d])
            if "lengths" in own:
                active = (own["lengths"] > t)[:, None]
                sequence[t] = xp.where(active, new_h, 0)
                h, c = xp.where(active, new_h, h), xp.where(active, new_c, c)
            else:
                sequence[t] = h = new_h
                c = new_c
        return (sequence, h, c) if self.kind == "lstm" else (sequence, h)

    def _lstm(self, xp: Any, x: Any, h: Any, c: Any, product: Any, own: State, functions: Any) -> tuple[Any, Any]:
        f, g, last = functions
        i, o, forget, cell = xp.split(x + product(h, slice(None)), 4, axis=-1)
        to = xp.split(own["peepholes"], 3) if "peepholes" in own else None
        i = self._apply(xp, f, i + to[0] * c if to else i)
        forget = 1 - i if self.input_forget else self._apply(xp, f, forget + to[2] * c if to else forget)
        c = forget * c + i * self._apply(xp, g, cell)
        return self._apply(xp, f, o + to[1] * c if to else o) * self._apply(xp, last, c, clip=False), c

    def _gru(self, xp: Any, x: Any, h: Any, c: Any, product: Any, own: State, functions: Any) -> tuple[Any, Any]:
        f, g = functions
        hidden = h.shape[1]
        z, r = (
            self._apply(xp, f, x[:, part] + product(h, part)) for part in (slice(0, hidden), slice(hidden, 2 * hidden))
        )
        part = slice(2 * hidden, 3 * hidden)
        if self.linear_before_reset:
            new = x[:, part] + r * (product(h, part) + own.get("bias", 0))
        else:
            new = x[:, part] + product(r * h, part)
        return (1 - z) * self._apply(xp, g, new) + z * h, c

    def _rnn(self, xp: Any, x: Any, h: Any, c: Any, product: Any, own: State, functions: Any) -> tuple[Any, Any]:
        return self._apply(xp, functions[0], x + product(h, slice(None))), c

    def clipped(self, functions: Sequence[Expr]) -> tuple[Expr, ...]:
        """The functions of one direction with the clip in front; the last one of an LSTM has none."""
        if self.clip is None:
            return tuple(functions)
        free = 2 if self.kind == "lstm" else len(functions)
        return tuple(
            expr.substitute(function, {0: expr.clip(expr.arg(0, function.dtype), -self.clip, self.clip)})
            if i < free
            else function
            for i, function in enumerate(functions)
        )

    def _apply(self, xp: Any, function: Expr, x: Any, *, clip: bool = True) -> Any:
        x = xp.clip(x, -self.clip, self.clip) if clip and self.clip is not None else x
        return expr.evaluate(function, [x], xp)


def _product(xp: Any, weights: Any, dtype: Any) -> Callable[[Any, slice], Any]:
    columns = weights.astype(dtype, copy=False).T
    return lambda h, part: xp.matmul(h, columns[:, part])


def _quantised_product(xp: Any, weights: Any, own: State) -> Callable[[Any, slice], Any]:
    """The product with a state quantised to uint8: sums of products of bytes are exact in float64."""
    columns = weights.T.astype(np.float64) - own["zero"].astype(np.float64)

    def product(h: Any, part: slice) -> Any:
        if h.size == 0:
            return xp.matmul(h, columns[:, part].astype(h.dtype))
        low, high = xp.minimum(h.min(), h.dtype.type(0)), xp.maximum(h.max(), h.dtype.type(0))
        scale = xp.where(high == low, h.dtype.type(1), (high - low) / h.dtype.type(255))
        zero = xp.clip(xp.rint(-low / scale), 0, 255)
        whole = xp.clip(xp.rint(h / scale) + zero, 0, 255) - zero
        total = xp.matmul(whole.astype(np.float64), columns[:, part])
        factors = own["scale"][part] if own["scale"].ndim else own["scale"]
        return total.astype(h.dtype) * (scale * factors)

    return product

"""Binding: the extents of one execution turn a plan's symbolic dims into numbers, by generated arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpu_engine.errors import InputError, OutOfMemory
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, Sym
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Op
from gpu_engine.ir.parameters import op_dims
from gpu_engine.plan.plan import Requirement


class Numbers:
    """The distinct dims of a part of a plan, each with a place in the vector that `evaluate` gives."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._places: dict[Dim, int] = {}
        self._requirements: list[Requirement] = []
        self._checks: list[tuple[int, int, bool]] = []
        self._evaluate: Callable[..., tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def place(self, dim: Dim) -> int:
        """Where the value of `dim` will stand. Not after `compile`."""
        assert self._evaluate is None
        return self._places.setdefault(dim, len(self._places))

    def require(self, requirements: Iterable[Requirement]) -> None:
        """Check these relations at every evaluation."""
        for requirement in requirements:
            self._requirements.append(requirement)
            self._checks.append((self.place(requirement.left), self.place(requirement.right), requirement.broadcast))

    def compile(self) -> None:
        """Generate the arithmetic; no dim can be added afterwards."""
        self._evaluate = evaluator(list(self._places), self.names)

    def evaluate(self, extents: Sequence[int]) -> tuple[int, ...]:
        """The value of every dim, by place; InputError if the extents contradict a requirement, OutOfMemory if
        one does not fit 64 bits."""
        assert self._evaluate is not None
        try:
            values = self._evaluate(*extents)
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(self._explain(extents, str(error))) from error
        if values and not -(1 << 63) <= min(values) <= max(values) < 1 << 63:
            raise OutOfMemory(f"extents beyond 64 bits with {self._bound(extents)}")
        for left, right, may_be_one in self._checks:
            if values[left] != values[right] and not (may_be_one and values[left] == 1):
                raise InputError(self._contradiction(values, extents))
        return values

    def _contradiction(self, values: tuple[int, ...], extents: Sequence[int]) -> str:
        """Names the first requirement that does not hold."""
        for requirement, (left, right, may_be_one) in zip(self._requirements, self._checks, strict=True):
            a, b = values[left], values[right]
            if a != b and not (may_be_one and a == 1):
                verb = "does not broadcast to" if may_be_one else "should be"
                return (
                    f"{requirement.source}: {requirement.what}: extent {a} ({requirement.left}) {verb} {b} "
                    f"({requirement.right}) with {self._bound(extents)}"
                )
        raise AssertionError("every requirement holds")

    def _explain(self, extents: Sequence[int], message: str) -> str:
        """Names the first requirement whose extents cannot be computed."""
        for requirement in self._requirements:
            for dim in (requirement.left, requirement.right):
                try:
                    evaluator([dim], self.names)(*extents)
                except (ValueError, ZeroDivisionError) as error:
                    return f"{requirement.source}: {requirement.what}: {error} with {self._bound(extents)}"
        return f"{message} with {self._bound(extents)}"

    def _bound(self, extents: Sequence[int]) -> str:
        return ", ".join(f"{name}={value}" for name, value in zip(self.names, extents, strict=True))


Resolver = Callable[[Sequence[int]], Op]


def op_resolver(op: Op, numbers: Numbers) -> Resolver | None:
    """From evaluated numbers to `op` with ints for its symbolic extents; None where it has none."""
    if not op_dims(op):
        return None
    fields = {name: _field_resolver(value, numbers) for name, value in vars(op).items() if _symbolic(value)}

    def resolve(values: Sequence[int]) -> Op:
        resolved: Any = object.__new__(type(op))
        resolved.__dict__.update(op.__dict__)
        resolved.__dict__.update({name: field(values) for name, field in fields.items()})
        return resolved  # type: ignore[no-any-return]

    return resolve


def _symbolic(field: Any) -> bool:
    return isinstance(field, Sym) or (isinstance(field, tuple) and any(map(_symbolic, field)))


def _field_resolver(field: Any, numbers: Numbers) -> Callable[[Sequence[int]], Any]:
    if isinstance(field, Sym):
        place = numbers.place(field)
        return lambda values: values[place]
    if _symbolic(field):
        items = [_field_resolver(item, numbers) for item in field]
        return lambda values: tuple([item(values) for item in items])
    return lambda values: field


def solve_binds(
    shapes: Sequence[tuple[Dim, ...]], found: Sequence[tuple[int, ...]], known: Mapping[str, int]
) -> dict[str, int]:
    """The extents that the shapes which came out bind, where the declared `shapes` name them; ValueError if they
    contradict the declared ones."""
    values: dict[str, int] = {}
    for shape, actual in zip(shapes, found, strict=True):
        if len(shape) != len(actual):
            raise ValueError(f"a result of {len(actual)} axes where {len(shape)} were declared")
        for dim, extent in zip(shape, actual, strict=True):
            for name in dims.symbols(dim):
                if dim == dims.symbol(name) and name not in known:
                    values.setdefault(name, extent)
    for shape, actual in zip(shapes, found, strict=True):
        for dim, extent in zip(shape, actual, strict=True):
            expected = dims.substitute(dim, {**known, **values})
            if not isinstance(expected, int) or max(expected, 0) != extent:
                raise ValueError(f"a result of shape {list(actual)} where {list(map(str, shape))} was declared")
    return values

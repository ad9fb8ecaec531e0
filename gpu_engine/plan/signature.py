"""Signature matching: the shapes of a caller's arrays give the extents that a plan is bound to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.errors import InputError
from gpu_engine.ir.dims import Dim, Sym, Symbol, substitute, symbols
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.plan import Plan, Port

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Executions that differ in nothing but their number of rows.

    `key` holds every other extent, `place` is where the rows stand among the extents. `blocks` says for each input how
    much of axis 0 one row takes, 0 if the input does not carry the batch. `output_shapes` are those of one row, None if
    they depend on data.
    """

    key: Shape
    place: int | None
    blocks: Shape
    output_shapes: tuple[Shape, ...] | None

    def extents(self, rows: int) -> Shape:
        """The values of `plan.symbols` for an execution of `rows` rows."""
        if self.place is None:
            return self.key
        return (*self.key[: self.place], rows, *self.key[self.place :])


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What a set of input shapes means to a plan: `rows` of a family (1 if batching is not proven), as `extents`."""

    family: Family
    rows: int
    extents: Shape


class Signature:
    """Solves input shapes for a plan's symbols and checks everything that the ports declare."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        batch = plan.batching.symbol
        self.place = plan.symbols.index(batch) if batch is not None and not plan.batching.refused else None
        self._grouped = _is_grouped(plan, batch) if self.place is not None else ""
        output_dims = [dim for port in plan.output_ports for dim in port.shape]
        known = set().union(*map(symbols, output_dims)) <= set(plan.symbols)
        self._input_extents = evaluator([dim for port in plan.input_ports for dim in port.shape], plan.symbols)
        self._output_extents = evaluator(output_dims, plan.symbols) if known else None
        self._requirements = Numbers(plan.symbols)
        self._requirements.require(
            r for r in plan.requirements if symbols(r.left) | symbols(r.right) <= set(plan.symbols)
        )
        self._requirements.compile()

    def fit(self, shapes: Sequence[Shape]) -> Fit:
        """The extents that `shapes`, in the order of the inputs, bind; InputError names the first that cannot be."""
        values = self._solve(shapes)
        extents = tuple(values[name] for name in self.plan.symbols)
        self._requirements.evaluate(extents)
        if self.place is None:
            return Fit(self._family(extents, None), 1, extents)
        key = extents[: self.place] + extents[self.place + 1 :]
        return Fit(self._family(key, self.place), extents[self.place], extents)

    def input_shapes(self, extents: Shape) -> tuple[Shape, ...]:
        """The shapes of all inputs at these values of `plan.symbols`."""
        return _cut(self._input_extents(*extents), self.plan.input_ports)

    def _family(self, key: Shape, place: int | None) -> Family:
        one_row = key if place is None else (*key[:place], 1, *key[place:])
        inputs, outputs = _cut(self._input_extents(*one_row), self.plan.input_ports), None
        if self._output_extents is not None:
            try:
                outputs = _cut(self._output_extents(*one_row), self.plan.output_ports)
            except ValueError as error:
                raise InputError(f"the inputs' extents do not fit each other: {error}") from error
        batched = self.plan.batching.inputs if place is not None else (False,) * len(inputs)
        blocks = tuple(shape[0] if carries else 0 for shape, carries in zip(inputs, batched, strict=True))
        return Family(key, place, blocks, outputs)

    def _solve(self, shapes: Sequence[Shape]) -> dict[str, int]:
        values: dict[str, int] = {self._grouped: 1} if self._grouped else {}
        origins: dict[str, str] = {}
        open_dims: list[tuple[Dim, int, str]] = []
        for port, shape in zip(self.plan.input_ports, shapes, strict=True):
            _check_rank(port, shape)
            for axis, (dim, extent) in enumerate(zip(port.shape, shape, strict=True)):
                where = f"input {port.name!r}, axis {axis}"
                if not _bind(dim, extent, where, values, origins):
                    open_dims.append((dim, extent, where))
        _solve_rest(open_dims, values, origins)
        missing = [name for name in self.plan.symbols if name not in values]
        if missing:
            raise InputError(f"the inputs' shapes do not determine {', '.join(missing)}")
        return values


def _is_grouped(plan: Plan, batch: str | None) -> str:
    """The batch symbol if shapes do not tell it, since a row takes an open extent of axis 0: then they are of one."""
    extents = [port.shape[0] for port, carries in zip(plan.input_ports, plan.batching.inputs, strict=True) if carries]
    return batch if batch is not None and all(len(symbols(extent)) > 1 for extent in extents) else ""


def describe_shape(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _cut(extents: Shape, ports: Sequence[Port]) -> tuple[Shape, ...]:
    """The flat extents of all ports as one shape each."""
    shapes, start = [], 0
    for port in ports:
        shapes.append(tuple(extents[start : start + len(port.shape)]))
        start += len(port.shape)
    return tuple(shapes)


def _check_rank(port: Port, shape: Shape) -> None:
    if len(shape) != len(port.shape):
        raise InputError(
            f"input {port.name!r} has rank {len(shape)} (shape {describe_shape(shape)}), but the model takes {port}"
        )


def _bind(dim: Dim, extent: int, where: str, values: dict[str, int], origins: dict[str, str]) -> bool:
    """Check an int, or solve `factor * symbol + offset`; False for a dim of another form."""
    if isinstance(dim, int):
        if dim != extent:
            raise InputError(f"{where}: the extent is {extent}, but the model takes {dim}")
        return True
    line = _line(dim)
    if line is None:
        return False
    name, factor, offset = line
    value, rest = divmod(extent - offset, factor)
    if rest or value < 0:
        raise InputError(f"{where}: the extent is {extent}, but the model takes {dim}, and no whole {name} gives that")
    if values.setdefault(name, value) != value:
        raise InputError(
            f"{where}: the extent {extent} makes {name} = {value}, but {origins[name]} makes it {values[name]}"
        )
    origins.setdefault(name, where)
    return True


def _line(dim: Sym) -> tuple[str, int, int] | None:
    """(symbol, factor, offset) of a dim that is linear in one symbol, else None."""
    offset = sum(count for monomial, count in dim.terms if not monomial)
    rest = [(monomial, count) for monomial, count in dim.terms if monomial]
    match rest:
        case [((Symbol(name=name),), count)]:
            return name, count, offset
    return None


def _solve_rest(open_dims: list[tuple[Dim, int, str]], values: dict[str, int], origins: dict[str, str]) -> None:
    """Put known symbols into the remaining dims until each is checked; InputError if one stays open."""
    while open_dims:
        still_open = []
        for dim, extent, where in open_dims:
            known = substitute(dim, {name: values[name] for name in symbols(dim) if name in values})
            known = max(known, 0) if isinstance(known, int) else known
            if not _bind(known, extent, where, values, origins):
                still_open.append((dim, extent, where))
        if len(still_open) == len(open_dims):
            unknown = ", ".join(f"{where} ({dim})" for dim, _, where in still_open)
            raise InputError(f"the inputs' shapes do not determine every extent: {unknown}")
        open_dims = still_open

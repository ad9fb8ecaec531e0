"""Extents to numbers: generated Python that evaluates many symbolic extents at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_engine.ir.dims import Atom, Dim, Monomial, Symbol, bounds


def evaluator(dims: Sequence[Dim], names: Sequence[str]) -> Callable[..., tuple[int, ...]]:
    """f(*values of names) -> the values of all `dims`, as generated Python that computes each subterm once."""
    writer = _Writer({name: f"s{i}" for i, name in enumerate(names)})
    results = [writer.write(dim) for dim in dims]
    arguments = ", ".join(f"s{i}" for i in range(len(names)))
    body = "".join(f"    {line}\n" for line in writer.lines)
    source = f"def evaluate({arguments}):\n{body}    return ({', '.join(results)}{',' if results else ''})\n"
    scope: dict[str, Any] = {"broadcast": _broadcast_values}
    exec(compile(source, "<dims>", "exec"), scope)
    return scope["evaluate"]  # type: ignore[no-any-return]


class _Writer:
    """Prints dims as let-lines, one per distinct subterm."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names, self.lines = names, []  # type: tuple[Mapping[str, str], list[str]]
        self.known: dict[Any, str] = {}

    def let(self, key: object, text: str) -> str:
        if key not in self.known:
            self.known[key] = f"t{len(self.known)}"
            self.lines.append(f"{self.known[key]} = {text}")
        return self.known[key]

    def write(self, dim: Dim) -> str:
        """The name of `dim`'s value, clamped at 0."""
        if isinstance(dim, int):
            return repr(dim)
        text = self.sum(dim)
        low, _ = bounds(dim)
        if low is not None and low >= 0 and all(count > 0 for _, count in dim.terms):
            return text
        return self.let(("clamp", dim), f"{text} if {text} > 0 else 0")

    def sum(self, dim: Dim) -> str:
        if isinstance(dim, int):
            return repr(dim)
        if dim in self.known:
            return self.known[dim]
        parts = [self.term(monomial, count) for monomial, count in dim.terms]
        return parts[0] if len(parts) == 1 else self.let(dim, " + ".join(parts))

    def term(self, monomial: Monomial, count: int) -> str:
        name = ""
        for i, atom in enumerate(monomial):
            text = self.atom(atom)
            name = self.let(("product", monomial[: i + 1]), f"{name} * {text}") if name else text
        if not name:
            return repr(count)
        return name if count == 1 else self.let((monomial, count), f"{count} * {name}")

    def atom(self, atom: Atom) -> str:
        if isinstance(atom, Symbol):
            return self.names[atom.name]
        args = [self.sum(arg) for arg in atom.args]
        match atom.function:
            case "floordiv":
                text = f"{args[0]} // {args[1]}"
            case "mod":
                text = f"{args[0]} % {args[1]}"
            case "many":
                text = f"0 if {args[0]} == 1 else 1"
            case function:
                text = f"{function}({', '.join(args)})"
        return self.let(atom, text)


def _broadcast_values(a: int, b: int) -> int:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    raise ValueError(f"extents {a} and {b} do not broadcast")

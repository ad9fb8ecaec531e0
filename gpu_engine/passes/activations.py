"""Activations in one form: GELU, SiLU and hard-swish become the same Expr however an exporter spelled them.

Each of them has a mark, a subexpression that little else has: erf, tanh, the reciprocal of 1 + exp(-x), a clip. What
surrounds the mark is read as a polynomial in x and the mark, so that the order and nesting of products, x / 6 for
x * (1 / 6), and factors multiplied out make no difference. The constants may differ by rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Builder, Graph, Node, Op, Value, rewrite

Monomial = tuple[Expr, ...]
Polynomial = dict[Monomial, float]
TOLERANCE = {FLOAT64: 1e-12, FLOAT32: 2e-6, FLOAT16: 1e-3, BFLOAT16: 8e-3}
MARKS = frozenset({"erf", "tanh", "div", "min", "max"})
ROOT = math.sqrt(2 / math.pi)
MAX_TERMS, MAX_DEGREE = 4, 4


def canonical_activations(graph: Graph) -> Graph:
    """The graph with every expression through `canonical`."""
    return rewrite(graph, _canonical_node)


def _canonical_node(node: Node, builder: Builder) -> tuple[Value, ...] | None:
    found = expressions(node.op)
    changed = {name: canonical(root) for name, root in found.items()}
    if all(changed[name] is root for name, root in found.items()):
        return None
    return builder.emit_all(dataclasses.replace(node.op, **changed), *node.inputs)  # type: ignore[type-var]


def expressions(op: Op) -> dict[str, Expr]:
    """The fields of an operation that hold expressions."""
    fields = dataclasses.fields(op)  # type: ignore[arg-type]
    return {field.name: found for field in fields if isinstance(found := getattr(op, field.name), Expr)}


def gelu(x: Expr) -> Expr:
    return 0.5 * x * (1 + expr.erf(x * 0.7071067811865476))


def gelu_tanh(x: Expr) -> Expr:
    return 0.5 * x * (1 + expr.tanh(ROOT * (x + 0.044715 * x**3)))


def silu(x: Expr) -> Expr:
    return x * expr.sigmoid(x)


def hard_swish(x: Expr) -> Expr:
    return x * expr.clip(x * (1 / 6) + 0.5, 0, 1)


def canonical(root: Expr) -> Expr:
    """`root` with known activations inside it as `gelu`, `gelu_tanh`, `silu` and `hard_swish` write them."""
    for _ in range(8):
        found = _next_activation(expr.walk(root))
        if found is None:
            break
        root = expr.replace(root, dict([found]))
    return root


def _next_activation(nodes: Sequence[Expr]) -> tuple[Expr, Expr] | None:
    """(subexpression, its canonical form) for the first activation that is not in canonical form."""
    for i, mark in enumerate(nodes):
        if mark.op not in MARKS or mark.dtype not in TOLERANCE:
            continue
        if mark.op == "div" and mark.args[0].op != "const":
            mark = expr.apply("div", 1, mark.args[1])
        for wanted, x, built in readings(mark):
            if any(node is built for node in nodes):
                continue
            forms = polynomials(nodes, x)
            for node in nodes[i:]:
                if node.dtype == mark.dtype and close(forms[node], wanted, mark.dtype):
                    return node, built
    return None


def readings(mark: Expr) -> Iterator[tuple[Polynomial, Expr, Expr]]:
    """(polynomial in x and the mark, x, canonical form) of the activations that `mark` may belong to."""
    bounds = clip_bounds(mark)
    if bounds is not None:
        argument: Expr | None = bounds[0]
    elif mark.op == "div":
        argument = sigmoid_argument(mark)
    else:
        argument = mark.args[0] if mark.op in ("erf", "tanh") else None
    within = expr.walk(argument) if argument is not None else []
    for x in reversed(within):
        if x.op == "const" or x.dtype != mark.dtype:
            continue
        form = polynomials(within, x)[within[-1]]
        half = {(x,): 0.5, monomial(x, mark): 0.5}
        if mark.op == "erf" and close(form, {(x,): math.sqrt(0.5)}, x.dtype):
            yield half, x, gelu(x)
        elif mark.op == "tanh" and close(form, {(x,): ROOT, (x, x, x): ROOT * 0.044715}, x.dtype):
            yield half, x, gelu_tanh(x)
        elif mark.op == "div" and close(form, {(x,): -1.0}, x.dtype):
            yield {monomial(x, mark): 1.0}, x, silu(x)
        elif bounds is not None and bounds[1] == 0 < bounds[2]:
            _, _, high = bounds
            if close(form, {(x,): high / 6, (): high / 2}, x.dtype):
                yield {monomial(x, mark): 1 / high}, x, hard_swish(x)


def sigmoid_argument(mark: Expr) -> Expr | None:
    """u of 1 / (1 + exp(u)), or None."""
    above, below = mark.args
    if above.op != "const" or above.value != 1 or below.op != "add":
        return None
    for one, other in (below.args, below.args[::-1]):
        if one.op == "const" and one.value == 1 and other.op == "exp":
            return other.args[0]
    return None


def clip_bounds(mark: Expr) -> tuple[Expr, float, float] | None:
    """(u, low, high) of min(max(u, low), high) or max(min(u, high), low), operands in any order."""
    outer = bounded(mark)
    inner = None if outer is None else bounded(outer[0])
    if outer is None or inner is None or {mark.op, outer[0].op} != {"min", "max"}:
        return None
    low, high = (inner[1], outer[1]) if mark.op == "min" else (outer[1], inner[1])
    return inner[0], low, high


def bounded(node: Expr) -> tuple[Expr, float] | None:
    """(x, c) of min or max of x and a constant."""
    if node.op not in ("min", "max"):
        return None
    for x, bound in (node.args, node.args[::-1]):
        if bound.op == "const":
            return x, float(bound.value)
    return None


def polynomials(nodes: Sequence[Expr], x: Expr) -> dict[Expr, Polynomial]:
    """Every node, operands first, as a polynomial in x and the nodes that are none (`x` and reciprocals among them)."""
    forms: dict[Expr, Polynomial] = {}
    for node in nodes:
        form = None if node is x or node.dtype not in TOLERANCE else _combined(node, forms)
        if form is None or len(form) > MAX_TERMS or any(len(key) > MAX_DEGREE for key in form):
            form = {(node,): 1.0}
        forms[node] = form
    return forms


def _combined(node: Expr, forms: dict[Expr, Polynomial]) -> Polynomial | None:
    match node.op, node.args:
        case "const", _:
            return {(): float(node.value)} if math.isfinite(node.value) else None
        case "neg", (a,):
            return times(forms[a], {(): -1.0})
        case "add", (a, b):
            return plus(forms[a], forms[b])
        case "sub", (a, b):
            return plus(forms[a], times(forms[b], {(): -1.0}))
        case "mul", (a, b):
            return times(forms[a], forms[b])
        case "div", (a, Expr(op="const", value=value)) if value:
            return times(forms[a], {(): 1 / float(value)})
        case "div", (a, b) if a.op != "const":
            return times(forms[a], {(expr.apply("div", 1, b),): 1.0})
    return None


def plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in a.keys() | b.keys()}


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for left, scale in a.items():
        for right, factor in b.items():
            key = monomial(*left, *right)
            result[key] = result.get(key, 0.0) + scale * factor
    return result


def monomial(*atoms: Expr) -> Monomial:
    return tuple(sorted(atoms, key=id))


def close(form: Polynomial, wanted: Polynomial, dtype: DType) -> bool:
    """Whether the coefficients agree as far as constants rounded to `dtype` can tell."""
    tolerance = TOLERANCE[dtype]
    return form.keys() == wanted.keys() and all(
        math.isclose(form[key], value, rel_tol=tolerance) for key, value in wanted.items()
    )

"""Bodies of control flow are graphs of their own and go through the same passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite


def optimize_bodies(graph: Graph, optimize: Callable[[Graph], Graph]) -> Graph:
    """The graph with `optimize` applied to every graph that is a parameter of an operation."""

    def rule(node: Node, builder: Builder) -> tuple[Value, ...] | None:
        fields = dataclasses.fields(node.op)  # type: ignore[arg-type]
        bodies = {field.name: body for field in fields if isinstance(body := getattr(node.op, field.name), Graph)}
        if not bodies:
            return None
        changed = {name: optimize(body) for name, body in bodies.items()}
        return builder.emit_all(dataclasses.replace(node.op, **changed), *node.inputs)  # type: ignore[type-var]

    return rewrite(graph, rule)

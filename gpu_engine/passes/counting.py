"""Rewriting by rules that ask how many users a value has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_engine.ir.graph import Builder, Graph, Node, Value, rewrite, use_counts

Uses = dict[Value, int]
CountingRule = Callable[[Node, Builder, Uses], Sequence[Value] | None]


def rewrite_counting(graph: Graph, rule: CountingRule) -> Graph:
    """`rewrite` with a rule that also gets the use counts of the values it sees.

    A replacement inherits the uses of what it replaces; a value unknown to the counts has many users for all one knows.
    """
    uses = use_counts(graph)

    def counted(node: Node, builder: Builder) -> Sequence[Value] | None:
        start = len(builder.nodes)
        replaced = rule(node, builder, uses)
        if replaced is None:
            return None
        emitted = builder.nodes[start:]
        inner = {value for made in emitted for value in made.outputs}
        for value in (operand for made in emitted for operand in made.inputs if operand in inner):
            uses[value] = uses.get(value, 0) + 1
        for old, new in zip(node.outputs, replaced, strict=True):
            if new is not old:
                uses[new] = uses.get(new, 0) + uses.get(old, 0)
        return replaced

    return rewrite(graph, counted)


def only_user(value: Value, node: Node, uses: Uses) -> bool:
    """Whether `node` is the only user of `value`, however often."""
    return uses.get(value) == node.inputs.count(value)

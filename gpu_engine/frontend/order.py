"""The order of a graph's nodes: every name made before it is used."""

from __future__ import annotations

from collections.abc import Container, Sequence

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.model import ModelNode, graphs_of


def sort_nodes(nodes: Sequence[ModelNode], known: Container[str]) -> Sequence[ModelNode]:
    """`nodes` with every name made before it is used; InvalidModel for a cycle, a dangling or a repeated name."""
    makers = {name: node for node in nodes for name in node.outputs if name}
    if len(makers) != sum(name != "" for node in nodes for name in node.outputs):
        raise InvalidModel("two nodes make the same name")
    needs = {id(node): {name for name in free_names(node) if name} for node in nodes}
    for node in nodes:
        dangling = sorted(name for name in needs[id(node)] if name not in makers and name not in known)
        if dangling:
            raise InvalidModel(f"{node.op_type} {node.name!r} uses {', '.join(dangling)}, which nothing makes")
    before = {id(node): {id(makers[name]) for name in needs[id(node)] if name in makers} for node in nodes}
    order: dict[int, ModelNode] = {}
    for root in nodes:
        stack, entered = [root], set[int]()
        while stack:
            node = stack[-1]
            waiting = [
                makers[name] for name in sorted(needs[id(node)]) if name in makers and id(makers[name]) not in order
            ]
            if id(node) in order or not before[id(node)] - order.keys():
                order[id(node)] = stack.pop()
            elif id(node) in entered:
                raise InvalidModel(f"the graph has a cycle through {node.op_type} {node.name!r}")
            else:
                entered.add(id(node))
                stack.extend(waiting)
    return list(order.values())


def free_names(node: ModelNode) -> set[str]:
    """The names that a node uses: its inputs and what the graphs among its attributes take from outside."""
    names = set(node.inputs)
    for graph in graphs_of(node):
        inside = {info.name for info in graph.inputs} | set(graph.initializers)
        inside |= {name for inner in graph.nodes for name in inner.outputs}
        names |= {name for inner in graph.nodes for name in free_names(inner)} - inside
        names |= {info.name for info in graph.outputs} - inside
    return names

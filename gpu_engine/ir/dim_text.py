"""Extents as models spell them: names, numbers and arithmetic over them."""

from __future__ import annotations

import ast

from gpu_engine.ir.dims import Dim, Undecided, floor_div, modulo, symbol


def parse(text: str) -> Dim | None:
    """The extent that a dim_param such as "8*h" or "batch" spells, or None if it is not arithmetic over names."""
    try:
        return _parse_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, ZeroDivisionError, Undecided):
        return None


def _parse_node(node: ast.expr) -> Dim:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _parse_node(left), _parse_node(right)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return floor_div(a, b)
                case ast.Mod():
                    return modulo(a, b)
    raise ValueError("not arithmetic over names")

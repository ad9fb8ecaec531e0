"""A model as text: ports, batching, and the steps of its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_engine.compiler import open_device
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.options import parse_device
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Buffer, Plan, Port


def describe(model: Path, device: str, graph_text: bool = False) -> str:
    """Everything that `gpu-engine inspect` prints; raises what compile() raises."""
    opened, reason = open_device(parse_device(device))
    graph = optimize(import_model(read(model), SpecificationFunctions()))
    plan = opened.lower(graph, prove(graph))
    constants = [buffer.constant for buffer in plan.buffers if buffer.constant is not None]
    weights = sum(constant.nbytes for constant in constants)
    lines = [f"device    {opened.name} ({reason})", f"batching  {_batching(plan)}"]
    lines += [*_ports("inputs", plan.input_ports), *_ports("outputs", plan.output_ports)]
    lines += [f"steps: {len(plan.steps)}; constants: {len(constants)} of {weights:,} bytes", *_steps(plan)]
    return "\n".join([*lines, *([str(graph)] if graph_text else [])])


def _batching(plan: Plan) -> str:
    if plan.batching.refused:
        return f"refused: {plan.batching.refused}"
    return f"along {plan.batching.symbol}" if plan.batching.symbol else "no input carries a batch"


def _ports(title: str, ports: Sequence[Port]) -> list[str]:
    return [title, *(f"  {port}" for port in ports)]


def _steps(plan: Plan) -> Iterator[str]:
    for number, step in enumerate(plan.steps):
        outputs = ", ".join(_buffer(plan.buffers[index]) for index in step.outputs)
        binds = f", binds {', '.join(step.binds)}" if step.binds else ""
        yield f"  {number:4} {outputs}{binds}  {step.source}"


def _buffer(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]"

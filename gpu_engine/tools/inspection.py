"""A compiled engine as text: ports, batching, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpu_engine.plan.plan import Buffer, Plan, Port
from gpu_engine.runtime.sizing import BatchPlan


def describe(device: str, plan: Plan, batch: BatchPlan) -> str:
    """Everything that `gpu-engine inspect` prints."""
    constants = [buffer.constant for buffer in plan.buffers if buffer.constant is not None]
    weights = sum(constant.nbytes for constant in constants)
    lines = [f"device {device}", *_ports("inputs", plan.input_ports), *_ports("outputs", plan.output_ports)]
    refused = f", refused: {plan.batching.refused}" if plan.batching.refused else ""
    lines += ["batching", f"  along {plan.batching.symbol}{refused}"]
    lines += [f"  batch {batch.batch}: {batch.reason} (bound by: {batch.limiting_factor})"]
    lines += [f"steps ({len(plan.steps)}; {len(constants)} constants of {weights:,} bytes)", *_steps(plan)]
    return "\n".join(lines)


def _ports(title: str, ports: Sequence[Port]) -> list[str]:
    return [title, *(f"  {port}" for port in ports)]


def _steps(plan: Plan) -> Iterator[str]:
    for number, step in enumerate(plan.steps):
        outputs = ", ".join(_buffer(plan.buffers[index]) for index in step.outputs)
        binds = f", binds {', '.join(step.binds)}" if step.binds else ""
        yield f"  {number:4} {outputs}{binds}  {step.source}"


def _buffer(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]"

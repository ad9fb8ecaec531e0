"""Everything that can be said of a model without running it, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_engine.compiler import open_device
from gpu_engine.errors import DependsOnValues, DeviceError
from gpu_engine.frontend.importer import caller_inputs, is_open, missing_operators
from gpu_engine.frontend.model import Model, nested_nodes
from gpu_engine.frontend.reader import SpecificationFunctions
from gpu_engine.gpu.launches import ArrayCall, BodyCall
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import gpu_plan, kernels_of
from gpu_engine.gpu.program import launched
from gpu_engine.ir.graph import Graph
from gpu_engine.options import parse_device
from gpu_engine.passes.batchability import prove
from gpu_engine.plan.plan import Batching, Plan, Port
from gpu_engine.tools.memory_map import memory_facts
from gpu_engine.tools.stages import (
    Extents,
    Lower,
    Stages,
    counted,
    extents_of,
    kernel_name,
    label,
    nodes_of_steps,
    read_named,
    short,
    stages_of,
)

Facts = dict[str, Any]


def inspect_model(
    path: Path, device: str, given: Extents, architectures: Sequence[int], precision: str, graph_text: bool
) -> Facts:
    """What `gpu-engine inspect` tells. A model with operators that are missing is described as far as it goes; else
    raises what compile() raises. `graph_text` adds the text of the graph before and after the passes."""
    model = read_named(path)
    facts: Facts = {"model": str(path), **_file_facts(model)}
    if facts["unsupported"]:
        return facts
    lower, facts["device"] = _lowering(device, architectures, precision)
    waits = _why_later(model)
    if not waits:
        try:
            stages = stages_of(model, lower)
        except DependsOnValues as error:
            waits = f"it is compiled for every value of its small integer inputs: {error}"
    if waits:
        return facts | {"compiled_later": waits}
    return facts | _stage_facts(stages, given, architectures, precision, graph_text)


def _file_facts(model: Model) -> Facts:
    """The file, and the operators that nothing here can run."""
    nodes = list(nested_nodes(model.graph.nodes))
    missing = missing_operators(model, SpecificationFunctions())
    return {
        "producer": model.producer,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opsets.items()},
        "onnx_operators": counted(f"{node.domain}.{node.op_type}".lstrip(".") for node in nodes),
        "unsupported": [
            {"domain": domain or "ai.onnx", "operator": name, "opset": version, "nodes": count}
            for (domain, name, version), count in sorted(missing.items())
        ],
    }


def _why_later(model: Model) -> str:
    """Why a model cannot be compiled before its inputs are seen; empty if it can."""
    open_inputs = [info.name for info in caller_inputs(model) if is_open(info)]
    return f"the inputs {', '.join(open_inputs)} are compiled for when they are seen" if open_inputs else ""


def _lowering(device: str, architectures: Sequence[int], precision: str) -> tuple[Lower, str]:
    """How plans are made, and for what; a GPU that is not here can be planned for if its architecture is given."""
    choice = parse_device(device)
    try:
        opened, reason = open_device(choice, precision=precision)
    except DeviceError:
        if choice.kind != "cuda" or not architectures:
            raise
        arch = architectures[0]

        def lower(graph: Graph, batching: Batching) -> Plan:
            return gpu_plan(graph, batching, GpuOptions(precision, arch))

        return lower, f"sm_{arch}, which is not here"
    return opened.lower, f"{opened.name} ({reason})"


def _stage_facts(
    stages: Stages, given: Extents, architectures: Sequence[int], precision: str, graph_text: bool
) -> Facts:
    plan = stages.plan
    extents = extents_of(plan, given)
    members, nowhere = nodes_of_steps(stages.imported, {step.source for step in plan.steps})
    read = {node.source for node in stages.imported.nodes}
    folded = [label(node, stages.model) for node in stages.model.graph.nodes if label(node, stages.model) not in read]
    facts: Facts = {
        "inputs": [_port(port) for port in plan.input_ports],
        "outputs": [_port(port) for port in plan.output_ports],
        "extents": extents,
        "batching": _batching(plan.batching),
        "operations_before": counted(type(node.op).__name__ for node in stages.imported.nodes),
        "operations_after": counted(type(node.op).__name__ for node in stages.optimized.nodes),
        "steps": _steps(plan, members),
        "no_step": [short(source) for source in nowhere],
        "folded": [short(source) for source in folded],
        "kernels": counted(kernel_name(step) for step in plan.steps),
        "memory": memory_facts(plan, extents),
        "gpu": [gpu_facts(stages.optimized, arch, precision, extents) for arch in architectures],
    }
    if graph_text:
        facts |= {"graph_before": str(stages.imported), "graph_after": str(stages.optimized)}
    return facts


def _port(port: Port) -> Facts:
    return {"name": port.name, "dtype": str(port.dtype), "shape": [*map(str, port.shape)]}


def _batching(batching: Batching) -> Facts:
    """Whether requests may share an execution, and if not, why: the node that loses the axis is named."""
    return {"proven": batching.symbol is not None, "symbol": batching.symbol, "refused": batching.refused}


def _steps(plan: Plan, members: dict[str, list[str]]) -> list[Facts]:
    rows = []
    for number, step in enumerate(plan.steps):
        results = [plan.buffers[index] for index in step.outputs]
        rows.append(
            {
                "step": number,
                "kernel": kernel_name(step),
                "nodes": [short(source) for source in members[step.source] or [step.source]],
                "results": [f"{result.dtype}[{', '.join(map(str, result.shape))}]" for result in results],
                "binds": list(step.binds),
            }
        )
    return rows


def gpu_facts(graph: Graph, arch: int, precision: str, extents: Extents) -> Facts:
    """What one inference launches on a GPU. Parts whose extents only running tells are left out."""
    plan = gpu_plan(graph, prove(graph), GpuOptions(precision, arch))
    launches = launched(plan.program.segments[0], [extents[name] for name in plan.symbols])
    arrays = [step.kernel for step in plan.steps if isinstance(step.kernel, ArrayCall | BodyCall)]
    return {
        "arch": f"sm_{arch}",
        "precision": precision,
        "launches": len(launches),
        "distinct_kernels": len(kernels_of(plan)),
        "launched": counted(kernel_name(plan.steps[i]) for i in launches),
        "array_steps": counted(type(call.op).__name__ for call in arrays),
        "parts_left_out": len(plan.program.segments) - 1,
    }

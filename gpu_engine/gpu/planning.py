"""From a graph to the plan of a GPU: the same for every way to run or compile it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_engine.gpu.float8_products import join_float8
from gpu_engine.gpu.joined_products import join_projections
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.layouts import assign_layouts
from gpu_engine.gpu.lowering import lowering_for
from gpu_engine.gpu.narrow_products import join_weights
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.program import Program, with_program
from gpu_engine.gpu.turned_attention import reads_views
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.lower import lower_graph
from gpu_engine.plan.plan import LARGEST, Batching, Plan
from gpu_engine.plan.turned_attention import turn_attention
from gpu_engine.plan.weights import expand_weights

GROWTH = 4
"""At most so many times as large as they are do weights become: a copy, and one in the order that a kernel reads."""


def gpu_plan(graph: Graph, batching: Batching, options: GpuOptions, room_nbytes: int = LARGEST) -> Plan:
    """The plan, prepared for binding; OutOfMemory if constants that repeat their elements take more than
    `room_nbytes`."""
    return with_program(lower_graph(graph, batching, lowering_for(options), arranged, room_nbytes=room_nbytes))


def device_properties(options: GpuOptions, name: str, uuid: str, built: bool = False) -> Mapping[str, Any]:
    """See `runtime.device.Device.properties`; `built`: kernels come compiled from a bundle."""
    return {
        "FULL_DEVICE_NAME": name,
        "DEVICE_ARCHITECTURE": f"sm_{options.arch}",
        "DEVICE_UUID": uuid,
        "OPTIMIZATION_CAPABILITIES": ("FP32", "FP16", "BF16", "INT8", "EXPORT_IMPORT"),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16"}.get(options.precision, options.precision),
        "ENABLE_CPU_PINNING": False,
        "CACHE_DIR": "",
        "LOADED_FROM_CACHE": built,
        "USES_THREADS": False,
    }


def arranged(graph: Graph) -> Graph:
    """The graph in the layouts and forms whose nodes are lowered."""
    joined = join_projections(assign_layouts(expand_weights(join_weights(join_float8(graph)))))
    return turn_attention(joined, reads_views)


def kernels_of(plan: Plan) -> tuple[Kernel, ...]:
    """Every distinct kernel that the plan launches, and that bodies inside it launch."""
    program: Program = plan.program
    return tuple(dict.fromkeys((*program.kernels, *program.inner)))

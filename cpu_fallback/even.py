"""Plans whose rows get the same bits in executions of any number of rows.

Small tiles of a product split what they sum over several sums, so that a row's order of additions would depend on the
tile that it falls into, and so on how many rows there are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpu_fallback.calls import ArrayCall, Native
from cpu_fallback.gemm_kernels import GemmKernel
from cpu_fallback.recurrent_kernels import RecurrentKernel
from gpu_engine.ir.ops import Attention, Conv, ConvTranspose, MatMul, Recurrent
from gpu_engine.plan.plan import Plan, Step

_OF_A_LIBRARY = (MatMul, Conv, ConvTranspose, Attention, Recurrent)
"""What NumPy's BLAS multiplies in an order of its own."""


def with_even_sums(plan: Plan) -> Plan:
    """The plan with kernels that add in one order, whatever the rows: a lone row may take a quarter longer."""
    return replace(plan, steps=tuple(map(_even_step, plan.steps)))


def is_even(plan: Plan) -> bool:
    """Whether all products of such a plan are native."""
    return not any(
        isinstance(step.kernel, ArrayCall) and isinstance(step.kernel.op, _OF_A_LIBRARY) for step in plan.steps
    )


def _even_step(step: Step) -> Step:
    if not isinstance(step.kernel, Native):
        return step
    return replace(step, kernel=replace(step.kernel, kernel=_even_kernel(step.kernel.kernel)))


def _even_kernel(kernel: Any) -> Any:
    match kernel:
        case GemmKernel():
            return replace(kernel, even=True)
        case RecurrentKernel(record=record) if not record.quantised:
            return replace(kernel, record=replace(record, form=replace(record.form, even=True)))
    return kernel

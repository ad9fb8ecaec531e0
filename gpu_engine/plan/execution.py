"""What running a plan needs on every device: the extents that a step told, and how a step's failure is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_engine.errors import ExecutionError, GpuEngineError, OutOfMemory
from gpu_engine.plan.binding import solve_binds
from gpu_engine.plan.plan import Plan, Step


def extents_after(
    plan: Plan,
    step: Step,
    results: Sequence[Any],
    names: Sequence[str],
    extents: Sequence[int],
    following: Sequence[str],
) -> tuple[int, ...]:
    """The values of the names `following`, behind a step that binds some of them, while `names` have `extents`.

    ExecutionError where the results contradict their declared shapes.
    """
    known = dict(zip(names, extents, strict=True))
    declared = [plan.buffers[i].shape for i in step.outputs]
    try:
        found = solve_binds(declared, [tuple(result.shape) for result in results], known)
    except ValueError as error:
        raise ExecutionError(f"{step.source}: {error}") from error
    return tuple(found.get(name, known.get(name, 0)) for name in following)


def step_failure(step: Step, op: Any, inputs: Sequence[Any], error: Exception) -> GpuEngineError:
    """What Python said while `op` ran on arrays, in our terms."""
    kinds = ", ".join(f"{array.dtype}{list(array.shape)}" for array in inputs)
    text = f"{step.source}: {type(op).__name__} of {kinds}: {str(error) or type(error).__name__}"
    return OutOfMemory(text) if isinstance(error, MemoryError) else ExecutionError(text)

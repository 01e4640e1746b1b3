"""Fine-tuning that starts from a finished plan instead of the result of post-training quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from difloat.methods.post_training import Outcome, timestep_grid
from difloat.methods.task import Task
from difloat.plan.plan import LayerPlan, Plan


def start_of(plan: Plan, task: Task) -> Outcome:
    """The outcome at which training starts: the plan, with its input ranges moved to the timesteps of the calibration."""
    grid = timestep_grid(task)
    taken = {name: _on_grid(layer, plan.timesteps, grid) for name, layer in plan.layers.items()}
    measured: dict[str, Any] = {"seconds": {}, "blocks": {}}
    timesteps = grid if plan.timesteps else ()
    return Outcome(taken, dict(plan.skipped), measured, dict(plan.attention), timesteps)


def _on_grid(layer: LayerPlan, timesteps: Sequence[float], grid: Sequence[float]) -> LayerPlan:
    """The layer with an input range for every entry of `grid`: the one at the nearest of the plan's `timesteps`."""
    if not layer.input_schedule:
        return layer
    nearest = [min(range(len(timesteps)), key=lambda n: abs(timesteps[n] - one)) for one in grid]
    rows, ranges = [layer.input_schedule[n] for n in nearest], max(layer.input_schedule) + 1
    tensors = {
        name: tensor.unflatten(0, (ranges, -1))[rows].flatten()
        if name in ("input_scale", "input_zero_point")
        else tensor
        for name, tensor in layer.tensors.items()
    }
    return replace(layer, tensors=tensors, input_schedule=tuple(range(len(grid))))


def of_8_bits(plan: Plan) -> tuple[str, ...]:
    """The layers whose whole weight has 8 bits, which learn ranges only, as in the recipes."""
    return tuple(
        name
        for name, layer in plan.layers.items()
        if not layer.bands and all(part.weight.format.bits == 8 for part in layer.parts)
    )

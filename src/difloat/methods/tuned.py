"""From a post-training plan to a fine-tuned one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from difloat.methods import posttraining
from difloat.methods.adapters import Carry, Init
from difloat.methods.denoising_factor import denoising_factors, normalised
from difloat.methods.finetune import TrainingSettings, train
from difloat.methods.posttraining import Outcome
from difloat.methods.relation import RelationLoss, RelationSettings
from difloat.methods.student import Student
from difloat.methods.task import Task


@dataclass(frozen=True)
class Tuning:
    """What is trained.

    Attributes:
        settings: Of the loop.
        adapters: Per layer.
        rank: Of the adapters.
        factor_power: The loss is weighted by this power of the scheduler's denoising factors: 0 for not at all, 1 for MSFP,
            2 for what a squared error at a timestep moves in the picture.
        without_adapters: Layers that learn ranges only.
        input_ranges_by_timestep: Learn static input ranges apart for every timestep.
        carry: How adapters are carried out, see `adapters`.
        relation: Further distillation beside the output's.
        adapter_init: "zero", or "error": from the largest directions of the rounding error (`adapters.Adaptive`).
    """

    settings: TrainingSettings
    adapters: int
    rank: int
    factor_power: float
    without_adapters: tuple[str, ...] = ()
    input_ranges_by_timestep: bool = False
    carry: Carry = "merged"
    relation: RelationSettings = field(default=RelationSettings("off"))
    adapter_init: Init = "zero"


def tune(task: Task, outcome: Outcome, tuning: Tuning) -> Outcome:
    """Fine-tune what `outcome` plans and pack the result: its codes are those that training ended with.

    Without epochs `outcome` itself comes back.
    """
    if not tuning.settings.epochs:
        return outcome
    grid = posttraining.timestep_grid(task)
    student = Student(
        task.model,
        outcome.layers,
        outcome.attention,
        grid,
        adapters=tuning.adapters,
        rank=tuning.rank,
        input_ranges_by_timestep=tuning.input_ranges_by_timestep,
        carry=tuning.carry,
        without_adapters=tuning.without_adapters,
        adapter_init=tuning.adapter_init,
        generator=torch.Generator().manual_seed(task.seed),
    )
    measured = dict(outcome.measured)
    measured["seconds"] = dict(measured["seconds"])
    extra = None if tuning.relation.kind == "off" else RelationLoss(task, student, tuning.relation)
    if extra is not None:
        measured["relation_features"] = extra.name
    with posttraining.timed(measured, "fine-tune"):
        weights, note = _weights(task, grid, tuning.factor_power), f"{tuning.relation} {tuning.factor_power}"
        losses = train(task, student, tuning.settings, weights, extra, note)
    measured |= {"losses": losses, "router": student.table().tolist(), "grid": list(grid)}
    plans = student.packed()
    by_time = any(plan.schedules for plan in plans.values())
    return replace(outcome, layers=plans, measured=measured, timesteps=grid if by_time else ())


def _weights(task: Task, grid: tuple[float, ...], power: float) -> dict[float, float]:
    """Weight of the squared error at every timestep of the grid, mean 1."""
    if not power:
        return dict.fromkeys(grid, 1.0)
    if task.scheduler is None:
        raise ValueError(
            "the denoising-factor loss must know the sampler, got a plain module; pass the pipeline, or "
            "say factor_power=0 (repair: no dfa)"
        )
    factors = [factor**power for factor in denoising_factors(task.scheduler, len(grid)).values()]
    if len(factors) != len(grid):  # samplers that call the denoiser more than once a step, or skip one
        raise ValueError(
            f"the denoising-factor loss must find one denoiser call per step, got {len(grid)} timesteps for "
            f"{len(factors)} steps of {type(task.scheduler).__name__}; say factor_power=0 "
            "(repair: no dfa)"
        )
    return normalised(dict(zip(sorted(grid, reverse=True), factors, strict=True)))

"""From a post-training plan to a fine-tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from difloat import torch_modes
from difloat.methods import post_training
from difloat.methods.post_training import Outcome
from difloat.methods.task import Task
from difloat.methods.training.relation_loss import RelationLoss, RelationSettings
from difloat.methods.training.student import Allocation, Student
from difloat.methods.training.train import TrainingSettings, train
from difloat.methods.training.twin_layer import Carry, Init


@dataclass(frozen=True)
class Tuning:
    """What is trained.

    Attributes:
        settings: Of the loop.
        adapters: Per layer.
        rank: Of the adapters.
        weights: Of the squared error at every timestep (`denoising_factor.loss_weights`): the sampler's factors to the power of
            0 for all alike, 1 for MSFP, 2 for what a squared error at a timestep moves in the picture.
        without_adapters: Layers that learn ranges only.
        input_ranges_by_timestep: Learn static input ranges apart for every timestep.
        carry: How adapters are carried out, see `adapters`.
        relation: Further distillation beside the output's.
        adapter_init: "zero", or "error": from the largest directions of the rounding error (`adapters.Adaptive`).
        allocation: Of several adapters to timesteps, see `Student`.
    """

    settings: TrainingSettings
    adapters: int
    rank: int
    weights: Mapping[float, float] = field(repr=False)
    without_adapters: tuple[str, ...] = ()
    input_ranges_by_timestep: bool = False
    carry: Carry = "merged"
    relation: RelationSettings = field(default=RelationSettings("off"))
    adapter_init: Init = "zero"
    allocation: Allocation = "learned"


@torch_modes.plain()
def tune(task: Task, outcome: Outcome, tuning: Tuning) -> Outcome:
    """Fine-tune what `outcome` plans and pack the result: its codes are those that training ended with.

    Without epochs `outcome` itself comes back.
    """
    if not tuning.settings.epochs:
        return outcome
    grid = post_training.timestep_grid(task)
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
        allocation=tuning.allocation,
        generator=torch.Generator().manual_seed(task.seed),
    )
    measured = dict(outcome.measured)
    measured["seconds"] = dict(measured["seconds"])
    extra = None if tuning.relation.kind == "off" else RelationLoss(task, student, tuning.relation)
    if extra is not None:
        measured |= {"relation_features": extra.name, "relation_rows": extra.coverage}
    with post_training.timed(measured, "fine-tune"):
        losses = train(task, student, tuning.settings, tuning.weights, extra, str(tuning.relation))
    measured |= {"losses": losses, "router": student.table().tolist(), "grid": list(grid)}
    plans = student.packed()
    by_time = any(plan.schedules for plan in plans.values())
    return replace(outcome, layers=plans, measured=measured, timesteps=grid if by_time else ())

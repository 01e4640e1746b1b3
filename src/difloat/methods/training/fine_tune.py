"""Fine-tuning of a post-training plan."""

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
    """What is trained, and how.

    Attributes:
        settings: The settings of the loop.
        adapters: How many adapters a layer has.
        rank: The rank of the adapters.
        weights: The weight of the squared error at every timestep (`timestep_weights.loss_weights`), which is a power of the
            sampler's factor: 0 for equal weights, 1 for MSFP, 2 for the share of a squared error that reaches the picture.
        without_adapters: The layers that learn ranges only.
        input_ranges_by_timestep: Whether static input ranges are learned apart for every timestep.
        carry: Whether adapters are merged into weights or stay beside them (`twin_layer`).
        relation: The settings of a distillation besides that of the output.
        adapter_init: "zero", or "error" for a start at the largest directions of the rounding error (`twin_layer.Adaptive`).
        allocation: The way in which several adapters are allotted to timesteps (`Student`).
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
    """Fine-tune the layers of an outcome and pack them, with the codes that training ended with.

    Without epochs the outcome itself comes back.
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
        measured["relation_features"] = extra.name
        if not tuning.settings.fresh_rows:  # of those all take part
            measured["relation_rows"] = extra.coverage
    with post_training.timed(measured, "fine-tune"):
        losses = train(task, student, tuning.settings, tuning.weights, extra, str(tuning.relation))
    measured |= {"losses": losses, "router": student.table().tolist(), "grid": list(grid)}
    plans = student.packed()
    by_time = any(plan.schedules for plan in plans.values())
    return replace(outcome, layers=plans, measured=measured, timesteps=grid if by_time else ())

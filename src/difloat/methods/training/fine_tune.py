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
from difloat.methods.training.student import Adapters, Student
from difloat.methods.training.train import TrainingSettings, train


@dataclass(frozen=True)
class Tuning:
    """What is trained, and how.

    Attributes:
        settings: The settings of the loop.
        adapters: What every layer learns.
        weights: The weight of the squared error at every timestep (`timestep_weights.loss_weights`), which is a power of the
            sampler's factor: 0 for equal weights, 1 for MSFP, 2 for the share of a squared error that reaches the picture.
        relation: The settings of a distillation besides that of the output.
    """

    settings: TrainingSettings
    adapters: Adapters
    weights: Mapping[float, float] = field(repr=False)
    relation: RelationSettings = field(default=RelationSettings("off"))


@torch_modes.plain()
def tune(task: Task, outcome: Outcome, tuning: Tuning) -> Outcome:
    """Fine-tune the layers of an outcome and pack them, with the codes that training ended with.

    Without epochs the outcome itself comes back.
    """
    if not tuning.settings.epochs:
        return outcome
    grid = post_training.timestep_grid(task)
    generator = torch.Generator().manual_seed(task.seed)
    student = Student(task.model, outcome.layers, outcome.attention, grid, tuning.adapters, generator)
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

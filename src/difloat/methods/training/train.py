"""Fine-tuning of a quantized model by distillation along full-precision trajectories: one loop for all recipes.

It needs no data. The student sees the inputs that the full-precision sampler gave its denoiser, timestep by timestep, and
learns the teacher's outputs. It runs in mixed precision, with accumulated gradients and in several processes. Rows are drawn
from seed and step alone (`batches`), so a resumed or parallel run sees those of an uninterrupted single one. Gradients that
pass a float16 denoiser are scaled, as they would vanish. Memory holds the student, the gradients and AdamW's two moments of
what is trained, the activations of one batch, and the teacher's outputs of the rows that are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from difloat import devices, distributed, torch_modes
from difloat.calibration.batch_axis import first_tensor, rows_in_lists
from difloat.methods.task import Task
from difloat.methods.training.batches import Batch, Fixed, Ring
from difloat.methods.training.resume import Kept
from difloat.methods.training.student import Student
from difloat.methods.training.twin_layer import Adaptive
from difloat.plan.validation import NotNegative, Positive, Whole, record

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of mixed precision


@record("settings of fine-tuning")
class TrainingSettings:
    """How a student is trained. A recipe's options are these and its own.

    Attributes:
        epochs: Passes along the trajectory: one optimiser step per timestep each, of `accumulation` batches.
        rows: Rows per step, all processes together.
        adapter_rate: Learning rate of the adapters in units of mean steps (`Adaptive.step`). arXiv:2310.03270 takes 1/2500
            for twenty times as many steps. Ours is from `benchmarks/tuning_rates.py`.
        range_rate: Learning rate of static input ranges, in units of a layer's own mean input scale.
        scale_rate: Learning rate of weight scales, in units of a layer's own mean weight scale.
        router_rate: Learning rate of the router.
        accumulation: Batches per optimiser step, of one timestep after the other.
        guidance_weight: Weight of the squared part of the guidance direction that the student loses (`lost_guidance`).
        compare_at: Guidance scale at which pairs of guidance are compared, as in MPQ-DM's code. At 0 every output is compared
            by itself.
        precision: What `torch.autocast` computes the student in. Master weights and moments stay in float32.
        patience: Stop after so many epochs without a lower loss. 0 never stops.
        updates: Optimiser steps in all, in place of `epochs`. 0 makes as many as the epochs have.
        fresh_rows: Passes along the trajectory that fresh rows stay. At 1 every pass has new trajectories, whose rows are seen
            once, as in the papers' lineage (arXiv:2310.03270). At 0 the calibration rows are trained on again and again.
    """

    epochs: Whole = 40
    rows: Positive = 16
    adapter_rate: NotNegative = 0.03
    range_rate: NotNegative = 5e-4
    scale_rate: NotNegative = 1e-3
    router_rate: NotNegative = 1e-3
    accumulation: Positive = 1
    guidance_weight: NotNegative = 0.0
    compare_at: NotNegative = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    patience: Whole = 0
    updates: Whole = 0
    fresh_rows: Whole = 0

    def steps(self, length: int) -> int:
        """The optimiser steps along a trajectory of so many timesteps."""
        return self.updates or self.epochs * length

    @property
    def sampler_power(self) -> float:
        """Power of the sampler's factors in the loss (`loss_weights`), which plain modules do not have."""
        return 0.0


def settings_of(options: Any, task: Task) -> TrainingSettings:
    """The settings that a recipe's options name, with the others at their defaults.

    Raises:
        ValueError: if the task cannot be trained with them.
    """
    names = [one.name for one in fields(TrainingSettings) if hasattr(options, one.name)]
    settings = TrainingSettings(**{name: getattr(options, name) for name in names})
    _check(task, settings)
    return settings


def guidance_to_keep(weight: float, task: Task) -> float:
    """The weight, or 0 where the calibration rows have no pairs of guidance, so that there is nothing to lose."""
    return weight if any(other is not None for other in task.calibration.beside) else 0.0


def _check(task: Task, settings: TrainingSettings) -> None:
    if settings.rows < distributed.count():
        raise ValueError(
            f"rows must be at least 1 for each of {distributed.count()} processes, got {settings.rows}"
        )
    if settings.fresh_rows and task.calibration.fresh is None:
        raise ValueError(
            f"fresh_rows must come with rows along a sampler's own trajectory, got fresh_rows={settings.fresh_rows} and rows "
            "that cannot be drawn anew; calibrate with timesteps=sampler, or say fresh_rows=0"
        )
    for name in ("guidance_weight", "compare_at"):
        weight = getattr(settings, name)
        if weight and not guidance_to_keep(weight, task):
            raise ValueError(
                f"{name} must come with calibration rows of both parts of guidance, got none; calibrate with "
                f"guidance, or say {name}=0"
            )
    if settings.compare_at and task.calibration.conditional_part is None:
        raise ValueError(
            "compare_at must know which part of guidance has no condition, but all trajectories were given the same; "
            "calibrate with several prompts, or say compare_at=0"
        )
    beside = task.calibration.beside
    if settings.compare_at and {row for row, other in enumerate(beside) if other is not None} & set(beside):
        raise ValueError("compare_at must compare two parts of guidance, got three; say compare_at=0")
    if settings.compare_at and distributed.count() > 1:
        raise ValueError(
            f"compare_at must be trained in one process, got {distributed.count()}; launch one, or say compare_at=0"
        )


Extra = Callable[[Student, int, Batch, Tensor], Tensor]


def train(
    task: Task,
    student: Student,
    settings: TrainingSettings,
    weights: Mapping[float, float],
    extra: Extra | None = None,
    note: str = "",
) -> list[float]:
    """Train a student in place.

    Args:
        task: The teacher, its rows and the seed. With a `work_dir` the run is kept there and goes on after a kill.
        student: The student, whose grid must hold the timesteps of the rows.
        settings: The settings of the training.
        weights: The weight of the squared error at each timestep of the grid.
        extra: A function that returns a further loss of a step, from the student, the step, its rows and the student's output
            for this process's rows. The mean over several processes counts.
        note: A text about `weights` and `extra`, since a kept state of a run with others must not be continued.

    Returns:
        The mean loss of every epoch.
    """
    distributed.join(devices.home(task.model))
    _check(task, settings)
    with student.mixed_precision(_DTYPES[settings.precision]):
        return _train(task, student, settings, weights, extra, note)


def _train(
    task: Task,
    student: Student,
    settings: TrainingSettings,
    weights: Mapping[float, float],
    extra: Extra | None,
    note: str,
) -> list[float]:
    data = Ring(task, settings) if settings.fresh_rows else Fixed(task)
    groups = _groups(student, settings)
    base = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = settings.steps(len(data.grid))
    model = distributed.data_parallel(student)
    scaler = _scaler(task, settings)
    made_of = {"settings": repr(settings), "weights": sorted(weights.items()), "extra": note}
    state = Kept(task, student, optimizer, scaler, made_of)
    losses = state.restore(distributed.on_main(state.read))
    bar = tqdm(total=steps, desc="fine-tune", disable=not (task.progress and distributed.is_main()))
    bar.update(len(losses))
    done = _done(losses, len(data.grid), settings)
    with bar, distributed.apart():
        while not done:
            step = len(losses)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * (1 - step / steps)
            loss = torch.zeros(())
            for part in range(settings.accumulation):
                batch = data.draw(step * settings.accumulation + part, settings.rows, task.seed)
                last = part + 1 == settings.accumulation
                with distributed.exchange_gradients(model, now=last):
                    call = (batch.fresh or task.calibration).batch(batch.rows)
                    output = first_tensor(model(*call), rows_in_lists(*call))
                    part_loss = weights[batch.timestep] * data.rows.loss(output.float(), batch, settings)
                    if extra is not None:
                        part_loss = part_loss + extra(student, step, batch, output)
                    torch_modes.check_gradients(part_loss)
                    scaler.scale(part_loss / settings.accumulation).backward()
                loss = loss + part_loss.detach().cpu() / settings.accumulation
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(distributed.summed(loss.to(data.rows.targets.device))) / distributed.count())
            _check_loss(losses)
            done = _done(losses, len(data.grid), settings)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
            if distributed.is_main():
                state.keep(losses, force=done)
    with distributed.together():  # the main process has kept the last state
        return _by_epoch(losses, len(data.grid))


def _scaler(task: Task, settings: TrainingSettings) -> torch.amp.GradScaler:
    """A scaler of losses, which is on where gradients pass float16 numbers, which would round small ones to nothing."""
    parameters = list(task.model.parameters())
    halves = settings.precision == "fp16" or any(one.dtype == torch.float16 for one in parameters)
    return torch.amp.GradScaler(parameters[0].device.type, enabled=halves)


def _check_loss(losses: list[float]) -> None:
    if not math.isfinite(losses[-1]):
        raise ValueError(
            f"the loss of fine-tuning must be finite, got {losses[-1]} in step {len(losses)}; lower adapter_rate and "
            "range_rate, or load the model in bfloat16 or float32"
        )


def _groups(student: Student, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The parameter groups with their rates, which are in units of each layer's own steps."""
    groups: list[dict[str, Any]] = []
    for twin in student.twins:
        assert isinstance(twin, Adaptive)
        scales = list(twin.weight_scales)
        mean = float(torch.cat([scale.detach() for scale in scales]).mean())
        groups.append({"params": scales, "lr": settings.scale_rate * mean})
        ranges = [getattr(twin, n) for n in ("input_scale", "input_zero_point") if hasattr(twin, n)]
        if ranges:
            groups.append({"params": ranges, "lr": settings.range_rate * float(ranges[0].detach().mean())})
        if twin.rank:
            groups.append({"params": [twin.down, twin.up], "lr": settings.adapter_rate * twin.step()})
    if student.router is not None:
        groups.append({"params": list(student.router.parameters()), "lr": settings.router_rate})
    return groups


def _by_epoch(losses: list[float], length: int) -> list[float]:
    epochs = [losses[at : at + length] for at in range(0, len(losses), length)]
    return [sum(epoch) / len(epoch) for epoch in epochs]


def _done(losses: list[float], length: int, settings: TrainingSettings) -> bool:
    """Whether that was the last step, or the last `patience` whole epochs brought no lower loss."""
    patience = settings.patience
    if len(losses) >= settings.steps(length):
        return True
    if not patience or len(losses) % length:
        return False
    epochs = _by_epoch(losses, length)
    return len(epochs) > patience and min(epochs[-patience:]) >= min(epochs[:-patience])

"""Fine-tuning of a quantized model by distillation along full-precision trajectories: one loop for all recipes.

No data: the student sees the inputs that the full-precision sampler gave its denoiser, timestep by timestep, and learns the
teacher's outputs. Runs under `accelerate` (mixed precision, gradient accumulation, several processes); rows are drawn from
seed and step alone, so a resumed or parallel run sees those of an uninterrupted single one. Memory: the student, its gradients
and AdamW's two moments for what is trained, the activations of one batch, and the teacher's outputs of all rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from difloat import processes
from difloat.calls import content_hash, first_tensor
from difloat.methods.adapters import Adaptive
from difloat.methods.student import Student
from difloat.methods.task import Task

_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class TrainingSettings:
    """How a student is trained.

    Attributes:
        epochs: Passes along the trajectory: one optimiser step per timestep each.
        rows: Rows per step, all processes together.
        adapter_rate: Of the adapters, in units of a layer's mean weight step (`Adaptive.step`). arXiv:2310.03270 takes 1/2500
            for twenty times as many steps; ours is from `benchmarks/tuning_rates.py`.
        range_rate: Of static input ranges, in units of a layer's own mean input scale.
        scale_rate: Of weight scales, in units of a layer's own mean weight scale.
        router_rate: Of the router.
        accumulation: Batches per optimiser step.
        guidance_weight: Of the squared part of the guidance direction that the student loses, see `lost_guidance`.
        compare_at: Guidance scale at which pairs of guidance are compared, as the released code of MPQ-DM does; 0: every output
            by itself.
        precision: Mixed precision of `accelerate`.
        patience: Stop after so many epochs without a lower loss; 0: never.
    """

    epochs: int = 40
    rows: int = 16
    adapter_rate: float = 0.03
    range_rate: float = 5e-4
    scale_rate: float = 1e-3
    router_rate: float = 1e-3
    accumulation: int = 1
    guidance_weight: float = 0.0
    compare_at: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    patience: int = 0


def settings_of(options: Any, task: Task) -> TrainingSettings:
    """The settings that a recipe's options name, the others at their defaults; ValueError if the task cannot be trained so."""
    names = [one.name for one in fields(TrainingSettings) if hasattr(options, one.name)]
    settings = TrainingSettings(**{name: getattr(options, name) for name in names})
    _check(task, settings)
    return settings


def guidance_to_keep(weight: float, task: Task) -> float:
    """`weight`, or 0 where the calibration rows have no pairs of guidance: there is nothing to lose then."""
    return weight if any(other is not None for other in task.calibration.beside) else 0.0


def _check(task: Task, settings: TrainingSettings) -> None:
    for name in ("guidance_weight", "compare_at"):
        weight = getattr(settings, name)
        if weight and not guidance_to_keep(weight, task):
            raise ValueError(
                f"{name} must come with calibration rows of both parts of guidance, got none; calibrate with "
                f"guidance, or say {name}=0"
            )


Extra = Callable[[Student, int, float, list[int], Tensor], Tensor]


def train(
    task: Task,
    student: Student,
    settings: TrainingSettings,
    weights: Mapping[float, float],
    extra: Extra | None = None,
    note: str = "",
) -> list[float]:
    """Train `student` in place.

    Args:
        task: Teacher, rows, seed; with a `work_dir` the run is kept there and goes on after a kill.
        student: See there; its grid must hold the timesteps of the rows.
        settings: See there.
        weights: Of the squared error at each timestep of the grid.
        extra: Further loss of a step, from the student, the step, its timestep, its calibration rows and the student's output.
        note: Says what `weights` and `extra` are: a kept state of a run with others is not gone on with.

    Returns:
        Mean loss of every epoch.
    """
    _check(task, settings)
    accelerator = _accelerator(task, settings)
    data = _Rows(task, accelerator)
    optimizer = torch.optim.AdamW(_groups(student, settings), weight_decay=0.0)
    steps = settings.epochs * len(data.grid)
    model, optimizer = accelerator.prepare(student, optimizer)
    state = _Kept(task, student, optimizer, settings, note)
    losses = state.restore(processes.on_main(state.read))
    base = [group["lr"] for group in _groups(student, settings)]
    bar = tqdm(total=steps, desc="fine-tune", disable=not (task.progress and accelerator.is_main_process))
    bar.update(len(losses))
    with bar, processes.apart():
        for step in range(len(losses), steps):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * (1 - step / steps)
            loss = torch.zeros(())
            for part in range(settings.accumulation):
                timestep, rows = data.draw(step * settings.accumulation + part, settings.rows, task.seed)
                with accelerator.accumulate(model):
                    output = first_tensor(model(*data.call(rows)))
                    part_loss = weights[timestep] * data.loss(output.float(), rows, settings)
                    if extra is not None:
                        part_loss = part_loss + extra(student, step, timestep, rows.tolist(), output)
                    accelerator.backward(part_loss)
                    optimizer.step()
                    optimizer.zero_grad()
                loss = loss + part_loss.detach().cpu() / settings.accumulation
            losses.append(float(accelerator.reduce(loss.to(accelerator.device), "mean")))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
            if accelerator.is_main_process:
                state.keep(losses, force=step + 1 == steps)
            if _stalled(losses, len(data.grid), settings.patience):
                break
    accelerator.wait_for_everyone()
    return _by_epoch(losses, len(data.grid))


def _accelerator(task: Task, settings: TrainingSettings) -> Any:
    from accelerate import Accelerator

    return Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        cpu=next(task.model.parameters()).device.type == "cpu",
    )


class _Rows:
    """Calibration rows by timestep, with the teacher's outputs; every process takes its share of a batch."""

    def __init__(self, task: Task, accelerator: Any) -> None:
        self.calibration = task.calibration
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.by_timestep: dict[float, list[int]] = {}
        for row, timestep in enumerate(task.calibration.timesteps):
            self.by_timestep.setdefault(timestep, []).append(row)
        self.grid = sorted(self.by_timestep, reverse=True)
        chunks = torch.arange(len(task.calibration)).split(16)
        with torch.no_grad():
            outputs = [first_tensor(task.model(*args, **kwargs)) for args, kwargs in map(self._call, chunks)]
        self.targets = torch.cat(outputs).float()
        self.beside = task.calibration.beside

    def loss(self, output: Tensor, rows: Tensor, settings: TrainingSettings) -> Tensor:
        """Mean squared error, and what the pairs among the rows say of guidance."""
        error = output - self.targets[rows]
        place = {row: number for number, row in enumerate(rows.tolist())}
        found = [(self.beside[row], number) for row, number in place.items()]
        pairs = [(place[other], number) for other, number in found if other is not None and other in place]
        if not pairs or not (settings.compare_at or settings.guidance_weight):
            return error.square().mean()
        one, two = torch.tensor(pairs).unbind(1)
        lost, targets = error[two] - error[one], self.targets[rows]
        compared = error[one] + settings.compare_at * lost if settings.compare_at else error
        kept = lost_guidance(lost, targets[two] - targets[one])
        return compared.square().mean() + settings.guidance_weight * kept

    def _call(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.calibration.batch(rows.tolist())

    def call(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The denoiser's arguments for some rows."""
        return self._call(rows)

    def draw(self, number: int, count: int, seed: int) -> tuple[float, Tensor]:
        """Timestep and this process's rows of batch `number`: along the trajectory, rows at random with repeats."""
        timestep = self.grid[number % len(self.grid)]
        rows = torch.tensor(self.by_timestep[timestep])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        picked = rows[torch.randint(len(rows), (count,), generator=generator)]
        return timestep, picked[self.rank :: self.world]


def lost_guidance(error: Tensor, direction: Tensor) -> Tensor:
    """Mean square of what the student's guidance direction lacks along the teacher's, taken over all pairs together.

    The squared error alone is lowest for a student that responds less than it should: what it cannot know from few bits it
    leaves out. Guidance multiplies what is left by its scale, and all steps lose it alike, so it adds up along the trajectory
    where other errors cancel.

    Args:
        error: Of the direction (conditional minus unconditional output), [pairs, ...].
        direction: The teacher's, of the same shape.

    Returns:
        A scalar: the squared slope of the error over the direction, times the direction's mean square.
    """
    power = direction.square().sum().clamp_min(1e-12)
    return ((error * direction).sum() / power).square() * direction.square().mean()


def _groups(student: Student, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Parameter groups with their rates, which are in units of each layer's own steps."""
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


def _stalled(losses: list[float], length: int, patience: int) -> bool:
    """Whether the last `patience` whole epochs brought no lower loss."""
    if not patience or len(losses) % length:
        return False
    epochs = _by_epoch(losses, length)
    return len(epochs) > patience and min(epochs[-patience:]) >= min(epochs[:-patience])


class _Kept:
    """The state of a run on disk: trained tensors, the optimiser's moments, losses. Written to a part file, then renamed."""

    def __init__(
        self, task: Task, student: Student, optimizer: Any, settings: TrainingSettings, note: str = ""
    ) -> None:
        self.student, self.optimizer = student, optimizer
        facts: dict[str, Any] = {
            "settings": repr(settings),
            "seed": task.seed,
            "grid": student.grid,
            "names": student.names,
        }
        shapes = [tuple(parameter.shape) for parameter in student.parameters()]
        specs = [twin.plan.to_json() for twin in student.twins if isinstance(twin, Adaptive)]
        bands = [twin.plan.tensors.get("row_band") for twin in student.twins if isinstance(twin, Adaptive)]
        rows = [None if band is None else content_hash(band.cpu()) for band in bands]
        starts = [
            content_hash(twin.plan.tensors["weight"].cpu())
            for twin in student.twins
            if isinstance(twin, Adaptive)
        ]
        facts |= {
            "carry": student.carry,
            "init": student.adapter_init,
            "extra": note,
            "rows": rows,
            "starts": starts,
        }
        self.facts = json.dumps(facts | {"parameters": shapes, "layers": specs})
        self.path = None if task.work_dir is None else task.work_dir / "fine-tuning.safetensors"
        self.saved = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        named = dict(self.student.named_parameters())
        tensors = {f"value.{name}": parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"moment.{key}.{name}": value for key, value in moments.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def keep(self, losses: list[float], *, force: bool) -> None:
        """Write the state if the last time is a minute ago, or now."""
        if self.path is None or not (force or time.monotonic() - self.saved > _SAVE_EVERY_S):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        save_file(self._tensors(), part, metadata={"facts": self.facts, "losses": json.dumps(losses)})
        os.replace(part, self.path)
        self.saved = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """A kept state of this very run, if there is one."""
        if self.path is None or not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        return (
            (load_file(self.path), json.loads(metadata["losses"]))
            if metadata["facts"] == self.facts
            else None
        )

    def restore(self, state: tuple[dict[str, Tensor], list[float]] | None) -> list[float]:
        """Take over what `read` gave; the losses so far."""
        if state is None:
            return []
        tensors, losses = state
        for name, parameter in self.student.named_parameters():
            parameter.data.copy_(tensors[f"value.{name}"])
            moments = {
                key: tensors[f"moment.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"moment.{key}.{name}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments
        return losses

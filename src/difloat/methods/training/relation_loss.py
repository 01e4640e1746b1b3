"""Distillation of relations between positions, over features smoothed along the trajectory: MPQ-DM's TRD (arXiv:2412.11549).

F [b, p, c] is the mean of a block's features over two consecutive sampler steps, with each position scaled to length 1. The
relations are ``S = F F^T`` [b, p, p]. The loss is 100 times the sum over positions of the KL divergence of the student's
softmax(S) from the teacher's. The current step's features of the student are part of the graph, and those of the step before
are not. In the released code neither is, so there the term changes nothing but the printed loss, as `kind="detached"` does.

S is never whole in memory. It is taken a few rows at a time, and each lot is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from difloat.calibration.collect import Calibration
from difloat.layers.packed import quantizable
from difloat.methods.task import Task
from difloat.methods.trace import Call, removed, tensors_of
from difloat.methods.training.batches import Batch
from difloat.methods.training.student import Student

Kind = Literal["attached", "detached", "features", "off"]
_MAP_BYTES = 1 << 26  # of one lot of rows of the relations
_MAPS = 4  # of such a lot that are held at once: logits and probabilities of student and teacher
_TEACHER_ROWS = 16  # rows of a teacher's call
CACHE_SHARE = 4  # the teacher's features may take a quarter of the memory for activations


@dataclass(frozen=True)
class RelationSettings:
    """What is distilled beside the output.

    Attributes:
        kind: "attached" as the paper describes, "detached" as its code does (no gradient), "features" for the squared error of
            the same smoothed features relative to the teacher's mean square, "off" for nothing.
        weight: Factor of the relations' divergence beside the summed squared error of the output.
        feature_weight: Factor of the features' squared error ("features" only) beside the mean squared error of the output.
        every: Taken in every so many-th step of an epoch, from one step later on in the next epoch.
        module: Name of the module whose output is the feature; "" finds it (`feature_block`).
    """

    kind: Kind = "attached"
    weight: float = 100.0
    feature_weight: float = 1.0
    every: int = 2
    module: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(
                f"relations must be taken in every 1st, 2nd, ... step, got {self.every}; relation=off leaves them"
            )


def feature_block(model: nn.Module, call: Call) -> str:
    """The block of a denoiser that ends last: a U-Net's last up block, a transformer's last block.

    A block is an entry of an outermost `ModuleList` or `Sequential` that holds at least two layers that could be quantized and
    whose output is spatial.

    Args:
        model: The denoiser.
        call: The arguments of its call.

    Raises:
        ValueError: if there is no such block.
    """
    containers = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    outermost = [n for n in containers if not any(n != other and _inside(n, other) for other in containers)]
    entries = [
        f"{container}.{child}" if container else child
        for container in outermost
        for child, _ in model.get_submodule(container).named_children()
    ]
    layers = list(quantizable(model))
    blocks = [entry for entry in entries if sum(_inside(layer, entry) for layer in layers) > 1]
    ended: list[str] = []

    def note(name: str, output: Any) -> None:
        if _spatial(output):
            ended.append(name)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: note(name, output))
        for name in blocks
    ]
    with removed(handles), torch.no_grad():
        model(*call[0], **call[1])
    if not ended:
        raise ValueError(
            f"relation distillation must find a block with spatial output in {type(model).__name__}, got none; name a module "
            "(features=), or say relation=off"
        )
    return ended[-1]


def _inside(name: str, container: str) -> bool:
    return not container or name.startswith(container + ".")


def _spatial(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(output) if tensor.dim() > 2]


def positions(output: Any) -> Tensor:
    """A block's features as float32 [b, p, c], from [b, c, h, w] or [b, p, c].

    Of several tensors it is the last, since blocks of two streams return the text's tensor first.

    Raises:
        ValueError: if no tensor of the output has positions.
    """
    tensors = _spatial(output)
    if not tensors:
        raise ValueError(
            "features for relation distillation must be [b, c, h, w] or [b, positions, c], got an output without; "
            "name a block whose output is spatial (features=), or say relation=off"
        )
    last = tensors[-1].float()
    return last if last.dim() == 3 else last.flatten(2).transpose(1, 2)


def divergence(student: Tensor, teacher: Tensor, *, map_bytes: int = _MAP_BYTES) -> Tensor:
    """The KL divergence of the teacher's relations from the student's, summed over pictures and positions.

    Args:
        student: The student's smoothed features [b, p, c].
        teacher: The teacher's smoothed features [b, p, c].
        map_bytes: The most bytes of the relations [b, p, p] that exist at a time, which are one row of every picture at least.

    Returns:
        A scalar, which is 0 where the relations are the same.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)  # [b, p, c]
    pictures, count, _ = student.shape
    size = max(1, map_bytes // (_MAPS * 4 * pictures * count))  # rows of S at a time
    total = student.new_zeros(())
    for start in range(0, count, size):
        total = total + checkpoint(
            _rows_divergence, student, teacher, start, size, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _rows_divergence(student: Tensor, teacher: Tensor, start: int, size: int) -> Tensor:
    of_student, of_teacher = (
        (features[:, start : start + size] @ features.transpose(1, 2)).log_softmax(-1)  # [b, size, p]
        for features in (student, teacher)
    )
    return F.kl_div(of_student, of_teacher, reduction="sum", log_target=True)


def feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error of features, relative to the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def feature_module(task: Task, settings: RelationSettings) -> str:
    """Name of the module whose output is the feature, tried on one row.

    Raises:
        ValueError: if the calibration data hold no two consecutive steps of a trajectory; and see `features_of`.
    """
    before = task.calibration.before
    if all(earlier in (None, row) for row, earlier in enumerate(before)):
        raise ValueError(
            f"relation distillation must see consecutive steps of one trajectory, got {len(before)} calibration rows "
            "without any; calibrate along the sampler with more samples, or say relation=off"
        )
    return features_of(task, settings.module)[0]


def features_of(task: Task, wanted: str) -> tuple[str, Tensor]:
    """Name of the module whose output is the feature, and the teacher's features of the first row.

    Args:
        task: The task, whose model is the teacher.
        wanted: Name of the module; "" finds it.

    Raises:
        ValueError: there is no module of that name, no block to find, no feature in the module's output, or it is not
            called once.
    """
    call = task.calibration.batch([0])
    name = wanted or feature_block(task.model, call)
    module = dict(task.model.named_modules()).get(name)
    if module is None:
        raise ValueError(
            f"relation features must come from a module of the denoiser, got features={name!r}; see named_modules()"
        )
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, i, output: seen.append(positions(output)))
    with removed([handle]), torch.no_grad():
        task.model(*call[0], **call[1])
    if len(seen) != 1:
        raise ValueError(
            f"relation features must come from a module that is called once, got features={name!r}, called {len(seen)} "
            "times; name a block, or say relation=off"
        )
    return name, seen[0]


@final
class RelationLoss:
    """The further loss of a training step (`train.Extra`), for the rows of the batch whose row one step earlier is held.

    The sampler's first step has none before it: its features count alone. The teacher's features are computed once per row as
    far as a quarter of `memory_bytes` holds them, and again where not. The student's features of the step before come from the
    student as it is now. Of several processes, errors of features are relative to each one's own rows.

    Attributes:
        name: The module whose output is the feature.
        coverage: How many rows take part, of how many, at how many timesteps.
    """

    def __init__(self, task: Task, student: Student, settings: RelationSettings) -> None:
        """Listen to `student`. ValueError as `feature_module`."""
        self.settings, self._task, self._data = settings, task, task.calibration
        self.before = task.calibration.before
        self.name = feature_module(task, settings)
        usable = [row for row, earlier in enumerate(self.before) if earlier is not None]
        timesteps = {task.calibration.timesteps[row] for row in usable}
        self.coverage = {"rows": len(usable), "of": len(self.before), "timesteps": len(timesteps)}
        self._length = len(set(task.calibration.timesteps))
        self._caught: Tensor | None = None
        student.module(self.name).register_forward_hook(self._catch)
        self._cache: dict[int, Tensor] = {}
        self._free_bytes = task.memory_bytes // CACHE_SHARE

    def _catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._caught = positions(output)

    def __call__(self, student: Student, step: int, batch: Batch, output: Tensor) -> Tensor:
        """The loss of one step whose forward pass has just been, 0 in the steps between."""
        now = self._caught
        self._caught = None
        self._turn_to(batch.fresh or self._task.calibration)
        rows = batch.rows
        places = [place for place, row in enumerate(rows) if self.before[row] is not None]
        if not self._taken(step) or not places:
            return output.new_zeros(())
        assert now is not None
        now = now[places]  # [rows, p, c]
        chosen = [rows[place] for place in places]
        first = torch.tensor([self._earlier(row) == row for row in chosen], device=now.device)
        smoothed = (now + self._student_before(student, chosen, now.detach())) / 2  # [rows, p, c]
        smoothed = torch.where(first[:, None, None], now, smoothed)
        target = self._teacher(chosen)
        target = (target + self._teacher([self._earlier(row) for row in chosen])) / 2
        # The mean over processes shall be that over all usable rows of the step.
        usable = sum(self.before[row] is not None for row in batch.picked)
        if self.settings.kind == "features":
            share = self.settings.feature_weight * len(places) * batch.world / usable
            return share * feature_error(smoothed, target)
        if self.settings.kind == "detached":
            smoothed = smoothed.detach()
        # The paper sums both losses over pictures; the loop's is a mean over the output's values, this over usable rows.
        share = self.settings.weight * batch.world / (usable * output[0].numel())
        return share * divergence(smoothed, target)

    def _turn_to(self, data: Calibration) -> None:
        """Take the numbers of rows for those of other data from now on."""
        if data is not self._data:
            self._data, self.before = data, data.before
            self._cache.clear()
            self._free_bytes = self._task.memory_bytes // CACHE_SHARE

    def _taken(self, step: int) -> bool:
        """Every so many-th timestep of an epoch. Which of them moves on with the epoch, so that none is always left out."""
        epoch, place = divmod(step, self._length)
        return (place + 1 + epoch) % self.settings.every == 0

    def _earlier(self, row: int) -> int:
        before = self.before[row]
        assert before is not None
        return before

    @torch.no_grad()
    def _student_before(self, student: Student, rows: Sequence[int], now: Tensor) -> Tensor:
        """The student's features of the rows one step earlier, or those of `now` at the first step."""
        result = now.clone()
        timesteps = self._data.timesteps
        moved = [place for place, row in enumerate(rows) if self._earlier(row) != row]
        for timestep in sorted({timesteps[self._earlier(rows[place])] for place in moved}):
            some = [place for place in moved if timesteps[self._earlier(rows[place])] == timestep]
            with student.aside():
                student(*self._data.batch([self._earlier(rows[place]) for place in some]))
            assert self._caught is not None
            result[some] = self._caught
        self._caught = None
        return result

    @torch.no_grad()
    def _teacher(self, rows: Sequence[int]) -> Tensor:
        missing = sorted(set(rows) - set(self._cache))
        fresh: dict[int, Tensor] = {}
        caught: list[Tensor] = []
        module = self._task.model.get_submodule(self.name)
        handle = module.register_forward_hook(lambda m, i, output: caught.append(positions(output)))
        with removed([handle]):
            for start in range(0, len(missing), _TEACHER_ROWS):
                some = missing[start : start + _TEACHER_ROWS]
                args, kwargs = self._data.batch(some)
                self._task.model(*args, **kwargs)
                fresh |= dict(zip(some, caught.pop(), strict=True))
        for row, features in fresh.items():
            if features.nbytes <= self._free_bytes:
                self._cache[row] = features.clone()
                self._free_bytes -= features.nbytes
        return torch.stack([self._cache.get(row, fresh.get(row)) for row in rows])  # type: ignore[misc]

"""The state of a fine-tuning run on disk, so that a killed run goes on where it was, and no other run takes it for its own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from difloat.cache_entries import read_entry, write_entry
from difloat.calibration.rows import content_hash
from difloat.methods.task import Task
from difloat.methods.training.student import Student
from difloat.methods.training.twin_layer import Adaptive
from difloat.plan.validation import plain, read_texts, record

_SAVE_EVERY_S = 60.0


@record("state of fine-tuning", finite=False)
class Numbers:
    """What is kept beside the tensors.

    Attributes:
        losses: The losses so far.
        scaler: The state of the `GradScaler`.
    """

    losses: list[float]
    scaler: dict[str, Any]


@final
class Kept:
    """The trained tensors, the optimiser's moments and the losses so far, as an entry of the cache (`cache_entries`).

    The file's name is a hash of the run: rows, seed, layers with their weights and first values, the timesteps, how adapters
    start and are carried, and the arguments of `train`.
    """

    def __init__(
        self, task: Task, student: Student, optimizer: Any, scaler: Any, made_of: Mapping[str, Any]
    ) -> None:
        """Prepare for a run with these tensors, optimiser and scaler of losses. Without a `work_dir` nothing is kept."""
        self.student, self.optimizer, self.scaler = student, optimizer, scaler
        self.saved = time.monotonic()
        self.path = None
        if task.work_dir is None:
            return
        twins = [twin for twin in student.twins if isinstance(twin, Adaptive)]
        facts = {
            **made_of,
            "layout": 4,
            "rows": task.calibration.fingerprint,
            "fresh": None if task.calibration.fresh is None else task.calibration.fresh.made_of,
            "seed": task.seed,
            "grid": student.grid,
            "names": student.names,
            "carry": student.adapters.carry,
            "init": student.adapters.init,
            "allocation": student.adapters.allocation,
            "parameters": [tuple(parameter.shape) for parameter in student.parameters()],
            "layers": [plain(twin.plan) for twin in twins],
            "starts": [_hashes({**twin.plan.tensors, "base": twin.base}) for twin in twins],
        }
        name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
        self.path = task.work_dir / f"fine-tuning-{name}.safetensors"

    def _tensors(self) -> dict[str, Tensor]:
        named = dict(self.student.named_parameters())
        tensors = {f"value.{name}": parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"moment.{key}.{name}": value for key, value in moments.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def keep(self, losses: list[float], *, force: bool) -> None:
        """Write the state if the last time is a minute ago, or if it is forced."""
        if self.path is None or not (force or time.monotonic() - self.saved > _SAVE_EVERY_S):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        numbers = Numbers(losses, self.scaler.state_dict())
        texts = {name: json.dumps(value) for name, value in vars(numbers).items()}
        write_entry(self.path, self.path.name, self._tensors(), texts)
        self.saved = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], Numbers] | None:
        """A state of this very run that was kept, or None if there is no undamaged one."""
        return (
            None if self.path is None else read_entry(self.path, self.path.name, partial(read_texts, Numbers))
        )

    def restore(self, state: tuple[dict[str, Tensor], Numbers] | None) -> list[float]:
        """Take over a state from `read`, and return the losses so far."""
        if state is None:
            return []
        tensors, numbers = state
        self.scaler.load_state_dict(numbers.scaler)
        for name, parameter in self.student.named_parameters():
            parameter.data.copy_(tensors[f"value.{name}"])
            moments = {
                key: tensors[f"moment.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"moment.{key}.{name}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments
        return list(numbers.losses)


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with torch.no_grad():
        return {name: content_hash(tensor.cpu()) for name, tensor in tensors.items()}

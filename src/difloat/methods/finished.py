"""What is finished of a closed-form run, kept in the task's folder, so that a killed run goes on after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difloat.cache_entries import read_entry, write_entry
from difloat.layers import packed
from difloat.methods.task import Task
from difloat.plan.plan import LayerPlan


@dataclass(frozen=True)
class Finished:
    """Entries of one task in its folder.

    Attributes:
        folder: Where they are. None keeps nothing.
        task: What the entries of this task have in common, such as data and seed.
    """

    folder: Path | None
    task: str

    @staticmethod
    def of(task: Task, rows: int) -> Finished:
        """The entries of a task that gathers moments from so many calibration rows, whose folder is made."""
        # Inputs of a layer depend on every layer before it, also where the rows do not tell one model from another.
        state = [_sums(tensor) for tensor in task.model.state_dict().values()]
        common = [task.calibration.fingerprint, rows, task.seed, task.target, str(task.bits), state]
        folder = None if task.work_dir is None else task.work_dir / "closed-form"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Finished(folder, json.dumps(common))

    def read(self, facts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors and texts that were written under these facts, or None if there are none."""
        return None if self.folder is None else read_entry(*self._place(facts), dict)

    def write(self, facts: Sequence[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Keep tensors and texts under everything that they depend on."""
        if self.folder is not None:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_entry(*self._place(facts), on_cpu, texts)

    def _place(self, facts: Sequence[str]) -> tuple[Path, str]:
        key = hashlib.sha256(json.dumps(["layout 1", self.task, *facts]).encode()).hexdigest()[:24]
        assert self.folder is not None
        return self.folder / f"{key}.safetensors", key


def facts_of(task: Task, names: Sequence[str], plans: Mapping[str, LayerPlan]) -> list[str]:
    """What the moments and weights of layers depend on: their inputs, and sums that tell one weight from another."""
    facts = []
    for name in names:
        weight = packed.weight_of(task.model, name).detach()
        inputs = [part.activation for part in plans[name].parts]
        facts.append(repr((name, inputs, plans[name].rotation, tuple(weight.shape), _sums(weight))))
    return facts


def _sums(tensor: Tensor) -> list[float]:
    """Add up the values and their magnitudes, which tell one tensor from another."""
    return [float(tensor.sum(dtype=torch.float64)), float(tensor.abs().sum(dtype=torch.float64))]

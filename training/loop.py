"""What the training scripts share: moving averages, learning-rate schedule, checkpoints that survive a kill."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


class Average:
    """Exponential moving average of a module's parameters and buffers.

    The decay warms up as (1 + step) / (10 + step), so that early samples are not those of the random start.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module's state after a step."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        targets = [value for value in self.module.state_dict().values() if value.is_floating_point()]
        sources = [value.detach() for value in module.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(targets, sources, weight)


def learning_rate(progress: float, peak: float, warm_up: float = 0.02, hold: float = 0.0) -> float:
    """Linear warm-up, then the peak until `hold`, then a cosine to zero; `progress` in 0..1 of the run."""
    if progress < warm_up:
        return peak * max(progress / warm_up, 1e-3)
    start = max(warm_up, hold)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress - start) / (1 - start))))


class Clock:
    """Seconds of training, kept over restarts; the run ends when `budget_s` is used up."""

    def __init__(self, budget_s: float, used_s: float = 0.0) -> None:
        self.budget_s, self.used_s, self.start = budget_s, used_s, time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds used so far, earlier runs included."""
        return self.used_s + time.monotonic() - self.start

    def progress(self) -> float:
        """Returns the used share of the budget, 0..1."""
        return min(1.0, self.seconds() / self.budget_s)


def optimizer_for(
    module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels but neither biases nor norms."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields index batches for ever, each index once per pass through the set."""
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


def save(path: Path, **state: object) -> None:
    """Writes a checkpoint under a temporary name first, so that a kill leaves the last good one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def restore(path: Path) -> dict | None:
    """Reads a checkpoint written by `save`, or returns None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

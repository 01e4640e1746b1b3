"""Factors of input channels by stretches of the trajectory: SmoothQuant (arXiv:2211.10438 Eq. 4), as ViDiT-Q applies it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difloat.layers import packed
from difloat.methods import post_training, trace
from difloat.methods.task import Smoothing, Task

SMALLEST = 1e-5  # largest magnitudes below this (dead channels) count as this


def smoothing_factors(
    task: Task, names: Sequence[str], exponent: float, stretches: int, most_rows: int
) -> dict[str, Smoothing]:
    """Factors ``max|W_i|^(1-a) / max|X_i|^a`` of every layer for every stretch of the sampler's timesteps.

    Args:
        task: The model and its calibration rows.
        names: The names of the layers. A grouped convolution, which reads its input in pieces, gets no factors.
        exponent: The a above.
        stretches: How many equal stretches the timesteps are cut into.
        most_rows: The most calibration rows that are taken per stretch.
    """
    grid = post_training.timestep_grid(task)
    schedule = tuple(place * stretches // len(grid) for place in range(len(grid)))
    stretch_of = dict(zip(grid, schedule, strict=True))
    factors: dict[str, list[Tensor]] = {}
    for stretch in sorted(set(schedule)):
        rows = [i for i, t in enumerate(task.calibration.timesteps) if stretch_of[t] == stretch]
        calls = [task.calibration.batch(rows[:most_rows])]
        for name, largest in trace.channel_maxima(task.model, names, calls).items():
            weight = packed.weight_of(task.model, name).detach().float()
            if largest.numel() == weight.shape[1]:
                of_weight = weight.abs().transpose(0, 1).flatten(1).amax(1).clamp_min(SMALLEST)  # [i]
                divisor = largest.clamp_min(SMALLEST) ** exponent
                factors.setdefault(name, []).append(of_weight ** (1 - exponent) / divisor)
    named = schedule if stretches > 1 else ()
    return {name: Smoothing(torch.stack(found), named) for name, found in factors.items()}

"""ViDiT-Q (arXiv:2406.02540) and Q-DiT (arXiv:2406.17343): integer baselines for diffusion transformers on the same parts.

ViDiT-Q: weights per output channel, activations online per token, input channels smoothed apart for every stretch of the
  trajectory: factor ``max|W_i|^(1-a) / max|X_i|^a`` (SmoothQuant, arXiv:2211.10438 Eq. 4), a = 0.3.
Q-DiT: weights and activations in groups of input channels, activations online per token and group.
Both: asymmetric integers from the smallest to the largest value, rounded to nearest; attention products and what is outside
  of the blocks (embedders, final projection) stay in high precision.

Differs from the papers: ViDiT-Q's mixed precision over layers and timesteps, Q-DiT's evolutionary search of group sizes and
  its optional GPTQ are left out; zero points are real numbers; the largest magnitudes for smoothing are taken over the
  calibration rows of a stretch at once instead of by running means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difloat.layers import packed
from difloat.methods import post_training, trace
from difloat.methods.post_training import LayerRules, Outcome, Sequencing, Smoothing, Task
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.plan.options import NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import MIN_MAX, Rule
from difloat.plan.specs import Granularity

KEPT = "outside of the blocks"  # embedders and the final projection
SMALLEST = 1e-5  # largest magnitudes below this (dead channels) count as this


@recipe_options
class ViDiTQOptions:
    """Options of ViDiT-Q.

    Attributes:
        smoothing: The exponent a; 0 smooths by the weights alone, "off" is `stretches=0`.
        stretches: Equal stretches of the sampler's steps, each with factors and a packed weight of its own; 0: no smoothing.
        rows: Calibration rows per stretch.
    """

    smoothing: NotNegative = 0.3
    stretches: Whole = 2
    rows: Positive = 32


def viditq(task: Task, options: ViDiTQOptions) -> Outcome:
    """Quantize the task's model by ViDiT-Q."""
    inside = packed.inside_blocks(task.model)
    smoothing = _smoothing(task, inside, options) if options.stretches else {}

    def rules(name: str, seen: Trace) -> LayerRules | str:
        if name not in inside:
            return KEPT
        return LayerRules(
            _ends(task.bits.weight, "channel"), _online(task, "token"), smoothing=smoothing.get(name)
        )

    return post_training.run(task, rules, Sequencing())


@recipe_options
class QDiTOptions:
    """Options of Q-DiT.

    Attributes:
        group_size: Input channels that share a scale, of weights and of activations.
    """

    group_size: Whole = 128


def qdit(task: Task, options: QDiTOptions) -> Outcome:
    """Quantize the task's model by Q-DiT."""
    inside = packed.inside_blocks(task.model)

    def rules(name: str, seen: Trace) -> LayerRules | str:
        if name not in inside:
            return KEPT
        size = options.group_size
        return LayerRules(_ends(task.bits.weight, "group", size), _online(task, "group", size))

    return post_training.run(task, rules, Sequencing())


def _ends(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """Asymmetric integers between the smallest and the largest value."""
    grid = (formats.parse(f"uint{bits}"),)
    return Rule(grid, granularity, group_size, clips=MIN_MAX, zero_points=MIN_MAX)


def _online(task: Task, granularity: Granularity, group_size: int | None = None) -> Rule | None:
    if task.bits.activation is None:
        return None
    grid = (formats.parse(f"uint{task.bits.activation}"),)
    return Rule(grid, granularity, group_size, zero_points=MIN_MAX, online=True)


def _smoothing(task: Task, names: list[str], options: ViDiTQOptions) -> dict[str, Smoothing]:
    """Factors of every layer for every stretch of the sampler's timesteps."""
    grid = post_training.timestep_grid(task)
    schedule = tuple(place * options.stretches // len(grid) for place in range(len(grid)))
    stretch_of = dict(zip(grid, schedule, strict=True))
    factors: dict[str, list[Tensor]] = {}
    for stretch in sorted(set(schedule)):
        rows = [i for i, t in enumerate(task.calibration.timesteps) if stretch_of[t] == stretch]
        calls = [task.calibration.batch(rows[: options.rows])]
        for name, largest in trace.channel_maxima(task.model, names, calls).items():
            weight = packed.weight_of(task.model, name).detach().float()
            if largest.numel() == weight.shape[1]:  # grouped convolutions read their input in pieces
                of_weight = weight.abs().transpose(0, 1).flatten(1).amax(1).clamp_min(SMALLEST)
                divisor = largest.clamp_min(SMALLEST) ** options.smoothing
                factors.setdefault(name, []).append(of_weight ** (1 - options.smoothing) / divisor)
    named = schedule if options.stretches > 1 else ()
    return {name: Smoothing(torch.stack(found), named) for name, found in factors.items()}

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

from dataclasses import replace
from typing import Literal

from difloat.layers import packed
from difloat.methods import post_training
from difloat.methods.cost import Cost
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.smoothing_factors import smoothing_factors
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.numbers.scale_grids import ScaleFormat
from difloat.plan.options import NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import MIN_MAX, Rule
from difloat.plan.specs import Granularity

KEPT = "outside of the blocks"  # embedders and the final projection


@recipe_options
class ViDiTQOptions:
    """Options of ViDiT-Q.

    Attributes:
        smoothing: The exponent a; 0 smooths by the weights alone, "off" is `stretches=0`.
        stretches: Equal stretches of the sampler's steps, each with factors and a packed weight. 0 does not smooth.
        rows: Calibration rows per stretch.
    """

    smoothing: NotNegative = 0.3
    stretches: Whole = 2
    rows: Positive = 32


def viditq(task: Task, options: ViDiTQOptions) -> Outcome:
    """Quantize the task's model by ViDiT-Q."""
    inside = packed.inside_blocks(task.model)
    asked = (options.smoothing, options.stretches, options.rows)
    smoothing = smoothing_factors(task, inside, *asked) if options.stretches else {}

    def rules(name: str, seen: Trace) -> LayerRules | str:
        if name not in inside:
            return KEPT
        return LayerRules(
            _ends(task.bits.weight, "channel"), _online(task.bits, "token"), smoothing=smoothing.get(name)
        )

    return post_training.run(task, rules, Sequencing())


def viditq_cost(options: ViDiTQOptions, bits: Bits) -> Cost:
    """What ViDiT-Q asks of the denoiser and stores."""
    asked, count = (
        Cost(_ends(bits.weight, "channel"), _online(bits, "token"), outside="keep"),
        options.stretches,
    )
    return replace(asked, variants=max(1, count), smoothed=count > 0, passes=(options.rows,) * count)


@recipe_options
class QDiTOptions:
    """Options of Q-DiT.

    Attributes:
        group_size: Input channels that share a scale, of weights and of activations.
        scale_format: Grid of the scales and zero points of weights: "float32", or "float16" as GGUF stores them.
    """

    group_size: Whole = 128
    scale_format: Literal["float32", "float16"] = "float32"


def qdit(task: Task, options: QDiTOptions) -> Outcome:
    """Quantize the task's model by Q-DiT."""
    inside = packed.inside_blocks(task.model)

    def rules(name: str, seen: Trace) -> LayerRules | str:
        if name not in inside:
            return KEPT
        size = options.group_size
        weight = _ends(task.bits.weight, "group", size, options.scale_format)
        return LayerRules(weight, _online(task.bits, "group", size))

    return post_training.run(task, rules, Sequencing())


def qdit_cost(options: QDiTOptions, bits: Bits) -> Cost:
    """What Q-DiT asks of the denoiser and stores."""
    size = options.group_size
    weight = _ends(bits.weight, "group", size, options.scale_format)
    return Cost(weight, _online(bits, "group", size), outside="keep")


def _ends(
    bits: int, granularity: Granularity, group_size: int | None = None, scales: ScaleFormat = "float32"
) -> Rule:
    """Asymmetric integers between the smallest and the largest value."""
    grid = (formats.parse(f"uint{bits}"),)
    return Rule(grid, granularity, group_size, clips=MIN_MAX, zero_points=MIN_MAX, scales=scales)


def _online(bits: Bits, granularity: Granularity, group_size: int | None = None) -> Rule | None:
    if bits.activation is None:
        return None
    grid = (formats.parse(f"uint{bits.activation}"),)
    return Rule(grid, granularity, group_size, zero_points=MIN_MAX, online=True)

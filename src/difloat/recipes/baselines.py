"""Baselines on the same machinery: rounding to nearest, and Q-Diffusion's block reconstruction on integer grids.

`rtn`: any format, min-max or searched clips, no learning.
`qdiffusion`: arXiv:2302.04304. Asymmetric integers, weights per output channel, static per-tensor activations, AdaRound/BRECQ
block reconstruction, skip concatenations split. Differs from the paper: activation ranges are searched by squared error
instead of learned (LSQ); zero points are real numbers instead of integers; rounding is learned in 400 steps at a tuned rate
(docs/log.md) instead of 20,000 at 0.001; the softmax map is not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from difloat import formats
from difloat.methods import posttraining
from difloat.methods.adaround import RoundingSettings
from difloat.methods.assign import MIN_MAX, Rule, asymmetric_integers, floating_point
from difloat.methods.observe import Trace
from difloat.methods.posttraining import LayerRules, Outcome, Sequencing, Task
from difloat.methods.search import CLIPS
from difloat.specs import Granularity


@dataclass(frozen=True)
class NearestOptions:
    """Options of round-to-nearest.

    Attributes:
        grid: "fp" (E2M1, E2M3, E4M3: two exponent bits below 8 bits, four at 8) or "int" (two's complement).
        scale: "mse" searches clip values by squared error, "minmax" takes the largest magnitude.
        keep_8bit: As in LBFP.
        split: As in LBFP.
        weight_granularity: What shares a weight scale.
        activation: "static" per tensor from calibration, or "online" per token.
    """

    grid: Literal["fp", "int"] = "fp"
    scale: Literal["mse", "minmax"] = "mse"
    keep_8bit: tuple[str, ...] = ("first", "last")
    split: bool = True
    weight_granularity: Granularity = "channel"
    activation: Literal["static", "online"] = "static"


def rtn(task: Task, options: NearestOptions) -> Outcome:
    """Quantize the task's model by rounding to nearest."""

    def grid(bits: int) -> tuple[formats.Format, ...]:
        if options.grid == "int":
            return (formats.parse(f"int{bits}"),)
        return (floating_point(bits),)

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = posttraining.keeps_8bit(name, seen, options.keep_8bit)
        clips = CLIPS if options.scale == "mse" else MIN_MAX
        weight = Rule(grid(8 if kept else task.bits.weight), options.weight_granularity, clips=clips)
        if task.bits.activation is None:
            return LayerRules(weight, None)
        activation_grid = grid(8 if kept else task.bits.activation)
        if options.activation == "online":
            return LayerRules(weight, Rule(activation_grid, "token", online=True))
        return LayerRules(weight, Rule(activation_grid, clips=clips))

    return posttraining.run(task, rules, Sequencing(split=options.split))


@dataclass(frozen=True)
class QDiffusionOptions:
    """Options of Q-Diffusion.

    Attributes:
        rounding: Of weights with at most 4 bits: "learned" (AdaRound) or "nearest".
        keep_8bit: As in LBFP.
        split: As in LBFP.
        weight_granularity: What shares a weight scale.
        group_size: Input channels per weight scale, with granularity "group".
        activation: "static" per tensor as in the paper, or "online" per token.
        iterations, learning_rate: Of learned rounding, per block.
        rounding_rows: Calibration rows used for learning.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    keep_8bit: tuple[str, ...] = ("first", "last")
    split: bool = True
    weight_granularity: Granularity = "channel"
    group_size: int = 128
    activation: Literal["static", "online"] = "static"
    iterations: int = field(default=RoundingSettings.iterations)
    learning_rate: float = field(default=RoundingSettings.learning_rate)
    rounding_rows: int = field(default=Sequencing.rounding_rows)


def qdiffusion(task: Task, options: QDiffusionOptions) -> Outcome:
    """Quantize the task's model by Q-Diffusion."""

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = posttraining.keeps_8bit(name, seen, options.keep_8bit)
        weight_bits = 8 if kept else task.bits.weight
        group_size = options.group_size if options.weight_granularity == "group" else None
        weight = asymmetric_integers(weight_bits, options.weight_granularity, group_size)
        activation = None
        if task.bits.activation is not None:
            online = options.activation == "online"
            activation = asymmetric_integers(
                8 if kept else task.bits.activation, "token" if online else "tensor"
            )
            activation = replace(activation, online=online)
        return LayerRules(weight, activation, learn=options.rounding == "learned" and weight_bits <= 4)

    rounding = RoundingSettings(iterations=options.iterations, learning_rate=options.learning_rate)
    sequencing = Sequencing(split=options.split, rounding=rounding, rounding_rows=options.rounding_rows)
    return posttraining.run(task, rules, sequencing)

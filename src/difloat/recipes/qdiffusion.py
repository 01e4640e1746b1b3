"""Q-Diffusion's block reconstruction on integer grids, on the same machinery (arXiv:2302.04304).

Asymmetric integers, weights per output channel, static per-tensor activations, AdaRound/BRECQ block reconstruction, skip
concatenations split. Differs from the paper: activation ranges are searched by squared error instead of learned (LSQ); zero
points are real numbers instead of integers; rounding is learned in 400 steps at a tuned rate (docs/log.md) instead of 20,000 at
0.001; the softmax map is not quantized.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost, learned
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import Rule, asymmetric_integers
from difloat.plan.specs import Granularity

SUMMARY = "integers, AdaRound by block (arXiv:2302.04304)"


@recipe_options
class Options:
    """Options of Q-Diffusion.

    Attributes:
        rounding: "learned" (AdaRound) or "nearest" for weights with at most 4 bits.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        split: Whether the two inputs of a skip concatenation are quantized apart.
        weight_granularity: What shares a weight scale.
        group_size: Input channels per weight scale, with granularity "group".
        activation: "static" per tensor as in the paper, or "online" per token.
        iterations, learning_rate: The steps of learned rounding per block, and their rate.
        rounding_rows: Calibration rows used for learning.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    keep_8bit: Names = ("first", "last")
    split: bool = True
    weight_granularity: Granularity = "channel"
    group_size: Whole = 128
    activation: Literal["static", "online"] = "static"
    iterations: Positive = field(default=RoundingSettings.iterations)
    learning_rate: NotNegative = field(default=RoundingSettings.learning_rate)
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by Q-Diffusion."""

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        weight_bits = 8 if kept else task.bits_of(name)
        weight, activation = _weight(weight_bits, options), None
        if task.bits.activation is not None:
            activation = _input(8 if kept else task.bits.activation, options)
        return LayerRules(weight, activation, learn=options.rounding == "learned" and weight_bits <= 4)

    rounding = RoundingSettings(iterations=options.iterations, learning_rate=options.learning_rate)
    sequencing = Sequencing(split=options.split, rounding=rounding, rounding_rows=options.rounding_rows)
    return post_training.run(task, rules, sequencing)


def cost(options: Options, bits: Bits) -> Cost:
    """What Q-Diffusion asks of the denoiser and stores."""
    inputs = None if bits.activation is None else _input(bits.activation, options)
    return learned(Cost(_weight(bits.weight, options), inputs, options.keep_8bit), options, bits)


def _weight(bits: int, options: Options) -> Rule:
    group_size = options.group_size if options.weight_granularity == "group" else None
    return asymmetric_integers(bits, options.weight_granularity, group_size)


def _input(bits: int, options: Options) -> Rule:
    online = options.activation == "online"
    return replace(asymmetric_integers(bits, "token" if online else "tensor"), online=online)

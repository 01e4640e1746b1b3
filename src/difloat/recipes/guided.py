"""Guided: difloat's own recipe for 2 to 4 bits, made of those parts of the papers that held when they were measured.

Taken from -> here:
  mixup-sign (MSFP, arXiv:2505.21591), of weights too: signed, or unsigned with a zero point  `plan.rules.floating_grids`
  learned rounding (LBFP, arXiv:2408.06995), from which fine-tuning starts                    `RoundingSettings`
  adapters merged before rounding, learned ranges (EfficientDM, arXiv:2310.03270)             `methods.training.twin_layer`
  timesteps weighted by the square of their factor in the sampler's update (after MSFP)       `methods.training.fine_tune`
Its own:
  the guidance direction, which a plain squared error shrinks, is kept                        `methods.training.train`
Left out: adapters by timestep and relations; docs/papers says what they bring. Few epochs, since rows repeat.
Differs from the papers: no page of theirs describes this; what it measures against them is in docs/papers/guided.md.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost, learned, trained
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.student import Adapters
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, guidance_to_keep, settings_of
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import floating_grids

SUMMARY = "2 to 4 bits, our own: formats by search, learned rounding, fine-tuned without losing guidance"


@recipe_options
class Options(TrainingSettings):
    """Options of Guided, and those of fine-tuning: `TrainingSettings`.

    Attributes:
        rounding: "learned" as in LBFP, or "nearest", for weights with at most 4 bits.
        iterations, rounding_rows: The options of learned rounding, as in LBFP.
        rank: The rank of the adapters.
        ranges_by_timestep: Learn input ranges apart for every timestep.
        factor_power: The power of the sampler's factors that weighs a timestep's loss. It must be 0 for plain modules.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        guidance_weight: The field of `TrainingSettings`, which counts as 0 where the sampler has no guidance.
        epochs: The passes of fine-tuning, of which 0 leaves it out.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    iterations: Positive = field(default=RoundingSettings.iterations)
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)
    rank: Whole = 32
    ranges_by_timestep: bool = False
    factor_power: NotNegative = 2.0
    keep_8bit: Names = ("first", "last")
    guidance_weight: NotNegative = 9.0
    epochs: Whole = 10

    @property
    def sampler_power(self) -> float:
        """The power of the sampler's factors in the loss, which must be 0 for a plain module, which has no sampler."""
        return self.factor_power if self.epochs else 0.0


def cost(options: Options, bits: Bits) -> Cost:
    """What Guided asks of the denoiser and stores."""
    inputs = None if bits.activation is None else floating_grids(bits.activation, "tensor")
    asked = Cost(floating_grids(bits.weight, "channel"), inputs, options.keep_8bit)
    return trained(learned(asked, options, bits), options)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by Guided."""
    kept: list[str] = []
    guidance = guidance_to_keep(options.guidance_weight, task)
    settings = settings_of(replace(options, guidance_weight=guidance), task)
    weights = loss_weights(task, options.sampler_power)

    def rules(name: str, seen: Trace) -> LayerRules:
        keeps = post_training.keeps_8bit(name, seen, options.keep_8bit)
        kept.extend([name] if keeps else [])
        bits = 8 if keeps else task.bits_of(name)
        weight, learn = floating_grids(bits, "channel"), options.rounding == "learned" and bits <= 4
        if task.bits.activation is None:
            return LayerRules(weight, None, learn)
        return LayerRules(weight, floating_grids(8 if keeps else task.bits.activation, "tensor"), learn)

    rounding = RoundingSettings(iterations=options.iterations)
    sequencing = Sequencing(rounding=rounding, rounding_rows=options.rounding_rows)
    outcome = post_training.run(task, rules, sequencing)
    adapters = Adapters(1, options.rank, tuple(kept), options.ranges_by_timestep)
    tuned = tune(task, outcome, Tuning(settings, adapters, weights))
    return replace(tuned, used={**outcome.used, "guidance_weight": guidance})

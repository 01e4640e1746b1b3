"""MSFP: 4-bit floating point by mixup-sign formats and timestep-aware LoRA (arXiv:2505.21591, CVPR 2025).

Paper -> here:
  signed weights and symmetric inputs, lopsided inputs also unsigned with a zero point  `methods.mixup_sign`
  TALoRA: adapters per layer, chosen by a router that reads the timestep     `methods.training.student`
  DFA: the loss of a timestep weighted by its factor in the sampler's update `methods.training.timestep_weights`
  data-free distillation along full-precision trajectories                   `methods.training.train`

Not stated in the paper, whose body was not available, are these choices, the first three after EfficientDM: rates, linear
  decay and learned input ranges, weights per output channel and inputs per tensor, 2 adapters of rank 32, one router of width
  128 and low frequencies for all layers, a wider search over clips and zero points than the ranges of a third-party
  re-implementation (`search="narrow"`), factors of mean 1 read off the scheduler's own step, first and last layer at 8 bits
  without adapters, and 40 epochs over calibration rows, not 160 over fresh trajectories (`fresh_rows=1`).
Differs from the paper: it knows lopsided inputs by the layer they come from (behind SiLU). Here any input is one whose
  shorter side is at most half of the longer one, in its extremes or its 1 % and 99 % quantiles. Squared error decides in both.
Beyond the paper are `guidance_weight`, `factor_power=2` and `rounding=learned`, which docs/papers/msfp.md measures.
Adapters whose second factor is zero are equal and give the router no gradient, so they start at 2 % of a step.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost, learned, trained
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.mixup_sign import input_rule
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.student import Adapters, Allocation
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, settings_of
from difloat.methods.training.twin_layer import Carry
from difloat.numbers import formats
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import Rule
from difloat.plan.specs import Side


@recipe_options
class Options(TrainingSettings):
    """Options of MSFP, and those of fine-tuning: `TrainingSettings`.

    Attributes:
        grid: "fp" as in the paper, or "int" for the same recipe on uniform grids.
        mixup_sign: Whether lopsided inputs may choose unsigned formats with a zero point.
        search: "wide", or "narrow" as in the third-party re-implementation.
        adapters: Low-rank adapters per layer, where 0 means no fine-tuning and 1 one adapter for all timesteps.
        rank, carry: The rank of adapters, and "merged" into a packed weight each, or on the "side" of one packed weight.
        allocation: Adapters to timesteps by a "learned" router, or "halves" or "random" for comparison, as in the paper.
        dfa: Whether the loss of a timestep is weighted by its factor in the sampler's update.
        factor_power: The power of that factor, which is 1 in the paper.
        rounding: Weights with at most 4 bits, "nearest" as in the paper, or "learned" as in LBFP before fine-tuning.
        iterations, rounding_rows, keep_8bit: The options of LBFP, of which the first two are of learned rounding.
    """

    grid: Literal["fp", "int"] = "fp"
    mixup_sign: bool = True
    search: Literal["wide", "narrow"] = "wide"
    adapters: Whole = 2
    rank: Whole = 32
    carry: Carry = "merged"
    allocation: Allocation = "learned"
    dfa: bool = True
    factor_power: NotNegative = 1.0
    rounding: Literal["learned", "nearest"] = "nearest"
    iterations: Positive = field(default=RoundingSettings.iterations)
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)
    keep_8bit: Names = ("first", "last")

    @property
    def sampler_power(self) -> float:
        """The power of the sampler's factors in the loss, which is 0 without `dfa` or fine-tuning."""
        return self.factor_power if self.dfa and self.adapters and self.epochs else 0.0


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by MSFP."""
    kept, settings = list[str](), settings_of(options, task)
    weights = loss_weights(task, options.sampler_power)

    def rules(name: str, seen: Trace) -> LayerRules:
        keeps = post_training.keeps_8bit(name, seen, options.keep_8bit)
        kept.extend([name] if keeps else [])
        bits = 8 if keeps else task.bits_of(name)
        weight, learn = Rule(_grids(bits, options), "channel"), options.rounding == "learned" and bits <= 4
        own = task.bits.activation and (8 if keeps else task.bits.activation)
        return LayerRules(weight, None if own is None else _input(own, options), learn)

    rounding = RoundingSettings(iterations=options.iterations)
    outcome = post_training.run(task, rules, Sequencing(True, rounding, rounding_rows=options.rounding_rows))
    if not options.adapters:
        return outcome
    adapters = Adapters(options.adapters, options.rank, tuple(kept), carry=options.carry)
    return tune(task, outcome, Tuning(settings, replace(adapters, allocation=options.allocation), weights))


def cost(options: Options, bits: Bits) -> Cost:
    """The work that MSFP asks of the denoiser, and its storage."""
    inputs = None if bits.activation is None else _input(bits.activation, options)
    plain = Cost(Rule(_grids(bits.weight, options), "channel"), inputs, options.keep_8bit)
    asked = learned(plain, options, bits)
    if not options.adapters or not options.epochs:
        return asked
    if options.carry == "merged" or not options.rank:
        return replace(trained(asked, options), variants=options.adapters if options.rank else 1)
    return replace(trained(asked, options), side=Side(options.rank, tuple(range(options.adapters))))


def _grids(bits: int, options: Options, *, signed: bool = True) -> tuple[formats.Format, ...]:
    if options.grid == "int":
        return (formats.parse(f"int{bits}" if signed else f"uint{bits}"),)
    return formats.candidates(bits, signed=signed)


def _input(bits: int, options: Options) -> Rule:
    unsigned = _grids(bits, options, signed=False) if options.mixup_sign else ()
    return input_rule(_grids(bits, options), unsigned, narrow=options.search == "narrow")

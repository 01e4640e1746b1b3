"""MSFP: 4-bit floating point by mixup-sign formats and timestep-aware LoRA (arXiv:2505.21591, CVPR 2025).

Paper -> here:
  weights and symmetric inputs signed; lopsided inputs signed or unsigned + zero point   `Rule(zero_points, asymmetry)`
  TALoRA: adapters per layer, chosen by a router that reads the timestep               `methods.student`, `methods.adapters`
  DFA: the loss of a timestep weighted by its factor in the sampler's update           `methods.denoising_factor`
  data-free distillation along full-precision trajectories                            `methods.finetune`

Not stated in the paper (its body was not available; our choices, the first three after EfficientDM): rates, linear decay,
  learned input ranges; weights per output channel, inputs per tensor; 2 adapters of rank 32; router of width 128 and low
  frequencies, one for all layers; the wider search over clips and zero points (`search="narrow"`: ranges of a third-party
  re-implementation); factors read off the scheduler's own step, of the sample as the denoiser reads it, mean 1; first and last
  layer at 8 bits without adapters; 40 epochs over calibration rows, not 160 over fresh trajectories.
Differs from the paper: it knows lopsided inputs by the layer they come from (behind SiLU). Here any input is one whose
  shorter side is at most half of the longer one, in its extremes or its 1 % and 99 % quantiles. Squared error decides in both.
Beyond the paper: `guidance_weight`, `factor_power=2`, `rounding=learned`; why is measured in docs/papers/msfp.md.
Known trap: adapters whose second factor is zero are equal and give the router no gradient; they start at 2 % of a step.
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
from difloat.methods.training.student import Allocation
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
        grid: "fp" as in the paper, or "int" for its integer twin (same everything, uniform grids).
        mixup_sign: Let lopsided inputs choose unsigned formats with a zero point.
        search: "wide", or "narrow" as in the third-party re-implementation.
        adapters: Low-rank adapters per layer; 0: no fine-tuning at all, 1: one for all timesteps.
        rank, carry: Of the adapters; "merged": a packed weight for each one used; "side": one, and the adapters beside it.
        allocation: Of adapters to timesteps: "learned" by the router; "halves" or "random" for comparison, as in the paper.
        dfa: Weight the loss of a timestep by its factor in the sampler's update.
        factor_power: That factor to this power; 1 is the paper's.
        rounding: Of weights with at most 4 bits: "nearest" as in the paper, or "learned" as in LBFP before fine-tuning.
        iterations, rounding_rows, keep_8bit: As in LBFP, the first two of learned rounding.
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
        """Power of the sampler's factors in the loss; 0 without `dfa` or fine-tuning."""
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
    tuning = Tuning(settings, options.adapters, options.rank, weights, tuple(kept), carry=options.carry)
    return tune(task, outcome, replace(tuning, allocation=options.allocation))


def cost(options: Options, bits: Bits) -> Cost:
    """What MSFP asks of the denoiser and stores."""
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

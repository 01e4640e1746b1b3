"""EfficientDM: quantization-aware low-rank fine-tuning on integer grids (arXiv:2310.03270), the baseline of MSFP and MPQ-DM.

Paper -> here:
  QALoRA: adapters merged before rounding                              `methods.training.twin_layer`
  scale-aware rate, in units of a layer's mean weight step             `TrainingSettings.adapter_rate`
  TALSQ: input ranges learned for every timestep                        `Adapters.input_ranges_by_timestep`
  distillation along full-precision trajectories, plain squared error   `methods.training.train`

Differs from the paper: adapters are added to the float weight, not to dequantized integers; zero points are real numbers and
  those of weights do not move; ranges are indexed by the timestep of the call, never by counting calls; first and last layer
  at 8 bits (the code: the first three and the last); 40 epochs over calibration rows, not 160 over fresh trajectories
  (`fresh_rows=1`), and a rate of 0.03 instead of 1/2500 for that (`benchmarks/tuning_rates.py`).
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost, learned, trained
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.student import Adapters
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, settings_of
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import asymmetric_integers

SUMMARY = "integers, adapters and input ranges by timestep, fine-tuned (arXiv:2310.03270)"


@recipe_options
class Options(TrainingSettings):
    """Options of EfficientDM, and those of fine-tuning: `TrainingSettings`.

    Attributes:
        rank: The rank of the adapters.
        ranges_by_timestep: Learn input ranges apart for every timestep (TALSQ).
        rounding: Weights with at most 4 bits, "nearest" as in the paper, or "learned" as in LBFP before fine-tuning.
        iterations, rounding_rows: The options of learned rounding, as in LBFP.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        factor_power: Power of the sampler's factors that weighs a timestep's loss, see `Tuning`; 0 is the paper's.
    """

    rank: Whole = 32
    ranges_by_timestep: bool = True
    rounding: Literal["learned", "nearest"] = "nearest"
    iterations: Positive = field(default=RoundingSettings.iterations)
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)
    keep_8bit: Names = ("first", "last")
    factor_power: NotNegative = 0.0


def cost(options: Options, bits: Bits) -> Cost:
    """What EfficientDM asks of the denoiser and stores."""
    inputs = None if bits.activation is None else asymmetric_integers(bits.activation, "tensor")
    asked = Cost(asymmetric_integers(bits.weight, "channel"), inputs, options.keep_8bit)
    return trained(learned(asked, options, bits), options)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by EfficientDM."""
    kept: list[str] = []
    settings = settings_of(options, task)
    weights = loss_weights(task, options.factor_power if options.epochs else 0.0)

    def rules(name: str, seen: Trace) -> LayerRules:
        keeps = post_training.keeps_8bit(name, seen, options.keep_8bit)
        kept.extend([name] if keeps else [])
        bits = 8 if keeps else task.bits_of(name)
        weight = asymmetric_integers(bits, "channel")
        learn = options.rounding == "learned" and bits <= 4
        if task.bits.activation is None:
            return LayerRules(weight, None, learn)
        return LayerRules(weight, asymmetric_integers(8 if keeps else task.bits.activation, "tensor"), learn)

    rounding = RoundingSettings(iterations=options.iterations)
    sequencing = Sequencing(rounding=rounding, rounding_rows=options.rounding_rows)
    outcome = post_training.run(task, rules, sequencing)
    adapters = Adapters(1, options.rank, tuple(kept), options.ranges_by_timestep)
    return tune(task, outcome, Tuning(settings, adapters, weights))

"""LBFP: floating-point post-training quantization (arXiv:2408.06995, Chen, Giannoula, Moshovos).

Paper section -> here:
  encoding and bias selected per tensor, weights and activations          `encodings`, searched by `numbers.search`
  greedy order: weights, then activations with earlier layers quantized   `methods.post_training`
  gradient-based learning of the rounding of FP4 weights (V-B)            `methods.learned_rounding`

Not stated in the paper, whose body and code were not available to us, are these choices of ours:
  the encodings tried, the range of biases (clip values 0.2 to 1.2 of the largest magnitude, refined once), squared error as
  the criterion, per-tensor scales for weights and activations, first and last layers at 8 bits, the optimiser's settings, and
  256 calibration rows over the sampler's own timesteps, conditional and unconditional.
Differs from the paper: the two inputs of a skip concatenation are quantized apart, as Q-Diffusion does. The reconstruction
  error of a block is taken relative to the size of its output.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost, learned
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.numbers.formats import Format
from difloat.plan.options import Names, NotNegative, Positive, recipe_options
from difloat.plan.rules import Rule
from difloat.plan.specs import Granularity

LARGEST_EXPONENT = 5  # more exponent bits than E5M2 leave no mantissa at 8 bits worth having

SUMMARY = "floating point, encoding searched per tensor, learned rounding (arXiv:2408.06995)"


@recipe_options
class Options:
    """Options of LBFP.

    Attributes:
        rounding: "learned" or "nearest" for weights with at most 4 bits.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        split: Whether the two inputs of a skip concatenation are quantized apart.
        weight_granularity: What shares a weight scale: "tensor" as in the paper, or "channel".
        iterations: Steps of learned rounding per block.
        learning_rate: The rate of the rounding variables, tuned by benchmarks/rounding_rates.py (docs/log.md).
        rounding_rows: Calibration rows used for learning.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    keep_8bit: Names = ("first", "last")
    split: bool = True
    weight_granularity: Granularity = "tensor"
    iterations: Positive = field(default=RoundingSettings.iterations)
    learning_rate: NotNegative = field(default=RoundingSettings.learning_rate)
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by LBFP."""

    def rules(name: str, seen: Trace) -> LayerRules:
        """The formats to search for a layer, of 8 bits where `keep_8bit` names it."""
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        weight_bits = 8 if kept else task.bits_of(name)
        weight = Rule(encodings(weight_bits), options.weight_granularity)
        activation = None
        if task.bits.activation is not None:
            activation = Rule(encodings(8 if kept else task.bits.activation))
        return LayerRules(weight, activation, learn=options.rounding == "learned" and weight_bits <= 4)

    rounding = RoundingSettings(iterations=options.iterations, learning_rate=options.learning_rate)
    sequencing = Sequencing(split=options.split, rounding=rounding, rounding_rows=options.rounding_rows)
    return post_training.run(task, rules, sequencing)


def cost(options: Options, bits: Bits) -> Cost:
    """The work that LBFP asks of the denoiser, and its storage."""
    weight = Rule(encodings(bits.weight), options.weight_granularity)
    inputs = None if bits.activation is None else Rule(encodings(bits.activation))
    return learned(Cost(weight, inputs, options.keep_8bit), options, bits)


def encodings(bits: int) -> tuple[Format, ...]:
    """The signed encodings tried at a width, which are E3M0, E2M1 and E1M2 at 4 bits, and E5M2 to E1M6 at 8."""
    return tuple(f for f in formats.candidates(bits) if f.exponent_bits <= LARGEST_EXPONENT)

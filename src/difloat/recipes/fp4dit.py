"""FP4DiT: floating-point post-training quantization of diffusion transformers (arXiv:2503.15465, Chen, Mills, Niu).

Paper -> here:
  group-wise weights, E3M0 before GELU, E2M1 (PixArt-Sigma: E1M2) elsewhere   `_formats`
  scale-aware AdaRound (Eq. 4, 8), block by block                             `methods.soft_rounding`, `methods.blockwise`
  online activations, one scale per token, or per token and head for q, k, v  `Rule(online=True)`, `attention`
  the embedders and the final projection stay in high precision               `outside`: what is in no list of blocks

Not stated in the paper, or stated differently by its code: E2M3 and E3M4 for 6- and 8-bit activations as in the code (elsewhere
  E3M2 and E4M3: `activation_format=wide`), other widths, 400 steps per block at a rate tuned for them (docs/log.md) instead of
  2,500 at 0.0001, and a reconstruction error relative to the size of the block's output.
Differs from the released code: calibration follows the sampler's own timesteps (its almost clean latents: `timesteps="clean"`);
  block inputs come from the quantized prefix, the code caches them; convolutions have a scale a picture.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from difloat.layers import packed
from difloat.methods import post_training
from difloat.methods.cost import Cost, learned
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.numbers.scale_grids import ScaleFormat
from difloat.numbers.search import CLIPS
from difloat.plan.options import FormatOr, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import MIN_MAX, Rule, more_mantissa
from difloat.plan.specs import AttentionPlan, Granularity

SUMMARY = "diffusion transformers: FP weights in groups, scale-aware rounding, online activations (arXiv:2503.15465)"
SCALE_AWARE_RATE = 0.003  # of variables in units of the weight, tuned by benchmarks/rounding_rates.py


@recipe_options
class Options:
    """Options of FP4DiT.

    Attributes:
        rounding: "learned" or "nearest" for weights with at most 4 bits.
        scale_aware, learning_rate: Rounding variables in units of the weight (Eq. 8) or not, and their rate, 0 for a tuned one.
        group_size: Input channels per weight scale, or 0 for one scale per output channel.
        scale_format: Grid of weight scales, as in `rtn`; off "float32" the range is searched, as its ends cannot be met.
        weight_format: "paper", the name of a format of as many bits as weights, or "search" among all by squared error.
        before_gelu: The format of the linear before GELU, as "paper" (E3M0 at 4 bits), a name, or "same" as the others.
        activation, activation_format: "online" per token or "static" per tensor; E2M3, E3M4 ("code") or E3M2, E4M3 ("wide").
        attention, softmax: Whether q, k, v are quantized like activations, and the bits of the map, where 16 leaves it.
        outside: Layers in no list of blocks (embedders, final projection): "keep" in high precision, or "8bit".
        inputs: "quantized" or "full", the precision of the prefix that block inputs come from during learning.
        iterations, precision, rounding_rows: Steps per block, their matrix products, calibration rows used.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    scale_aware: bool = True
    learning_rate: NotNegative = 0.0
    group_size: Whole = 128
    scale_format: ScaleFormat = "float32"
    weight_format: Annotated[str, FormatOr(("paper", "search"))] = "paper"
    before_gelu: Annotated[str, FormatOr(("paper", "same"))] = "paper"
    activation: Literal["online", "static"] = "online"
    activation_format: Literal["code", "wide"] = "code"
    attention: bool = True
    softmax: Literal["16", "8"] = "16"
    outside: Literal["keep", "8bit"] = "keep"
    inputs: Literal["quantized", "full"] = "quantized"
    iterations: Positive = field(default=RoundingSettings.iterations)
    precision: Literal["float32", "bfloat16"] = "float32"
    rounding_rows: Positive = field(default=Sequencing.rounding_rows)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by FP4DiT."""
    inside = packed.inside_blocks(task.model)
    sequence = Sequencing(inputs=options.inputs, rounding_rows=options.rounding_rows)

    def rules(name: str, seen: Trace) -> LayerRules | str:
        if name not in inside and options.outside == "keep":
            return "outside of the blocks"
        bits = task.bits_of(name) if name in inside else 8
        fixed = options.weight_format != "search" and options.scale_format == "float32"
        found = _formats(bits, name in seen.before_gelu, task.pipeline if name in inside else None, options)
        activation = _input(task.bits.activation and (task.bits.activation if name in inside else 8), options)
        size, clips = options.group_size or None, MIN_MAX if fixed else CLIPS
        weight = Rule(found, "group" if size else "channel", size, clips, scales=options.scale_format)
        return LayerRules(weight, activation, options.rounding == "learned" and bits <= 4)

    rate = SCALE_AWARE_RATE if options.scale_aware else RoundingSettings.learning_rate
    rounding = RoundingSettings(options.iterations, learning_rate=options.learning_rate or rate)
    rounding = replace(rounding, scale_aware=options.scale_aware, precision=options.precision)
    own = _input(task.bits.activation, options) if options.attention else None
    softmax = formats.parse("ue4m4") if options.softmax == "8" else None
    attention = AttentionPlan(own.formats[0] if own else None, softmax) if own or softmax else None
    return post_training.run(task, rules, replace(sequence, rounding=rounding), attention)


def cost(options: Options, bits: Bits) -> Cost:
    """The work that FP4DiT asks of the denoiser, and its storage."""
    size = options.group_size or None
    weight = Rule((more_mantissa(bits.weight),), "group" if size else "channel", size)
    return learned(Cost(weight, _input(bits.activation, options), (), options.outside), options, bits)


def _input(bits: int | None, options: Options) -> Rule | None:
    way: Granularity = "token" if options.activation == "online" else "tensor"
    found = more_mantissa(bits or 8, options.activation_format == "wide")
    return Rule((found,), way, online=way == "token") if bits else None


def _formats(bits: int, gelu: bool, pipeline: str | None, options: Options) -> tuple[formats.Format, ...]:
    named = options.before_gelu if gelu else "same"
    if pipeline is not None and named == "paper" and bits == 4:
        return (formats.parse("e3m0"),)
    named = options.weight_format if named in ("paper", "same") else named
    if pipeline is None or named == "paper":  # outside of the blocks, or by default: one family is on E1M2
        sigma = bits == 4 and pipeline == "PixArtSigmaPipeline"
        return (formats.parse("e1m2") if sigma else more_mantissa(bits),)
    return formats.candidates(bits) if named == "search" else (formats.parse(named),)

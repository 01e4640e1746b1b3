"""SVDQuant (arXiv:2411.05007), for comparison: outliers migrated into the weight, and what a low-rank branch leaves in 4 bits.

Taken from -> here:
  input channels divided by factors that the weight takes over (Sec. 4.1)             `methods.smoothing_factors`
  singular triples of the smoothed weight in a branch of high precision (Eq. 5, 6)    `methods.smoothed_branch`
  the rest, and inputs, in signed integers of 4 bits in groups of 64, nearest         `methods.smoothed_branch`
Not stated there, chosen here:
  a rank of at most a sixteenth of the layer's shorter side, none below 16; factors in float16, and smoothing by powers of two,
  so that files of ComfyUI hold all of it exactly; inputs above 4 bits with one scale per token; layers that are one in
  vLLM-Omni's models have the factors and the branch of one
Differs from the paper: the migration strength is given, not searched by layer; inputs after GELU are not shifted to unsigned
integers; the rest is rounded to nearest only, since second-order rounding does not know smoothed inputs.
"""

from __future__ import annotations

from dataclasses import replace

from difloat.layers import packed
from difloat.methods import post_training
from difloat.methods.cost import Cost
from difloat.methods.low_rank import Pair
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Smoothing, Task
from difloat.methods.smoothed_branch import (
    SHARE,
    nearest_beside_branch,
    powers_of_two,
    shared_factors,
    shared_pairs,
)
from difloat.methods.smoothing_factors import smoothing_factors
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.plan import vllm_models
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import FEW_BITS, MIN_MAX, Rule, online_integers
from difloat.plan.specs import Side

SUMMARY = "smoothed integers in groups beside the largest singular triples of the weight (arXiv:2411.05007)"


@recipe_options
class Options:
    """Options of SVDQuant.

    Attributes:
        rank: The rank of the branches of large layers, or 0 for none.
        smoothing: The migration strength: the exponent of inputs in the factors of channels.
        group_size: Input channels per scale, of weights and of inputs of up to 4 bits.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        rows: Calibration rows by which factors are chosen.
    """

    rank: Whole = 32
    smoothing: NotNegative = 0.5
    group_size: Positive = 64
    keep_8bit: Names = ("first", "last")
    rows: Positive = 128


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by SVDQuant."""
    names = list(packed.quantizable(task.model))
    joined = vllm_models.joined(type(task.model).__name__, names) if task.target == "vllm" else {}
    found = shared_factors(smoothing_factors(task, names, options.smoothing, 1, options.rows), joined)
    smoothing = {name: Smoothing(powers_of_two(one.factors)) for name, one in found.items()}
    asked: dict[str, Rule] = {}

    def rules(name: str, seen: Trace) -> LayerRules:
        if post_training.keeps_8bit(name, seen, options.keep_8bit):
            inputs = online_integers(task.bits.activation and 8, 0)
            return LayerRules(Rule((formats.parse("int8"),), "channel"), inputs)
        asked[name] = _weight(task.bits_of(name), options)
        # This rounding only lays the layer out, for it is rounded anew.
        draft = replace(asked[name], clips=MIN_MAX)
        return LayerRules(draft, _inputs(task.bits, options), smoothing=smoothing.get(name))

    outcome = post_training.run(task, rules, Sequencing())
    layers = dict(outcome.layers)
    weights = {name: packed.weight_of(task.model, name).detach() for name in asked if name in layers}
    pairs: dict[str, Pair] = {}
    for members in joined.values():
        if all(name in weights for name in members):
            rows = {name: weights[name] for name in members}
            pairs |= shared_pairs(rows, layers, options.rank, task.target)
    for name, weight in weights.items():
        asked_of = (asked[name], options.rank, task.target, pairs.get(name))
        layers[name] = nearest_beside_branch(weight, layers[name], *asked_of)
    return replace(outcome, layers=layers)


def cost(options: Options, bits: Bits) -> Cost:
    """What SVDQuant asks of the denoiser and stores."""
    weight, inputs = _weight(bits.weight, options), _inputs(bits, options)
    side = Side(options.rank) if options.rank else None
    passes = (options.rows,)
    made = Cost(weight, inputs, options.keep_8bit, smoothed=True, side=side, side_share=SHARE, passes=passes)
    return replace(made, for_branches=True)


def _weight(bits: int, options: Options) -> Rule:
    return Rule((formats.parse(f"int{bits}"),), "group", options.group_size, scales="float16")


def _inputs(bits: Bits, options: Options) -> Rule | None:
    if bits.activation is None or bits.activation > FEW_BITS:
        return online_integers(bits.activation, 0)
    grid = (formats.parse(f"int{bits.activation}"),)
    return Rule(grid, "group", options.group_size, clips=MIN_MAX, online=True)

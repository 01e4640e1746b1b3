"""H-SVD, for comparison: integers of one width and a low-rank branch that the moments of the inputs choose, nothing else.

No paper states it as it is here. Taken from -> here:
  a branch in high precision that reads the input before it is rounded (SVDQuant, arXiv:2411.05007)   `layers.low_rank_branch`
  column after column, its error fed forward (GPTQ, arXiv:2210.17323)                                 `methods.second_order`
Its own:
  the singular value decomposition of the weight times a root of the damped moments   `methods.low_rank.branch`
  the rest rounded under what the branch leaves of the moments, `up` fitted last      `methods.layer_rounding.with_branch`
Chosen here: asymmetric integers, 8 bits without a branch for first and last layer, online integer inputs; factors in float16;
layers that have no moments of whole patches, or a side no longer than the rank, get no branch.
"""

from __future__ import annotations

import math
from dataclasses import replace

from difloat.methods import closed_form, post_training
from difloat.methods.closed_form import ClosedFormSettings
from difloat.methods.cost import Cost
from difloat.methods.low_rank import LowRankSettings
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task, timed
from difloat.methods.second_order import SecondOrderSettings
from difloat.methods.trace import Trace
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import Rule, asymmetric_integers, online_integers
from difloat.plan.specs import Side

SUMMARY = "integers of one width beside a low-rank branch, both from the moments of the inputs, no training"


@recipe_options
class Options:
    """Options of H-SVD.

    Attributes:
        rank: The rank of the branches.
        damping: The share of the mean diagonal of the moments that is added to it before the decomposition. 0 takes no account
            of the moments there, which is the plain decomposition of the weight.
        refit: Fit scales and zero points under the moments after rounding, and move every weight once to its best grid value.
        group_size: Input channels per weight scale, or 0 for one scale per output channel.
        input_group: Channels per scale and zero point of inputs of up to 4 bits, or 0 for one scale per token, as at 8 bits.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        rows: Calibration rows that moments are gathered from.
    """

    rank: Positive = 4
    damping: NotNegative = 0.1
    refit: bool = True
    group_size: Whole = 0
    input_group: Whole = 32
    keep_8bit: Names = ("first", "last")
    rows: Positive = 128


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by H-SVD."""
    asked: dict[str, Rule] = {}
    edges: list[str] = []
    largest = [1]  # bytes of a row's data in one layer

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        edges.extend([name] * kept)
        largest[0] = seen.row_bytes
        asked[name] = _weight(8 if kept else task.bits_of(name), options)
        inputs = task.bits.activation and (8 if kept else task.bits.activation)
        return LayerRules(asked[name], online_integers(inputs, options.input_group))

    outcome = post_training.run(task, rules, Sequencing())

    measured = dict(outcome.measured)
    rounding = SecondOrderSettings(refit=options.refit, sweep=options.refit)
    branch = LowRankSettings(options.rank, options.damping or math.inf)
    settings = ClosedFormSettings(rounding, rows=options.rows, branch=branch, unbranched=tuple(edges))
    with timed(measured, "round weights"):
        inputs = closed_form.inputs_of(task, outcome.layers, settings, largest[0])
        layers, measured["closed_form"] = closed_form.round_anew(
            task, outcome.layers, inputs, asked, settings
        )
    return replace(outcome, layers=layers, measured=measured)


def cost(options: Options, bits: Bits) -> Cost:
    """What H-SVD asks of the denoiser and stores."""
    inputs = online_integers(bits.activation, options.input_group)
    weight, side = _weight(bits.weight, options), Side(options.rank)
    return Cost(weight, inputs, options.keep_8bit, side=side, passes=(options.rows,))


def _weight(bits: int, options: Options) -> Rule:
    size = options.group_size or None
    return asymmetric_integers(bits, "group" if size else "channel", size)

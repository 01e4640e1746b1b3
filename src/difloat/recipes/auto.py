"""Auto: weights in closed form and bits where the output asks for them, without training.

Taken from -> here:
  second-order rounding (GPTQ, arXiv:2210.17323) in its LDL form, on every grid                   `methods.second_order`
  16 levels in place of 4-bit integers, as GGUF's IQ4_NL has them                                 `numbers.tables`
Its own:
  scales and zero points fitted under the moments, and every weight moved once                    `methods.second_order`
  formats by row within a budget of bytes, by sensitivities of the guided output   `methods.allocation`, `methods.sensitivity`
  inputs of up to 4 bits in groups of channels with zero points, scaled as they come              `plan.rules`
Differs from the paper: moments are of inputs as the float model makes them and the layer rounds them, so layers need not wait
for each other; columns keep their order. Bits such as w4a8 mean the bytes of 4-bit integers everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import ByteSize

from difloat.methods import allocation, closed_form, low_rank, optional_parts, post_training, rotated_inputs
from difloat.methods.allocation import WidthSettings
from difloat.methods.closed_form import ClosedFormSettings
from difloat.methods.cost import Cost
from difloat.methods.layer_rounding import Asked
from difloat.methods.picture_budget import rows_for
from difloat.methods.polish import PolishSettings, polish_cost, polished
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task, Trace, timed
from difloat.methods.second_order import SecondOrderSettings
from difloat.methods.sensitivity import GRADIENT_ROWS, SensitivitySettings
from difloat.methods.weight_rules import REPLACED_LATER, Grid, WeightRules
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import online_integers

SUMMARY = "bits by layer where the output asks for them, weights rounded in closed form, no training"


@recipe_options
class Options(PolishSettings):
    """Options of Auto, and those of polishing: `PolishSettings`.

    Attributes:
        widths: 2 to 8 bits by "rows" (output channels) or "layers" in the bytes of one width or `size`, or "same".
        grid: Weights of up to 4 bits: a "table" of levels, one "fit" to the layer, or an "integer" with a zero point.
        size: The bytes of the denoiser on disk, such as 300MB, in place of the weight bits asked for, or None.
        refit: Fit scales and zero points under the moments after rounding.
        sweep: Move every weight once to its best grid value given the others.
        guidance: Scale of the sampler's guidance, for widths; of no account where rows come without pairs.
        factor_power: Power of the sampler's factors that weighs timesteps for widths; plain modules have none: all weigh alike.
        group_size: Input channels per weight scale, or 0 for one scale per output channel.
        input_group: Channels per scale and zero point of inputs of up to 4 bits, or 0 for one scale per token, as at 8 bits.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        rows: Calibration rows that moments are gathered from, as far as `pictures` allows.
        pictures: Full-precision pictures whose time a model above 100 million weights costs at most, by fewer rows; 0: any.
        rotate: Rotate the inputs of linear layers: "none", "all", or "chosen" where a layer's output then changes less.
        branch: The rank of low-rank branches beside the other weights, whose bytes count in the budget of `widths`, or 0.
    """

    widths: Literal["rows", "layers", "same"] = "rows"
    grid: Grid = "table"
    size: ByteSize | None = None
    refit: bool = True
    sweep: bool = True
    guidance: NotNegative = 3.0
    factor_power: NotNegative = 2.0
    group_size: Whole = 0
    input_group: Whole = 32
    keep_8bit: Names = ("first", "last")
    rows: Positive = 256
    pictures: NotNegative = 5.0
    rotate: rotated_inputs.Rotate = "none"
    branch: Whole = 0


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by Auto."""
    made = optional_parts.worth_having(task, options, _made)
    return polished(task, made, options, options.guidance, options.factor_power)


def _made(task: Task, options: Options) -> Outcome:
    kept: dict[str, bool] = {}

    def rules(name: str, seen: Trace) -> LayerRules:
        kept[name] = post_training.keeps_8bit(name, seen, options.keep_8bit)
        inputs = task.bits.activation and (8 if kept[name] else task.bits.activation)
        return LayerRules(REPLACED_LATER, online_integers(inputs, options.input_group))

    outcome = post_training.run(task, rules, Sequencing())
    layers, measured = outcome.layers, dict(outcome.measured)
    rows = rows_for(task, options.pictures, options.rows, SensitivitySettings.rows)
    sensitivity = rows.sensitivity(options.guidance)
    rounding = SecondOrderSettings(refit=options.refit, sweep=options.sweep)
    edges, branch = tuple(n for n in layers if kept[n]), low_rank.settings_of(options.branch)
    settings = ClosedFormSettings(rounding, rows.matrices, rows.moments, branch, edges)
    weights = WeightRules.of_task(task, options.grid, options.group_size, options.refit)
    same = {n: weights.at(8 if kept[n] else task.bits_of(n), layers[n].shape) for n in layers}
    most, asked = outcome.seen.row_bytes, dict[str, Asked](same)
    layers, measured["rotations"] = rotated_inputs.rotate(task, layers, options.rotate, same, most)
    inputs = closed_form.inputs_of(task, layers, settings, most)
    if options.widths != "same" and (free := [name for name in layers if not kept[name]]):
        with timed(measured, "choose widths"):
            offers = {name: weights.offers(layers[name].shape) for name in free}
            wanted = WidthSettings(options.widths, options.size, options.factor_power, sensitivity)
            fixed = {name: same[name] for name in edges}
            choice = allocation.choose(task, layers, inputs, offers, fixed, wanted, settings)
        asked, measured["widths"] = asked | choice.asked, choice.report()
    with timed(measured, "round weights"):
        layers, measured["closed_form"] = closed_form.round_anew(task, layers, inputs, asked, settings)
    return replace(outcome, layers=layers, measured=measured)


def cost(options: Options, bits: Bits) -> Cost:
    """What Auto asks of the denoiser and stores: moments, and for widths sensitivities with gradient."""
    inputs, turned = online_integers(bits.activation, options.input_group), options.rotate != "none"
    weight = WeightRules(options.grid, options.group_size).at(bits.weight)
    side, widths = low_rank.side_of(options.branch), [GRADIENT_ROWS] * (options.widths != "same")
    passes = (options.rows, *widths)
    made = Cost(weight, inputs, options.keep_8bit, side=side, rotated=turned, passes=passes, for_files=True)
    return polish_cost(optional_parts.cost_of_trials(made, options, options.rows), options)

"""Auto: weights in closed form, bits where the output asks for them; no training.

Taken from -> here:
  second-order rounding (GPTQ, arXiv:2210.17323) in its LDL form, on integers with a zero point   `methods.second_order`
Its own:
  scales and zero points fitted under the moments, and every weight moved once                    `methods.second_order`
  sensitivities of the guided output, by timestep                                                 `methods.sensitivity`
  widths by layer under the bytes of one width everywhere                                         `methods.budget`
Differs from the paper: moments are of inputs as the float model makes them and the layer rounds them, so that layers do not
wait for each other; columns keep their order. Bits such as w4a8 mean the bytes of 4 bits everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from difloat import distributed
from difloat.methods import closed_form, post_training
from difloat.methods.closed_form import ClosedFormSettings
from difloat.methods.cost import WITH_GRADIENT, Cost
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task, timed
from difloat.methods.second_order import SecondOrderSettings
from difloat.methods.sensitivity import SensitivitySettings
from difloat.methods.trace import Trace
from difloat.methods.training.timestep_weights import loss_weights
from difloat.numbers import formats
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import MIN_MAX, Rule, asymmetric_integers

SUMMARY = (
    "integers, bits by layer where the output asks for them, weights rounded in closed form, no training"
)


@recipe_options
class Options:
    """Options of Auto.

    Attributes:
        widths: "allocated": 2 to 8 bits by layer at the bytes of one width; "same": that width everywhere.
        refit: Fit scales and zero points under the moments after rounding.
        sweep: Move every weight once to its best grid value given the others.
        guidance: Scale of the sampler's guidance, for "allocated"; of no account where rows come without pairs.
        factor_power: Power of the sampler's factors that weighs timesteps for "allocated"; a plain module has no sampler, there
            all weigh alike.
        group_size: Input channels per weight scale; 0: one scale per output channel.
        keep_8bit: As in LBFP.
        rows: Calibration rows that moments are gathered from.
    """

    widths: Literal["allocated", "same"] = "allocated"
    refit: bool = True
    sweep: bool = True
    guidance: NotNegative = 3.0
    factor_power: NotNegative = 2.0
    group_size: Whole = 0
    keep_8bit: Names = ("first", "last")
    rows: Positive = 128


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by Auto."""
    kept: dict[str, bool] = {}
    largest = [1]  # bytes of a row's data in the layer where they are most

    def rules(name: str, seen: Trace) -> LayerRules:
        kept[name] = post_training.keeps_8bit(name, seen, options.keep_8bit)
        largest[0] = seen.row_bytes
        asked = _weight(8 if kept[name] else task.bits.weight, options)
        inputs = task.bits.activation and (8 if kept[name] else task.bits.activation)
        return LayerRules(asked, _inputs(inputs))

    outcome = post_training.run(task, rules, Sequencing())

    def finish() -> Outcome:
        measured, layers = dict(outcome.measured), outcome.layers
        settings = ClosedFormSettings(
            rounding=SecondOrderSettings(refit=options.refit, sweep=options.sweep),
            sensitivity=SensitivitySettings(guidance=options.guidance),
            rows=options.rows,
        )
        inputs = closed_form.inputs_of(task, layers, settings, largest[0])
        bits = {name: 8 if kept[name] else task.bits.weight for name in layers}
        if options.widths == "allocated" and not all(kept[name] for name in layers):
            with timed(measured, "choose widths"):
                by_time = loss_weights(task, options.factor_power if task.scheduler is not None else 0.0)
                fixed = [name for name in layers if kept[name]]
                chosen, found = closed_form.widths(
                    task, layers, inputs, lambda width: _weight(width, options), fixed, by_time, settings
                )
            bits |= chosen
            measured["widths"] = {"bits": chosen, "optimal": found.optimal, "bytes": found.size}
        with timed(measured, "round weights"):
            asked = {name: _weight(bits[name], options) for name in layers}
            layers, measured["closed_form"] = closed_form.round_anew(task, layers, inputs, asked, settings)
        return replace(outcome, layers=layers, measured=measured)

    return distributed.on_main(finish)


def cost(options: Options, bits: Bits) -> Cost:
    """What Auto asks of the denoiser and stores: moments once or twice, and sensitivities, with gradient, for widths."""
    passes = (options.rows,)
    if options.widths == "allocated":
        passes += (options.rows, WITH_GRADIENT * SensitivitySettings.rows * SensitivitySettings.probes)
    return Cost(_weight(bits.weight, options), _inputs(bits.activation), options.keep_8bit, passes=passes)


def _weight(bits: int, options: Options) -> Rule:
    size = options.group_size or None
    return asymmetric_integers(bits, "group" if size else "channel", size)


def _inputs(bits: int | None) -> Rule | None:
    return bits and Rule((formats.parse(f"int{bits}"),), "token", clips=MIN_MAX, online=True)

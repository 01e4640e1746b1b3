"""GPTQ (arXiv:2210.17323), for comparison: integers of one width, errors fed forward, nothing else.

Taken from -> here:
  column after column, its error fed forward through the inverse of the moments   `methods.second_order`, in LDL form
  damping of 1 % of the mean diagonal                                             `SecondOrderSettings.damping`
Not stated there, chosen here:
  asymmetric integers, ranges searched before rounding; 8 bits for first and last layer; online integer inputs per token
Differs from the paper: moments are of inputs as the float model makes them and the layer rounds them, layers do not wait for
each other; columns keep their order unless `by_diagonal` asks for the paper's later one.
"""

from __future__ import annotations

from dataclasses import replace

from difloat.methods import closed_form, post_training
from difloat.methods.closed_form import ClosedFormSettings
from difloat.methods.cost import Cost
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task, timed
from difloat.methods.second_order import SecondOrderSettings
from difloat.methods.trace import Trace
from difloat.plan.options import Names, Positive, Whole, recipe_options
from difloat.plan.rules import Rule, asymmetric_integers, online_integers

SUMMARY = "integers of one width, errors fed forward under the moments of the inputs (arXiv:2210.17323)"


@recipe_options
class Options:
    """Options of GPTQ.

    Attributes:
        group_size: Input channels per weight scale, or 0 for one scale per output channel.
        by_diagonal: Round the columns with the largest inputs first.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        rows: Calibration rows that moments are gathered from.
    """

    group_size: Whole = 0
    by_diagonal: bool = False
    keep_8bit: Names = ("first", "last")
    rows: Positive = 128


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by GPTQ."""
    asked: dict[str, Rule] = {}
    largest = [1]  # bytes of a row's data in one layer

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        largest[0] = seen.row_bytes
        asked[name] = _weight(8 if kept else task.bits_of(name), options)
        inputs = task.bits.activation and (8 if kept else task.bits.activation)
        return LayerRules(asked[name], online_integers(inputs, 0))

    outcome = post_training.run(task, rules, Sequencing())

    measured = dict(outcome.measured)
    rounding = SecondOrderSettings(by_diagonal=options.by_diagonal, refit=False, sweep=False)
    settings = ClosedFormSettings(rounding, rows=options.rows)
    with timed(measured, "round weights"):
        inputs = closed_form.inputs_of(task, outcome.layers, settings, largest[0])
        layers, measured["closed_form"] = closed_form.round_anew(
            task, outcome.layers, inputs, asked, settings
        )
    return replace(outcome, layers=layers, measured=measured)


def cost(options: Options, bits: Bits) -> Cost:
    """What GPTQ asks of the denoiser and stores."""
    inputs = online_integers(bits.activation, 0)
    return Cost(_weight(bits.weight, options), inputs, options.keep_8bit, passes=(options.rows,))


def _weight(bits: int, options: Options) -> Rule:
    size = options.group_size or None
    return asymmetric_integers(bits, "group" if size else "channel", size)

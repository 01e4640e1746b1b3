"""MPQ-DM: 2 to 4 bits by mixed widths inside a layer and relation distillation (arXiv:2412.11549, AAAI 2025).

Paper -> here:
  OMQ: input channels scaled, rows sorted by kurtosis, n rows get N + 1 bits and n rows N - 1   `methods.mixed_rows`
  n searched by output error over 0, k, 2k, ... up to half of the rows                        `methods.mixed_rows.allocate`
  MPQ-DM+: a tenth of the rows more at N + 1                                                  `plus=true`
  TRD: relations of positions, features smoothed over two sampler steps, every second step    `methods.training.relation_loss`
  base: EfficientDM's adapters merged before rounding, input ranges by timestep               `methods.training.twin_layer`
  first and last layers at 8 bits without adapters                                            `keep_8bit`

Differs from the paper: inputs are scaled at run time, never by the operation before (a plan holds planned layers and leaves the
  user's norms alone); ranges are searched by squared error (the code: min-max for choosing n, then L2.4); zero points are real
  numbers; a convolution's second adapter is 1 x 1; skip and down-sampling convolutions are quantized too; 40 epochs over
  calibration rows, not 800 over fresh trajectories (`fresh_rows=1`); outputs compared after guidance with `compare_at` only;
  the student's step before is seen by the student as it is now; layers of the time embedding are not kept at 8 bits.
Differs from the released code where that differs from the paper: n over the whole range (`candidates=release`: 0 and k only);
  relations attached to the graph (`relation=detached`); dead channels are safe; no constant in the adapters' rate.
Inferred: the rows that MPQ-DM+ raises (those behind the first n); `adapter_init=error` after MPQ-DMv2 (arXiv:2507.04290). Its
  binary residual branch is left out: rows of N + 1 bits are about as good at the same bytes (`benchmarks/binary_residual.py`).
New here: `grid=fp`, the same on floating-point grids, signed or unsigned with a zero point, chosen per width.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any, Literal

from difloat.methods import post_training
from difloat.methods.cost import ALL_ROWS, Cost, trained
from difloat.methods.mixed_rows import AllocationSettings, Criterion, allocate, summary
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.relation_loss import Kind, RelationSettings, feature_module
from difloat.methods.training.student import Adapters
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, settings_of
from difloat.methods.training.twin_layer import Init
from difloat.plan.options import Names, NotNegative, Positive, Whole, recipe_options
from difloat.plan.rules import asymmetric_integers, floating_grids

SUMMARY = "2 to 4 bits: rows of several widths, relation distillation, fine-tuned (arXiv:2412.11549)"


@recipe_options
class Options(TrainingSettings):
    """Options of MPQ-DM, and those of fine-tuning: `TrainingSettings`.

    Attributes:
        grid: "int" as in the paper, "fp" for floating-point grids of the same widths.
        mixed: Whether widths are chosen row by row. False is the base of the ablation, with N bits and inputs not scaled.
        plus: MPQ-DM+, a tenth of the rows more at N + 1 bits.
        criterion, candidates, scale_inputs: Fields of `AllocationSettings`.
        relation, relation_weight, feature_weight, relation_every, features: The fields of `RelationSettings`.
        rank: The rank of the adapters.
        adapter_init: "zero", or "error" for a start at the largest directions of the rounding error.
        ranges_by_timestep: Learn input ranges apart for every timestep.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
    """

    grid: Literal["int", "fp"] = "int"
    mixed: bool = True
    plus: bool = field(default=AllocationSettings.extra_tenth)
    criterion: Criterion = field(default=AllocationSettings.criterion)
    candidates: Literal["range", "release"] = field(default=AllocationSettings.candidates)
    scale_inputs: bool = field(default=AllocationSettings.scale_inputs)
    relation: Kind = field(default=RelationSettings.kind)
    relation_weight: NotNegative = field(default=RelationSettings.weight)
    feature_weight: NotNegative = field(default=RelationSettings.feature_weight)
    relation_every: Positive = field(default=RelationSettings.every)
    features: str = field(default=RelationSettings.module)
    rank: Whole = 32
    adapter_init: Init = field(default=Adapters.init)
    ranges_by_timestep: bool = True
    keep_8bit: Names = ("first", "last")


def cost(options: Options, bits: Bits) -> Cost:
    """What MPQ-DM asks of the denoiser and stores. The widths of a layer are counted at their mean."""
    rule = {"int": asymmetric_integers, "fp": floating_grids}[options.grid]
    scaled, related = options.mixed and options.scale_inputs, options.epochs > 0 and options.relation != "off"
    inputs = None if bits.activation is None else rule(bits.activation, "tensor")
    asked = trained(Cost(rule(bits.weight, "channel"), inputs, options.keep_8bit), options)
    passes = (AllocationSettings.rows,) * (options.mixed + scaled) + (ALL_ROWS,) * related
    beside = asked.beside + related / options.relation_every
    return replace(asked, smoothed=scaled, passes=passes, beside=beside)


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by MPQ-DM."""
    kept, training, weights = list[str](), settings_of(options, task), loss_weights(task, 0.0)
    choosing = AllocationSettings(
        options.criterion, options.candidates, options.plus, scale_inputs=options.scale_inputs
    )
    weighed = (options.relation_weight, options.feature_weight, options.relation_every)
    relation = RelationSettings(options.relation, *weighed, options.features)
    if options.epochs and relation.kind != "off":
        feature_module(task, relation)  # refused before the search, not after it
    rule = {"int": asymmetric_integers, "fp": floating_grids}[options.grid]
    timing: dict[str, Any] = {"seconds": {}}
    with post_training.timed(timing, "choose widths"):
        chosen = allocate(task, lambda bits: rule(bits, "channel"), choosing) if options.mixed else {}

    def rules(name: str, seen: Trace) -> LayerRules:
        keeps = post_training.keeps_8bit(name, seen, options.keep_8bit)
        kept.extend([name] if keeps else [])
        widths = (8, 8) if keeps else (task.bits.weight, task.bits.activation)
        activation = None if task.bits.activation is None else rule(widths[1] or 8, "tensor")
        if keeps or not options.mixed:
            return LayerRules(rule(widths[0], "channel"), activation)
        found = chosen[name]
        return LayerRules(rule(widths[0], "channel"), activation, False, found.smoothing, found.mixed)

    outcome = post_training.run(task, rules, Sequencing())
    outcome.measured["seconds"] |= timing["seconds"]
    outcome.measured["kept_8bit"] = kept
    outcome.measured["widths"] = summary({name: one for name, one in chosen.items() if name not in kept})
    adapters = Adapters(1, options.rank, tuple(kept), options.ranges_by_timestep, init=options.adapter_init)
    return tune(task, outcome, Tuning(training, adapters, weights, relation))

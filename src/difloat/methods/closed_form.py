"""Weights of a plan rounded anew in closed form, their widths chosen per layer at the bytes of that plan.

The plan at hand says which layers are quantized, how they round their inputs, and how many bytes they take. Moments of those
inputs and sensitivities of the output tell what every width of every layer would cost, the budget decides between them, and
second-order rounding carries it out. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from difloat.layers import packed
from difloat.methods.budget import Allotment, Candidate, allot
from difloat.methods.moments import MomentSettings, Source, cost, gather, sources
from difloat.methods.second_order import SecondOrderSettings, nearest_row_error, round_second_order
from difloat.methods.sensitivity import SensitivitySettings, probes_of, sensitivities
from difloat.methods.task import Task
from difloat.methods.trace import Call
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft, Rule, draft_layer
from difloat.plan.specs import layer_tensor_shapes
from difloat.plan.target import restrict

RuleOf = Callable[[int], Rule]


@dataclass(frozen=True)
class ClosedFormSettings:
    """How weights are chosen and rounded.

    Attributes:
        rounding: Of the weights.
        moments: What is gathered of inputs.
        sensitivity: What is looked at to choose widths.
        widths: Bits that a layer may get.
        rows: Calibration rows for moments.
    """

    rounding: SecondOrderSettings = field(default_factory=SecondOrderSettings)
    moments: MomentSettings = field(default_factory=MomentSettings)
    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    rows: int = 128


@dataclass(frozen=True)
class Inputs:
    """Calls that give layers their inputs, and the distinct inputs among them."""

    calls: list[Call]
    found: list[Source]


def inputs_of(
    task: Task, plans: Mapping[str, LayerPlan], settings: ClosedFormSettings, row_bytes: int
) -> Inputs:
    """What moments of the layers' inputs are gathered from; a row's largest layer takes `row_bytes`.

    Raises:
        ValueError: if there are no calibration rows.
    """
    if not len(task.calibration):
        raise ValueError("weights must be rounded on calibration rows, got none; collect some, or choose rtn")
    generator = torch.Generator().manual_seed(task.seed)
    rows = task.calibration.stratified(min(settings.rows, len(task.calibration)), generator)
    calls = task.calls(rows, row_bytes)
    return Inputs(calls, sources(task.model, calls[0], plans, settings.moments))


def widths(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    rule_of: RuleOf,
    fixed: Sequence[str],
    weights: Mapping[float, float],
    settings: ClosedFormSettings,
) -> tuple[dict[str, int], Allotment]:
    """Bits of every layer's weight: the least error of the output at no more bytes than `plans` take.

    Args:
        task: Model and data.
        plans: Layers with inputs.
        inputs: See `inputs_of`.
        rule_of: What is asked of a weight of so many bits.
        fixed: Layers that keep their weight and do not appear in the result; their bytes are not up for choice.
        weights: Of a squared error of the output at every timestep.
        settings: See there.

    Raises:
        ValueError: as `allot` and `sensitivities`.
    """
    open_ = {name: plan for name, plan in plans.items() if name not in fixed}
    probes = probes_of(task, settings.sensitivity, weights)
    gamma = sensitivities(task.model, probes, list(open_), settings.sensitivity, task.seed)
    offered: dict[str, list[Candidate]] = {}
    gathered = gather(task.model, inputs.calls, plans, settings.moments, inputs.found)
    for moments in tqdm(gathered, desc="error by width", total=len(inputs.found), disable=not task.progress):
        for name in moments.source.names:
            if name in open_:
                drafts = [_draft(task, name, open_[name], rule_of(bits)) for bits in settings.widths]
                errors = [nearest_row_error(draft, moments.matrix).cpu() @ gamma[name] for draft in drafts]
                offered[name] = [
                    Candidate(_bytes(open_[name], draft), float(error))
                    for draft, error in zip(drafts, errors, strict=True)
                ]
    found = allot({name: offered[name] for name in open_}, sum(plan.nbytes for plan in open_.values()))
    return {name: settings.widths[pick] for name, pick in found.picks.items()}, found


def round_anew(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    rules: Mapping[str, Rule],
    settings: ClosedFormSettings,
) -> tuple[dict[str, LayerPlan], dict[str, Any]]:
    """Second-order rounding of every layer's weight, with the inputs of `plans`.

    Args:
        task: Model and data.
        plans: Layers with inputs.
        inputs: See `inputs_of`.
        rules: What is asked of the weight of each layer.
        settings: See there.

    Returns:
        The layers in the order of `plans`; what gathering took; and by layer the error relative to nearest rounding on the
        searched scales, the damping, and how many input vectors the moments are of.
    """
    done, report = {}, {}
    gathered = gather(task.model, inputs.calls, plans, settings.moments, inputs.found)
    for moments in tqdm(gathered, desc="round weights", total=len(inputs.found), disable=not task.progress):
        for name in moments.source.names:
            draft = _draft(task, name, plans[name], rules[name])
            try:
                found = round_second_order(draft, moments.matrix, settings.rounding)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            done[name] = _with_inputs(found.plan(), plans[name])
            nearest = float(found.nearest_error.sum())
            report[name] = {
                "error": float(found.row_error.sum()) / nearest if nearest else 1.0,
                "damping": found.damping,
                "vectors": moments.vectors,
            }
    layers = {name: done[name] for name in plans}
    return layers, {"moments": cost(inputs.found, settings.moments), "layers": report}


def _draft(task: Task, name: str, plan: LayerPlan, rule: Rule) -> Draft:
    splits = [part.channels for part in plan.parts]
    return draft_layer(packed.weight_of(task.model, name), splits, restrict(rule, task.target))


def _bytes(plan: LayerPlan, draft: Draft) -> int:
    """What the layer would take with the weight of `draft`, as `LayerPlan.nbytes` counts."""
    parts = [
        replace(new, activation=old.activation) for new, old in zip(draft.parts, plan.parts, strict=True)
    ]
    shapes = layer_tensor_shapes(plan.shape, parts)
    return sum(math.prod(shape) * LayerPlan.dtype_of(name).itemsize for name, shape in shapes.items())


def _with_inputs(new: LayerPlan, old: LayerPlan) -> LayerPlan:
    """The layer `new` with the inputs of `old`."""
    parts = tuple(replace(n, activation=o.activation) for n, o in zip(new.parts, old.parts, strict=True))
    stored = {name: tensor for name, tensor in old.tensors.items() if name.startswith("input_")}
    return replace(new, parts=parts, tensors={**new.tensors, **stored})

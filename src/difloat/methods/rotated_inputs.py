"""Which linear layers of a plan read a rotated input, where weights are rounded afterwards under the moments of that input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from difloat.layers import packed
from difloat.methods import trace
from difloat.methods.layer_rounding import Asked
from difloat.methods.moments import rounded_input
from difloat.methods.task import Task
from difloat.methods.trace import removed
from difloat.plan.encode import stored_values
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, block_rotation, draft_layer
from difloat.plan.target import restrict

Rotate = Literal["none", "all", "chosen"]
_ROWS, _VECTORS = 16, 4096  # calibration rows, and vectors of each call, by which bases are compared


def rotate(
    task: Task, plans: Mapping[str, LayerPlan], how: Rotate, asked: Mapping[str, Asked], row_bytes: int
) -> tuple[dict[str, LayerPlan], dict[str, float]]:
    """Rotate the inputs of linear layers. Their stored weights stay what they are and must be rounded anew.

    Layers with parts or with a stored input range keep their input as it is, because both belong to its own channels.

    Args:
        task: Model and data.
        plans: Layers with inputs.
        how: "all" for every linear layer, "chosen" for those whose output then changes less, both weight and input rounded to
            nearest, on some calibration rows.
        asked: What is asked of the weight of each layer before widths are chosen, a rule or bands of rules.
        row_bytes: The bytes that a row's largest layer takes.

    Returns:
        The layers, and with "chosen" the squared error of the rotated layer's output relative to that of the layer as it is.
    """
    found = {name: _rotated(plan) for name, plan in plans.items() if how != "none"}
    possible = {name: turned for name, turned in found.items() if turned is not None}
    if how != "chosen" or not possible:
        return {**plans, **possible}, {}
    generator = torch.Generator().manual_seed(task.seed)
    calls = task.calls(task.calibration.stratified(min(_ROWS, len(task.calibration)), generator), row_bytes)
    sums = {name: _Errors(task, name, plans[name], possible[name], asked[name]) for name in possible}

    def hook_for(name: str) -> Callable[[nn.Module, Tensor], None]:
        return lambda layer, x: sums[name].add(x)

    handles = [trace.before_call(task.model.get_submodule(name), hook_for(name)) for name in possible]
    with removed(handles), torch.no_grad():
        for args, kwargs in calls:
            task.model(*args, **kwargs)
    shares = {name: one.rotated / one.plain if one.plain else 1.0 for name, one in sums.items()}
    return {**plans, **{name: possible[name] for name in possible if shares[name] < 1}}, shares


def _rotated(plan: LayerPlan) -> LayerPlan | None:
    rotation = block_rotation(plan.shape)
    stored = any(part.activation is not None and not part.activation.online for part in plan.parts)
    if rotation is None or stored or len(plan.parts) != 1 or plan.smoothed:
        return None
    return replace(plan, rotation=rotation)


class _Errors:
    """Sums of squared errors of one layer's output in both bases, everything rounded to nearest."""

    def __init__(self, task: Task, name: str, plain: LayerPlan, rotated: LayerPlan, asked: Asked) -> None:
        self._weight = packed.weight_of(task.model, name).detach().float()
        self._bases = []
        first = asked if isinstance(asked, Rule) else asked.rules[0]
        for plan in (plain, rotated):
            draft = draft_layer(plan.rotated(self._weight), [plan.shape[1]], restrict(first, task.target))
            self._bases.append((plan, stored_values(draft.plan())))
        self.plain = self.rotated = 0.0

    def add(self, x: Tensor) -> None:
        """Add the errors for some vectors of an input [..., i]."""
        vectors = x.detach().reshape(-1, x.shape[-1]).float()
        vectors = vectors[:: -(-len(vectors) // _VECTORS) or 1]
        wanted = vectors @ self._weight.T
        errors = [
            float((rounded_input(vectors, plan) @ values.T - wanted).square().sum(dtype=torch.float64))
            for plan, values in self._bases
        ]
        self.plain, self.rotated = self.plain + errors[0], self.rotated + errors[1]

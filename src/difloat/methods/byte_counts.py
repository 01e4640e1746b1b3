"""The bytes of layers in the formats that they may get, in our checkpoint or in a kind of file, and the budget for them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from difloat.layers import packed
from difloat.methods.task import MixedRows, Task
from difloat.plan import file_offers
from difloat.plan.file_offers import LEAST_BITS, MOST_BITS, file_bytes, float_bytes
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, asymmetric_integers, levels_or_integers
from difloat.plan.specs import Band, Part, layer_tensor_shapes
from difloat.plan.target import FILES, Target, fit


def least_bytes(model: nn.Module, kept: Collection[str], target: Target) -> int:
    """The bytes of a model below which no choice of formats comes: two bits everywhere, or the least that a file takes.

    Args:
        model: In float.
        kept: Names of layers that are not quantized.
        target: A kind of file, or else what is counted is our checkpoint.
    """
    total = sum(float_bytes(tensor, target) for tensor in model.state_dict().values())
    for name in packed.quantizable(model).keys() - kept:
        weight = packed.weight_of(model, name)
        asked = asymmetric_integers(8, "channel")
        if target in FILES and isinstance(fit(asked, False, weight.dim() == 2, weight.shape[1], target), str):
            continue  # stays float
        rules = file_offers.offers(tuple(weight.shape), False, target) or (levels_or_integers(2, "channel"),)
        part = Part(weight.shape[1], rules[0].spec(rules[0].formats[0]))
        least = _bytes(layer_tensor_shapes(tuple(weight.shape), [part]))
        if target in FILES:
            least = min(file_bytes(tuple(weight.shape), rule, target) for rule in rules)
        total -= max(0, float_bytes(weight, target) - least)
    return total


def layer_bytes(plan: LayerPlan, rule: Rule, target: Target = "any") -> int:
    """What the layer would take with a weight as `rule` asks for, as `LayerPlan.nbytes` counts, or in a kind of file."""
    if target in FILES:
        return file_bytes(plan.shape, rule, target)
    parts = [_with(part, rule) for part in plan.parts]
    return _bytes(layer_tensor_shapes(plan.shape, parts))


def mixed_bytes(plan: LayerPlan, rows: MixedRows) -> int:
    """The same of a weight with rows in bands."""
    bands = tuple(
        Band(count, tuple(_with(part, rule).weight for part in plan.parts))
        for count, rule in zip(rows.counts, rows.rules, strict=True)
    )
    parts = [_with(part, rows.rules[0]) for part in plan.parts]
    return _bytes(layer_tensor_shapes(plan.shape, parts, bands=bands))


def _with(part: Part, rule: Rule) -> Part:
    return replace(part, weight=rule.spec(rule.formats[0]))


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) * LayerPlan.dtype_of(name).itemsize for name, shape in shapes.items())


def budget_of(
    task: Task,
    plans: Mapping[str, LayerPlan],
    fixed: Mapping[str, Rule],
    offers: Mapping[str, Sequence[Rule]],
    size: int | None,
) -> int:
    """Bytes for the layers in `offers`: what `task.bits` would take everywhere, or what the others leave of `size`.

    Bits mean integers with one scale and zero point per output channel; between two whole widths bytes grow in proportion.
    Of files 4 bits mean the smallest that they offer and 8 bits the largest.

    Args:
        task: Model and bits; what is not quantized is counted in its dtype.
        plans: Layers with inputs.
        fixed: What is asked of the weights that are not up for choice.
        offers: Candidates of the others.
        size: Bytes of all parameters and stored buffers of the model. None if not asked for.

    Raises:
        ValueError: if the smallest candidates do not fit into `size` (the least size that does is named).
    """
    if size is None and task.target in FILES:
        sizes = [[layer_bytes(plans[n], rule, task.target) for rule in rules] for n, rules in offers.items()]
        share = (task.bits.mean - LEAST_BITS) / (MOST_BITS - LEAST_BITS)
        return round((1 - share) * sum(map(min, sizes)) + share * sum(map(max, sizes)))
    if size is None:
        low = math.floor(task.bits.mean)
        share = task.bits.mean - low
        at = [
            sum(layer_bytes(plans[name], asymmetric_integers(bits, "channel")) for name in offers)
            for bits in (low, math.ceil(task.bits.mean))
        ]
        return round((1 - share) * at[0] + share * at[1])
    return _left(task, plans, fixed, offers, size)


def _left(
    task: Task,
    plans: Mapping[str, LayerPlan],
    fixed: Mapping[str, Rule],
    offers: Mapping[str, Sequence[Rule]],
    size: int,
) -> int:
    target = task.target
    weights = sum(float_bytes(packed.weight_of(task.model, name), target) for name in plans)
    floating = sum(float_bytes(tensor, target) for tensor in task.model.state_dict().values()) - weights
    stays = floating + sum(layer_bytes(plans[name], rule, target) for name, rule in fixed.items())
    least = sum(min(layer_bytes(plans[n], rule, target) for rule in rules) for n, rules in offers.items())
    if size < stays + least:
        raise ValueError(
            f"size must be at least {stays + least} bytes for this model, got {size}; {floating} of them are not quantized"
        )
    return size - stays

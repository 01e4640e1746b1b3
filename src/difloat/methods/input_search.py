"""The search for formats and scales of layers' inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from difloat.kernels import rotation
from difloat.layers.packed import QuantizedLayer
from difloat.methods.paused_forwards import Passes
from difloat.methods.trace import Call, input_of
from difloat.numbers.search import Found
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, lopsidedness, quantiles
from difloat.plan.specs import Part

_SAMPLES = 1 << 19  # values of one activation tensor that a search takes


def plan_inputs(plan: LayerPlan, x: Tensor | None, rule: Rule, generator: torch.Generator) -> LayerPlan:
    """Choose format and scale of a layer's input from a sample of it.

    Args:
        plan: The layer, without inputs.
        x: The input, [..., i] of a linear layer or [b, i, h, w] of a convolution, or None with an online rule.
        rule: The rule for the input. An online rule takes its first format and needs no data.
        generator: The generator that draws at most half a million values per part, always with the extremes.
    """
    if rule.online or x is None:
        spec = rule.spec(rule.formats[0])
        return replace(plan, parts=tuple(replace(part, activation=spec) for part in plan.parts))
    parts: list[Part] = []
    found: list[Found] = []
    for piece, part in zip(_pieces(plan, x.detach()), plan.parts, strict=True):
        found.append(rule.search(_sample(piece, generator)))
        parts.append(replace(part, activation=rule.spec(found[-1].format)))
    vectors = {"input_scale": torch.cat([each.scale.reshape(-1).float() for each in found])}
    if shifted := [each.zero_point for each in found if rule.spec(each.format).zero_point]:
        vectors["input_zero_point"] = torch.cat([zero.reshape(-1).float() for zero in shifted])
    return replace(plan, parts=tuple(parts), tensors={**plan.tensors, **vectors})


def _pieces(plan: LayerPlan, x: Tensor) -> Sequence[Tensor]:
    """The input of every part."""
    if len(plan.parts) == 1:  # a grouped convolution reads more channels than each row of its weight has
        return [x]
    return x.split([part.channels for part in plan.parts], dim=-1 if plan.kind == "linear" else 1)


def _sample(x: Tensor, generator: torch.Generator) -> Tensor:
    """A row [1, n] of values of a tensor, with its smallest and largest among them."""
    flat = x.detach().reshape(-1)
    if flat.numel() <= _SAMPLES:
        return flat.float()[None]
    # With repeats, since a permutation of a whole activation would cost more than the search.
    chosen = torch.randint(flat.numel(), (_SAMPLES - 2,), generator=generator).to(flat.device)
    return torch.cat([flat[chosen], *(end[None] for end in flat.aminmax())]).float()[None]


def search_inputs(
    model: nn.Module,
    calls: Sequence[Call],
    plans: Mapping[str, LayerPlan],
    rules: Mapping[str, Rule],
    generator: torch.Generator,
) -> tuple[dict[str, LayerPlan], dict[str, list[dict[str, Any]]]]:
    """Choose the input quantization of every layer in the order of execution, earlier layers already quantized.

    One forward pass does it all. Just before a layer runs, its input, which earlier quantized layers made, is searched, and the
    layer runs with the result. Layers whose scales are all online need no pass.

    Args:
        model: The model with quantized weights, whose inputs are quantized in place.
        calls: The calls with the calibration rows.
        plans: The layers of the model.
        rules: The rules for the inputs, in the order of execution. Layers without a rule keep their input.
        generator: The generator that `plan_inputs` takes.

    Returns:
        The layers with inputs, and by layer and part the shapes of those inputs whose rule looks for asymmetry: `quantiles`
        (`QUANTILES`), `lopsided` (`lopsidedness`), and whether that is `asymmetric` by the rule.

    Raises:
        ValueError: if an input is not finite.
    """
    done = dict(plans)
    shapes: dict[str, list[dict[str, Any]]] = {}

    def take(name: str, x: Tensor | None) -> None:
        done[name] = plan_inputs(done[name], x, rules[name], generator)
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        layer.load(done[name], layer.weight.device)

    for name, rule in rules.items():
        if rule.online:
            take(name, None)
    waiting = [name for name, rule in rules.items() if not rule.online]
    if not waiting:
        return done, shapes
    with Passes(model, calls) as passes:
        for name in waiting:
            x = _smoothed(_inputs(passes.arguments(name), done[name]), done[name])
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"inputs of layer {name!r} must be finite, got NaN or Inf; calibrate in float32"
                )
            take(name, x)
            if rule.asymmetry:
                shapes[name] = [_shape(piece, rule) for piece in _pieces(done[name], x)]
    return done, shapes


def _inputs(calls: Sequence[Call], plan: LayerPlan) -> Tensor:
    """The layer's input in all calls. Where pictures or captions differ in size, positions follow one another."""
    inputs = [input_of(*call) for call in calls]
    if len({x.shape[1:] for x in inputs}) == 1:
        return torch.cat(inputs)
    if plan.kind == "linear":
        return torch.cat([x.flatten(0, -2) for x in inputs])
    return torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)[None, :, :, None]


def _shape(x: Tensor, rule: Rule) -> dict[str, Any]:
    lopsided = lopsidedness(x)
    return {"quantiles": quantiles(x), "lopsided": lopsided, "asymmetric": lopsided >= rule.asymmetry}


def _smoothed(x: Tensor, plan: LayerPlan) -> Tensor:
    if plan.rotation is not None:
        return rotation.rotate(x, plan.rotation)
    if not plan.smoothed:
        return x
    factor = plan.tensors["input_factor"].to(x.device)
    return x * (factor if plan.kind == "linear" else factor.reshape(-1, 1, 1))

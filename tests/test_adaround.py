"""Learned rounding against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difloat.methods import soft_rounding
from difloat.methods.input_search import plan_inputs
from difloat.methods.learned_rounding import RoundingSettings, learn_rounding, relative_error
from difloat.methods.soft_rounding import SoftWeight
from difloat.numbers import formats
from difloat.plan.encode import dequantize
from difloat.plan.rules import Draft, Rule, draft_layer

NAMES = ["e2m1", "e3m0", "e1m2", "int4", "e2m3"]


def draft(
    name: str, granularity: str = "channel", *, seed: int = 0, shape: tuple[int, ...] = (8, 24)
) -> Draft:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return draft_layer(weight, [shape[1]], Rule((formats.parse(name),), granularity))


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_on_the_grid_and_enclose_the_weight(name: str) -> None:
    made = draft(name)
    low, high, position = made.grid_neighbours()
    format, scale = made.parts[0].weight.format, made.scales[0][:, None]
    grid = torch.tensor(format.values)
    for side in (low, high):
        distance = ((side / scale)[..., None] - grid).abs().amin(-1)
        assert float(distance.max()) < 1e-5 * format.max
    inside = (made.weight <= grid.max() * scale) & (made.weight >= grid.min() * scale)
    assert bool(((low - 1e-6 <= made.weight) & (made.weight <= high + 1e-6))[inside].all())
    assert float(position.min()) >= 0 and float(position.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale_aware", [False, True])
def test_soft_weights_start_at_the_clipped_float_weight(name: str, scale_aware: bool) -> None:
    made = draft(name)
    limit = made.scales[0][:, None] * torch.tensor(
        [made.parts[0].weight.format.min, made.parts[0].weight.format.max]
    )
    clipped = torch.minimum(torch.maximum(made.weight, limit[:, :1]), limit[:, 1:])
    assert torch.allclose(SoftWeight(made, scale_aware).soft(), clipped, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hard_start_is_rounding_to_nearest(name: str) -> None:
    made = draft(name)
    assert torch.allclose(SoftWeight(made, False).hard(), dequantize(made.plan()), atol=1e-6)


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("pull", [None, (0.01, 7.5), (0.3, 2.0)])
def test_value_and_gradient_are_those_of_the_definition(scale_aware: bool, pull, monkeypatch) -> None:
    monkeypatch.setattr(soft_rounding, "_PIECE", 50)  # 192 weights: three whole pieces and a rest
    made = SoftWeight(draft("e2m1"), scale_aware)
    made.pull = pull
    generator = torch.Generator().manual_seed(3)
    made.variable.data += torch.randn(made.variable.shape, generator=generator) * made.distance * 2
    upstream = torch.randn(made.variable.shape, generator=generator)
    variable = made.variable.detach().clone().requires_grad_()
    unit = torch.where(made.distance > 0, made.distance, 1.0) if scale_aware else 1.0
    share = (torch.sigmoid(variable / unit) * 1.2 - 0.1).clamp(0, 1)
    weight = made.low + made.distance * share
    loss = (weight * upstream).sum()
    if pull is not None:
        loss = loss + pull[0] * (1 - (2 * share - 1).abs() ** pull[1]).sum()
    loss.backward()
    ours = made.soft()
    (ours * upstream).sum().backward()
    torch.testing.assert_close(ours, weight)
    torch.testing.assert_close(made.variable.grad, variable.grad, rtol=1e-4, atol=1e-5)
    assert float((share == 0).sum()) and float((share == 1).sum())  # both clipped sides are among them


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
@pytest.mark.parametrize("scale_aware", [False, True])
def test_learning_lowers_the_output_error_and_ends_on_the_grid(name: str, scale_aware: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(24, 8)
    layer.weight.data = torch.randn(8, 24, generator=generator)
    made = draft_layer(layer.weight, [24], Rule((formats.parse(name),), "tensor"))
    mixing = torch.randn(24, 24, generator=generator) * torch.logspace(0, -1, 24)[:, None]
    x = torch.randn(256, 24, generator=generator) @ mixing  # correlated inputs: nearest is not best
    target = layer(x).detach()
    settings = RoundingSettings(iterations=300, rows=64, scale_aware=scale_aware)
    learned = learn_rounding(layer, {"": made}, ((x,), {}), [target], settings, generator)
    assert learned.error_learned < 0.85 * learned.error_nearest
    values = learned.weights[""]
    made_plan = made.plan(values)
    assert torch.allclose(dequantize(made_plan), values, atol=1e-6)


def test_parts_are_learned_with_their_own_scales() -> None:
    weight = torch.cat([torch.randn(4, 6), 100 * torch.randn(4, 10)], dim=1)
    made = draft_layer(weight, [6, 10], Rule((formats.parse("e2m1"), formats.parse("e3m0"))))
    assert float(made.scales[1]) > 20 * float(made.scales[0])
    low, high, _ = made.grid_neighbours()
    assert low.shape == weight.shape and bool((high >= low).all())


def test_input_search_keeps_the_extremes_of_large_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    made = draft("e2m1", shape=(4, 8))
    x = torch.zeros(1 << 17, 8)
    x[5, 3] = 100.0
    rule = Rule((formats.parse("e4m3"),), clips=(1.0,))
    chosen = plan_inputs(made.plan(), x, rule, generator)
    assert float(chosen.tensors["input_scale"]) * 480 == pytest.approx(100.0)


def test_relative_error() -> None:
    assert relative_error([torch.tensor([3.0])], [torch.tensor([2.0])]) == pytest.approx(0.25)


def test_nothing_but_rounding_gets_a_gradient() -> None:
    block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8), nn.SiLU(), nn.Linear(8, 24))
    rows = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    made = draft_layer(block[1].weight, [24], Rule((formats.parse("e2m1"),), "channel"))
    learned = learn_rounding(
        block,
        {"1": made},
        ((rows,), {}),
        [block(rows).detach()],
        RoundingSettings(iterations=3),
        torch.Generator(),
    )
    assert set(learned.weights) == {"1"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.parameters())

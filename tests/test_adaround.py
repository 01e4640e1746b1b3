"""Learned rounding against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difloat import formats
from difloat.methods.adaround import RoundingSettings, _Soft, learn_rounding, relative_error
from difloat.methods.assign import Draft, Rule, draft_inputs, draft_layer
from difloat.quantizer import dequantize

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
    assert torch.allclose(_Soft(made, scale_aware).soft(), clipped, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hard_start_is_rounding_to_nearest(name: str) -> None:
    made = draft(name)
    assert torch.allclose(_Soft(made, False).hard(), dequantize(made.plan()), atol=1e-6)


def test_gradient_of_soft_rounding_matches_finite_differences() -> None:
    soft = _Soft(draft("e2m1", shape=(2, 3)), False)
    soft.low, soft.high = soft.low.double(), soft.high.double()
    start = soft.variable.detach().double().requires_grad_()

    def value(variable: torch.Tensor) -> torch.Tensor:
        soft.variable = variable
        return soft.soft()

    soft.unit = soft.unit.double()
    assert torch.autograd.gradcheck(value, (start,))


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
    made_plan = Draft(made.weight, made.parts, made.scales, made.zero_points, 0.0, rounded=values).plan()
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
    chosen = draft_inputs(made, x, rule, generator)
    assert float(chosen.input_scales[0]) * 480 == pytest.approx(100.0)


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

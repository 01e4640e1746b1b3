"""Scales on the e4m3 grid and on powers of two: always on the grid, and the best there by squared error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difloat.numbers import formats
from difloat.numbers.formats import parse
from difloat.numbers.scale_grids import shared_scale, snapping
from difloat.numbers.search import CLIPS, search
from difloat.plan.encode import dequantize
from difloat.plan.rules import Rule
from difloat.plan.scales import fake_quantize
from test_contracts import plan_with

E4M3 = torch.tensor(formats.parse("e4m3fn").values, dtype=torch.float64)


def rows(seed: int = 0, count: int = 24, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) * torch.rand(count, 1, generator=generator).exp2()


def on_e4m3(scale: Tensor, shared: float) -> bool:
    return bool(torch.isin(scale.double() / shared, E4M3).all())


@settings(max_examples=60, deadline=None)
@given(st.floats(2**-90, 2**60))
def test_the_shared_scale_is_short_reaches_and_is_not_wasteful(largest: float) -> None:
    shared = shared_scale(largest)
    fraction, _ = math.frexp(shared)
    assert float(fraction * 2**8).is_integer()
    assert largest / 448 <= shared <= largest / 448 * (1 + 2**-7)
    # Products with every e4m3 number are exact in float32, whoever multiplies first.
    products = E4M3 * shared
    assert torch.equal(products.float().double(), products)


def test_search_on_e4m3_scales_finds_the_best_of_all_scales_of_the_grid() -> None:
    data, grid = rows(), parse("e2m1")
    found = search(data, [grid], snap=snapping(data, "e4m3"))
    shared = shared_scale(float(data.abs().max()) / grid.max)
    assert on_e4m3(found.scale, shared)
    allowed = (E4M3[E4M3 > 0] * shared).float()
    errors = torch.stack(
        [(fake_quantize(data, grid, scale) - data).double().square().sum(1) for scale in allowed]
    )
    reach = data.abs().amax(1) / grid.max
    tried = (allowed[:, None] >= 0.2 * reach) & (allowed[:, None] <= 1.2 * reach)
    best = errors.masked_fill(~tried, torch.inf).amin(0)
    torch.testing.assert_close(found.error, best, rtol=1e-9, atol=1e-12)


def test_search_on_powers_of_two() -> None:
    data, grid = rows(1), parse("e2m1")
    found = search(data, [grid], snap=snapping(data, "e8m0"))
    assert torch.equal(torch.frexp(found.scale).mantissa, torch.full_like(found.scale, 0.5))
    for factor in (0.5, 2.0):
        other = (fake_quantize(data, grid, found.scale[:, None] * factor) - data).double().square().sum(1)
        reach = data.abs().amax(1) / grid.max
        tried = (found.scale * factor >= 0.3 * reach) & (found.scale * factor <= reach)
        assert bool((found.error <= other + 1e-9)[tried].all())


def test_a_finer_grid_of_scales_is_never_worse() -> None:
    data = rows(2)
    kinds = ("float32", "e4m3", "e8m0")
    found = [search(data, [parse("e2m1")], snap=snapping(data, kind)) for kind in kinds]
    errors = [float(each.error.sum()) for each in found]
    assert errors[0] <= errors[1] * 1.001 < errors[2]


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_zeros_and_single_values_get_a_legal_scale(kind: str) -> None:
    for data in (torch.zeros(3, 4), torch.tensor([[0.0, 0.0], [1e-30, 0.0], [5.0, -5.0]])):
        found = search(data, [parse("e2m1")], clips=CLIPS, snap=snapping(data, kind))
        assert bool((found.scale > 0).all()) and bool(found.scale.isfinite().all())


def test_a_zero_point_needs_float32_scales() -> None:
    with pytest.raises(ValueError, match="scales must be float32 where there are zero points"):
        Rule((parse("uint4"),), zero_points=(1.0,), scales="e4m3")


@pytest.mark.parametrize(
    ("recipe", "more"), [("rtn", {"keep_8bit": ()}), ("fp4dit", {"before_gelu": "same"})]
)
def test_recipes_make_plans_whose_scales_are_on_the_grid(recipe: str, more: dict) -> None:
    options = {"group_size": 16, "scale_format": "e4m3", **more}
    if recipe == "rtn":
        options["weight_granularity"] = "group"
    plan = plan_with("pixart", recipe, "w4a16", **options)
    for layer in plan.layers.values():
        weight, scale = dequantize(layer), layer.tensors["weight_scale"]
        assert layer.parts[0].weight.group_size == 16 and weight.isfinite().all()
        # Some element of the grid puts the largest scale there, and then all others lie on it too.
        shares = [float(scale.max()) / float(value) for value in E4M3[E4M3 > 0]]
        assert any(on_e4m3(scale, shared) for shared in shares)


def test_rtn_takes_a_format_by_name_and_refuses_another_width() -> None:
    plan = plan_with("pixart", "rtn", "w8a16", weight_format="e4m3fn")
    assert {layer.parts[0].weight.format.name for layer in plan.layers.values()} == {"e4m3fn"}
    with pytest.raises(ValueError, match="weight_format must have the 4 bits asked for, got e4m3fn"):
        plan_with("pixart", "rtn", "w4a16", weight_format="e4m3fn")

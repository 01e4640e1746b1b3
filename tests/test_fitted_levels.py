"""Levels of a table fitted to a layer: what a fit promises, and such tables in plans and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import api, checkpoint
from difloat.methods import fitted_levels
from difloat.methods.fitted_levels import fitted
from difloat.numbers import formats
from difloat.plan.encode import dequantize
from difloat.plan.rules import Rule, draft_layer, levels_or_integers


def asked(bits: int = 4, granularity: str = "channel", size: int | None = None) -> Rule:
    return replace(levels_or_integers(bits, granularity, size), fitted=True)  # type: ignore[arg-type]


def error_of(rule: Rule, weight: Tensor, cost: Tensor) -> float:
    """Of nearest rounding on the scales that a search finds, at a cost per weight."""
    change = dequantize(draft_layer(weight, [weight.shape[1]], rule).plan()) - weight
    return float((cost * change.square()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(24, 40), (16, 12, 3, 3)])
@pytest.mark.parametrize("size", [None, 8])
def test_a_fit_costs_less_than_the_levels_it_starts_from(bits: int, shape: tuple, size: int | None) -> None:
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw) ** 2
    importance = torch.logspace(-2, 2, weight[0].numel())
    rule = asked(bits, "group" if size else "channel", size)
    found = fitted(rule, weight, [shape[1]], importance.diag())
    cost = importance.reshape(weight.shape[1:]).expand_as(weight)
    start = replace(rule, fitted=False)
    assert found.formats[0].bits == bits and len(found.formats[0].levels) == 2**bits and not found.fitted
    assert error_of(found, weight, cost) < 0.95 * error_of(start, weight, cost)
    assert fitted(start, weight, [shape[1]], importance.diag()) is start


def test_levels_that_made_the_weights_are_found_again() -> None:
    made = (-127, -20, 10, 90)
    codes = torch.randint(0, 4, (64, 512), generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(made, dtype=torch.float32)[codes] / 100
    found = fitted(asked(2), weight, [512], torch.eye(512)).formats[0]
    turned = (found.levels, found.mirrored().levels)
    assert min(max(abs(a - b) for a, b in zip(made, one, strict=True)) for one in turned) <= 1


def test_every_level_is_the_mean_of_its_cell_by_cost() -> None:
    draw = torch.Generator().manual_seed(0)
    values, cost = torch.randn(2000, generator=draw) * 50, torch.rand(2000, generator=draw) ** 4
    levels = fitted_levels._lloyd(values, cost, formats.parse("t2g"))
    for _ in range(20):  # once more as often, so that it stands still
        levels = fitted_levels._lloyd(
            values, cost, replace(formats.parse("t2g"), levels=tuple(levels.tolist()))
        )
    nearest = (values[:, None] - levels).abs().argmin(1)
    means = [float((cost * values)[nearest == cell].sum() / cost[nearest == cell].sum()) for cell in range(4)]
    assert levels.tolist() == pytest.approx(means, abs=1e-3)


@pytest.mark.parametrize(
    ("levels", "whole"),
    [
        ((-1.0, -0.5, 0.25, 0.5), (-127, -64, 32, 64)),
        ((-0.001, 0.0, 0.001, 1.0), (0, 1, 2, 127)),
        ((-1.0, 0.998, 0.999, 1.0), (-127, 125, 126, 127)),
    ],
)
def test_levels_become_different_int8_numbers(levels: tuple, whole: tuple) -> None:
    assert fitted_levels._whole(torch.tensor(levels)) == whole


def test_groups_of_a_convolution_have_inputs_of_their_own() -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    moments = torch.stack([torch.eye(27), 5 * torch.eye(27)])
    found = fitted(asked(3), weight, [3], moments)
    cost = torch.tensor([1.0] * 4 + [5.0] * 4).reshape(8, 1, 1, 1).expand_as(weight)
    assert error_of(found, weight, cost) < error_of(replace(asked(3), fitted=False), weight, cost)


def test_fitted_tables_are_saved_loaded_and_proven(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, 24, generator=draw)

    def loop(module: nn.Module) -> None:
        for _ in range(4):
            module(torch.randn(32, 24, generator=draw))

    shared = {"forward_loop": loop, "samples": 64, "progress": False, "factor_power": 0.0, "keep_8bit": ()}
    plan = api.plan(model, "auto", "w3.5a8", grid="fit", **shared)
    named = {
        weights.format.name
        for layer in plan.layers.values()
        for band in layer.bands or ()
        for weights in band.weights
    }
    named |= {part.weight.format.name for layer in plan.layers.values() for part in layer.parts}
    assert any(name.startswith("table(") for name in named)
    api.apply(model, plan)
    difloat.save(model, tmp_path / "saved")
    assert all(finding.passed for finding in checkpoint.verify(tmp_path / "saved"))
    other = nn.Sequential(nn.Linear(24, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))
    loaded = checkpoint.load(tmp_path / "saved", into=other)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))

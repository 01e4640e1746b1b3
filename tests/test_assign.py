"""What a rule asks of inputs: which of them may take unsigned formats with a zero point."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from difloat.plan.rules import Rule, floating_grids, lopsidedness
from difloat.recipes import msfp

COUNT = 100_000
BEHIND = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}


def rule_of(name: str) -> Rule:
    rules = {"msfp": lambda: msfp._input(4, msfp.Options()), "guided": lambda: floating_grids(4, "tensor")}
    return rules[name]()


def normal(count: int = COUNT, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", ["msfp", "guided"])
@pytest.mark.parametrize("outlier", [-1.0, -3.0, -6.0, -10.0])
@pytest.mark.parametrize("activation", BEHIND)
def test_one_outlier_does_not_make_an_input_signed(activation: str, outlier: float, recipe: str) -> None:
    rule, values = rule_of(recipe), BEHIND[activation](normal())
    clean = float(rule.search(values[None]).error.sum())
    values[7] = outlier
    found = rule.search(values[None])
    assert not found.format.signed and lopsidedness(values) >= rule.asymmetry
    # All others lose as little as before; the outlier at most its distance to the smallest value of the grid.
    assert float(found.error.sum()) < 1.1 * clean + (outlier - float(found.zero_point)) ** 2


@pytest.mark.parametrize("outlier", [-30.0, -6.0, 6.0, 30.0, None])
def test_symmetric_inputs_with_an_outlier_lose_nothing_by_the_choice(outlier: float | None) -> None:
    rule, values = rule_of("msfp"), normal()
    if outlier is not None:
        values[7] = outlier
    found = rule.search(values[None])
    signed = Rule(tuple(one for one in rule.formats if one.signed)).search(values[None])
    assert float(found.error.sum()) <= float(signed.error.sum())
    assert outlier is not None or found.format.signed


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (normal(), lambda found: found < 0.2),
        (normal().abs(), lambda found: found == 1),
        (torch.zeros(5), lambda found: found == 1),  # on one side, in a way; every format is exact
        (torch.cat([torch.zeros(COUNT), torch.tensor([-2.0, 2.0])]), lambda found: found == 0),
        (torch.cat([torch.zeros(COUNT), torch.tensor([-1.0, 2.0])]), lambda found: found == 0.5),
        (nn.functional.silu(normal(1 << 20)).reshape(4, -1), lambda found: found > 0.9),
        (nn.functional.silu(normal()).to(torch.bfloat16), lambda found: found > 0.8),
    ],
)
def test_lopsidedness(values: Tensor, expected: Callable[[float], bool]) -> None:
    assert expected(lopsidedness(values))

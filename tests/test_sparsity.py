"""A layer of which little is left says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from difloat import recipes
from difloat.layers.packed import quantizable
from difloat.methods.sparsity import MOSTLY, mostly_zero, rounded_away
from difloat.methods.task import Task
from difloat.numbers.formats import parse
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import MIN_MAX, Bits, Rule, draft_layer
from difloat.report import build
from difloat.report.record import LayerRow, zeros_note
from test_contracts import plan_with, prepared


def drawn(kind: str) -> Tensor:
    torch.manual_seed(0)
    distribution = {"normal": torch.distributions.Normal(0, 1), "laplace": torch.distributions.Laplace(0, 1)}[
        kind
    ]
    return distribution.sample((64, 1024))


def lost(weight: Tensor, rule: Rule) -> float:
    plan: LayerPlan = draft_layer(weight, [weight.shape[1]], rule).plan()
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight
    return mostly_zero(model, {"0": plan}).get("0", 0.0)


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_two_thirds_is_more_than_a_good_scale_loses(kind: str) -> None:
    grid = (parse("e1m0"),)
    assert lost(drawn(kind), Rule(grid, "channel")) == 0.0
    assert lost(drawn(kind), Rule(grid, "group", 128, MIN_MAX)) > 0.75
    assert lost(drawn(kind), Rule((parse("e2m1"),), "group", 128, MIN_MAX)) == 0.0


def test_zeros_of_the_float_weight_do_not_count() -> None:
    sparse = drawn("normal") * (torch.arange(1024) % 10 == 0)  # 90 % zeros
    assert lost(sparse, Rule((parse("e2m1"),), "channel")) == 0.0
    assert rounded_away(0.95, 0.9) == pytest.approx(0.5) and rounded_away(1.0, 1.0) == 0.0


def test_fp4dit_at_two_bits_says_it_in_plan_and_report() -> None:
    float_model, data = prepared("pixart")
    model = copy.deepcopy(float_model)
    for layer in quantizable(model).values():
        layer.weight.data = layer.weight.data**3  # a few large weights in every group
    task = Task(model, data, Bits.parse("w2a4"), progress=False)
    plan = recipes.plan(task, "fp4dit", "w2a4", {"rounding": "nearest"})
    found = plan.measured["mostly_zero"]
    assert found and all(MOSTLY < share <= 1 for share in found.values())
    note = zeros_note(build.build(model, plan, name="tiny").layers)
    assert note.startswith(
        f"Mostly zeros, more than two thirds of the weights rounded to 0: {len(found)} of "
    )
    assert max(found, key=found.__getitem__) in note
    fine = plan_with("pixart", "fp4dit", "w4a4", rounding="nearest")
    assert fine.measured["mostly_zero"] == {}
    assert zeros_note(build.build(float_model, fine, name="tiny").layers) == ""


def test_the_note_names_the_emptiest_first_and_counts_the_others() -> None:
    rows = [
        LayerRow(
            f"l{n}",
            "linear",
            (1, 1),
            "e1m0",
            "channel",
            None,
            "-",
            1,
            -3.0,
            zeros,
            0.0,
            True,
            1,
            2,
            2.0,
        )
        for n, zeros in enumerate([0.1, 0.7, 0.9, 0.8, 0.99, 0.66])
    ]
    assert "4 of 6 layers, l4 (99%), l2 (90%), l3 (80%) and 1 more." in zeros_note(rows)

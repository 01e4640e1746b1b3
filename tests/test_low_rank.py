"""The low-rank branch in closed form against naive float64 computations, and what it promises about its error."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat.layers import install, low_rank_branch
from difloat.methods import layer_rounding, low_rank
from difloat.methods.layer_rounding import Asked, RoundedLayer
from difloat.methods.low_rank import LowRankSettings
from difloat.methods.second_order import SecondOrderSettings, factor
from difloat.methods.task import MixedRows
from difloat.numbers import formats
from difloat.plan import encode
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Rule, asymmetric_integers, draft_layer
from difloat.plan.specs import SIDE

ROUNDING = SecondOrderSettings()
TABLE = Rule((formats.parse("t4g"),), "channel")
ROWS = MixedRows(
    (asymmetric_integers(4, "channel"), asymmetric_integers(2, "channel")), (8, 16), torch.arange(24).flip(0)
)
SHAPES = {"linear": (24, 40), "conv": (24, 5, 3, 3)}


def moments_of(columns: int, seed: int = 0) -> Tensor:
    """Of correlated inputs with channels of very different size, float32 [n, n]."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * columns, columns, generator=draw) + 2 * torch.randn(
        4 * columns, 1, generator=draw
    )
    mixed *= torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=draw)]
    return mixed.mT @ mixed / len(mixed)


def weight_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01


def rounded(
    weight: Tensor, moments: Tensor, asked: Asked, branch: LowRankSettings | None
) -> tuple[RoundedLayer, LayerPlan]:
    rule = asked if isinstance(asked, Rule) else asked.rules[0]
    plan = draft_layer(weight, [weight.shape[1]], rule).plan()
    arguments = weight, plan, asked, moments[None]
    made = layer_rounding.round_layer(*arguments, factor(moments[None], ROUNDING), ROUNDING)
    if branch is not None:
        made = layer_rounding.with_branch(made, *arguments, branch, ROUNDING)
    return made, made.plan


def error_of(change: Tensor, moments: Tensor) -> float:
    rows = change.double().flatten(1)
    return float(((rows @ moments.double()) * rows).sum())


def weight_in(plan: LayerPlan) -> Tensor:
    """What a layer multiplies inputs by, float32 [o, i, *k]."""
    own = encode.stored_values(plan)
    if plan.side is None:
        return own
    return own + low_rank_branch.product(plan.tensors[SIDE[0]], plan.tensors[SIDE[1]])


@pytest.mark.parametrize("damping", [1e-3, 0.1, math.inf])
@pytest.mark.parametrize("kind", SHAPES)
def test_branch_is_the_best_of_its_rank_as_a_naive_computation_finds_it(kind: str, damping: float) -> None:
    weight = weight_of(*SHAPES[kind])
    flat, moments = weight.double().flatten(1), moments_of(weight[0].numel())
    pair = low_rank.branch(weight, moments, LowRankSettings(3, damping))
    damped = torch.eye(len(moments), dtype=torch.float64)
    if math.isfinite(damping):
        damped = moments.double() + damping * moments.double().diagonal().mean() * damped
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ values.sqrt().diag() @ vectors.mT  # any root of the moments gives the same product
    left, sizes, right = torch.linalg.svd(flat @ root)
    best = left[:, :3] @ sizes[:3].diag() @ right[:3] @ torch.linalg.inv(root)
    torch.testing.assert_close(pair.weight(weight.shape).double().flatten(1), best, atol=2e-4, rtol=2e-3)
    assert pair.down.half().float().equal(pair.down) and pair.up.half().float().equal(pair.up)


def test_moments_without_a_branch_are_what_the_best_up_leaves() -> None:
    weight, moments = weight_of(24, 40), moments_of(40)
    pair = low_rank.branch(weight, moments, LowRankSettings(4))
    change = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    # Least squares on vectors that have these moments, by a solver that knows nothing of them.
    vectors = torch.linalg.cholesky(moments.double()).mT  # [n, n], one vector a row
    read = vectors @ pair.down.double().mT
    up = torch.linalg.lstsq(read, vectors @ change.double().mT).solution.mT
    left = error_of(change.double() - up @ pair.down.double(), moments)
    assert error_of(change, low_rank.without(moments, pair)) == pytest.approx(left, rel=1e-3)
    fitted = low_rank.fitted(pair, change, moments)
    torch.testing.assert_close(fitted.up.double(), up, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("damping", [1e-3, 0.1, math.inf])
@pytest.mark.parametrize(
    "asked", [TABLE, asymmetric_integers(2, "channel"), ROWS], ids=["t4g", "uint2", "rows"]
)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_branch_lowers_the_error_and_the_error_said_is_that_of_what_is_stored(
    kind: str, asked: Asked, damping: float
) -> None:
    weight = weight_of(*SHAPES[kind])
    moments = moments_of(weight[0].numel())
    plain, without = rounded(weight, moments, asked, None)
    made, plan = rounded(weight, moments, asked, LowRankSettings(4, damping))
    assert made.rank == 4 and plan.side is not None and without.side is None
    assert made.error < 0.95 * plain.error and made.nearest == plain.nearest
    assert error_of(weight_in(plan) - weight, moments) == pytest.approx(made.error, rel=1e-3)
    assert plan.nbytes - without.nbytes == low_rank.pair_bytes(without, 4)
    again, second = rounded(weight, moments, asked, LowRankSettings(4, damping))
    assert again.error == made.error
    assert all(second.tensors[name].equal(tensor) for name, tensor in plan.tensors.items())


def test_a_layer_computes_what_the_plan_says() -> None:
    layer = nn.Sequential(nn.Linear(40, 24))
    weight, moments = layer[0].weight.detach(), moments_of(40)
    _, plan = rounded(weight, moments, TABLE, LowRankSettings(4))
    install.install(layer, "0", plan)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    wanted = x @ weight_in(plan).mT + layer[0].bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_no_branch_where_it_does_not_lower_the_error_or_cannot_be() -> None:
    weight, moments = weight_of(24, 40), moments_of(40)
    coarse = torch.randint(0, 16, (24, 40), generator=torch.Generator().manual_seed(4)).float()
    coarse[:, 0], coarse[:, 1] = 0, 15  # so that all 16 integers are the grid
    exact, plan = rounded(coarse, moments, asymmetric_integers(4, "channel"), LowRankSettings(4))
    assert exact.rank == 0 and plan.side is None
    _, plan = rounded(weight, moments, TABLE, LowRankSettings(24))
    assert plan.side is None  # as large as the layer
    by_channel = moments_of(5)
    conv = weight_of(24, 5, 3, 3)
    plan = draft_layer(conv, [5], TABLE).plan()
    arguments = conv, plan, TABLE, by_channel[None]
    plain = layer_rounding.round_layer(*arguments, factor(by_channel[None], ROUNDING), ROUNDING)
    assert layer_rounding.with_branch(plain, *arguments, LowRankSettings(2), ROUNDING) is plain


@pytest.mark.parametrize("rank", [24, 30])
def test_a_rank_larger_than_the_layer_is_refused(rank: int) -> None:
    with pytest.raises(
        ValueError, match=rf"rank of a branch must be below both sides .* got {rank}; choose a smaller"
    ):
        low_rank.branch(weight_of(24, 40), moments_of(40), LowRankSettings(rank))


@pytest.mark.parametrize(("rank", "damping"), [(0, 0.1), (4, 0.0), (4, math.nan)])
def test_settings_that_mean_nothing_are_refused(rank: int, damping: float) -> None:
    with pytest.raises(ValueError, match="a branch must have a rank of 1 or more and a positive damping"):
        LowRankSettings(rank, damping)


def test_moments_that_are_not_finite_are_refused() -> None:
    moments = moments_of(40)
    moments[3, 3] = math.nan
    with pytest.raises(ValueError, match="moments must be a finite matrix"):
        low_rank.branch(weight_of(24, 40), moments, replace(LowRankSettings(4), damping=0.01))


def planned(bits: str, **options: object) -> Plan:
    torch.manual_seed(0)
    sizes = (32, 48, 64, 48, 32)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])
    rows = torch.randn(16, 8, 32, generator=torch.Generator().manual_seed(5))

    def sample(module: nn.Module) -> None:
        for row in rows:
            module(row)

    return difloat.plan(model, "auto", bits, forward_loop=sample, progress=False, **options)


def test_branches_of_auto_count_in_its_bytes() -> None:
    same = planned("w4a8", widths="same", grid="integer")  # what the bits asked for mean in bytes
    plain, with_branches = (planned("w4a8", branch=rank, widths="layers") for rank in (0, 2))
    sizes = [sum(layer.nbytes for layer in plan.layers.values()) for plan in (same, with_branches)]
    ranks = {name: layer.side.rank if layer.side else 0 for name, layer in with_branches.layers.items()}
    assert all(layer.side is None for layer in plain.layers.values())
    assert set(ranks.values()) == {0, 2} and 0.9 * sizes[0] <= sizes[1] <= sizes[0]
    report = with_branches.measured["closed_form"]["layers"]
    assert {name: one["branch"] for name, one in report.items()} == ranks
    fixed = {name for name in ranks if name not in with_branches.measured["widths"]["formats"]}
    assert len(fixed) == 2 and not any(ranks[name] for name in fixed)


def test_branches_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="branches must leave the .* choose a smaller rank or more bits"):
        planned("w2a8", branch=8, widths="layers")

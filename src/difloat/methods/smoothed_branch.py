"""A smoothed weight rounded to nearest beside its largest singular triples (SVDQuant, arXiv:2411.05007 Sec. 4.2).

The input of a smoothed layer is multiplied by factors before it is rounded, and the weight divided by them. The branch is that
of the divided weight, but reads the input as it comes, so its first factor takes the factors over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difloat.methods import low_rank
from difloat.methods.task import Smoothing
from difloat.plan.encode import join_variants
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.target import BRANCH_FILES, FILES, Target, fit, restrict

SHARE = 16  # of the shorter side of a weight, above which the rank of its branch must not be
_LEAST_EXPONENT, _LARGEST_EXPONENT = (
    -14,
    14,
)  # of factors that are normal numbers of float16, as are their reciprocals


def powers_of_two(factors: Tensor) -> Tensor:
    """Positive factors rounded to powers of two, within those that float16 holds together with their reciprocals.

    >>> powers_of_two(torch.tensor([0.3, 1.0, 5.0, 1e9]))
    tensor([2.5000e-01, 1.0000e+00, 4.0000e+00, 1.6384e+04])
    """
    return torch.exp2(factors.log2().round().clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT))


def rank_of(shape: tuple[int, ...], most: int) -> int:
    """The rank of the branch of a weight [o, i, *k]: the rank asked for, up to a sixteenth of the weight's shorter side.

    >>> rank_of((256, 64, 3, 3), most=32), rank_of((1152, 1152), most=32), rank_of((8, 64), most=32)
    (16, 32, 0)
    """
    return min(most, min(shape[0], math.prod(shape[1:])) // SHARE)


def shared_factors(
    found: Mapping[str, Smoothing], joined: Mapping[str, Sequence[str]]
) -> dict[str, Smoothing]:
    """Factors by layer, the same for layers that are joined: those of one weight that holds all their rows.

    Args:
        found: The factors of every layer, of which joined ones read the same input.
        joined: The layers that are joined, by any name.
    """
    shared = dict(found)
    for names in joined.values():
        together = [found[name] for name in names if name in found]
        if together:
            most = torch.stack([one.factors for one in together]).amax(0)
            shared |= {name: replace(found[name], factors=most) for name in names if name in found}
    return shared


def shared_pairs(
    weights: Mapping[str, Tensor], plans: Mapping[str, LayerPlan], most: int, target: Target
) -> dict[str, low_rank.Pair]:
    """The branches of layers that are joined: one for all their rows, with one first factor.

    Args:
        weights: The float weights [o, i] by name, which share their input.
        plans: The layers with the same factors, or none.
        most: The rank of the branch, where `rank_of` allows it for the smallest of them.
        target: As for `nearest_beside_branch`.
    """
    rank = min(rank_of(plans[name].shape, most) for name in weights)
    if not rank:
        return {}
    rows = torch.cat([weight.float() for weight in weights.values()])
    pair = _pair(rows, _by_column(rows, plans[next(iter(weights))]), rank, target)
    ups = pair.up.split([len(weight) for weight in weights.values()])
    return {name: replace(pair, up=up) for name, up in zip(weights, ups, strict=True)}


def _by_column(weight: Tensor, plan: LayerPlan) -> Tensor:
    """The factors of the columns of a weight, [1, i, *k]."""
    ones = torch.ones(weight[:1].shape, device=weight.device)
    if not plan.smoothed:
        return ones
    return ones * plan.tensors["input_factor"].to(weight.device).reshape(1, -1, *[1] * (weight.dim() - 2))


def _pair(weight: Tensor, by_column: Tensor, rank: int, target: Target) -> low_rank.Pair:
    pair = low_rank.singular_pair(weight, by_column.flatten(), rank)
    return low_rank.in_bfloat16(pair) if target in BRANCH_FILES else pair


def nearest_beside_branch(
    weight: Tensor,
    plan: LayerPlan,
    rule: Rule,
    most: int,
    target: Target = "any",
    pair: low_rank.Pair | None = None,
) -> LayerPlan:
    """A layer whose weight is rounded to nearest beside a branch of the smoothed weight.

    Args:
        weight: The float weight [o, i, *k].
        plan: The layer with its inputs, and with its factors where it is smoothed.
        rule: What is asked of what the branch leaves of the weight.
        most: The rank of the branch, where `rank_of` allows it.
        target: The machine or the kind of file whose formats are taken.
        pair: The branch, or None for the weight's own.
    """
    factors = plan.tensors["input_factor"].to(weight.device) if plan.smoothed else None  # [i]
    rank, rest = rank_of(plan.shape, most), weight.float()
    by_column = _by_column(weight, plan)
    if pair is None and rank:
        pair = _pair(rest, by_column, rank, target)
    if pair is not None:
        rest = rest - pair.weight(plan.shape)
    splits = [part.channels for part in plan.parts]
    asked = restrict(rule, target)
    if target in FILES:
        held = fit(rule, False, weight.dim() == 2, weight.shape[1], target)
        assert not isinstance(held, str)  # such layers stay float
        asked = held
    made = draft_layer(rest / by_column, splits, asked).plan()
    if factors is not None:
        made = join_variants([made], (), factors)
    parts = tuple(
        replace(new, activation=old.activation) for new, old in zip(made.parts, plan.parts, strict=True)
    )
    stored = {name: tensor for name, tensor in plan.tensors.items() if name.startswith("input_")}
    made = replace(made, parts=parts, tensors={**made.tensors, **stored})
    return made if pair is None else low_rank.with_branch(made, pair)

"""One layer's weight rounded under the moments of its input, in bands of rows where asked, with a branch where it helps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from difloat.methods import low_rank
from difloat.methods.fitted_levels import fitted
from difloat.methods.low_rank import LowRankSettings
from difloat.methods.second_order import Factor, SecondOrderSettings, factor, round_together
from difloat.methods.task import MixedRows
from difloat.plan.encode import join_rows, stored_values
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft, Rule, draft_layer
from difloat.plan.target import Target, restrict

Asked = Rule | MixedRows
"""What is asked of a weight: one rule for all of its rows, or one for every band of them."""


@dataclass(frozen=True)
class RoundedLayer:
    """A layer's weight on its grid.

    Attributes:
        plan: The layer without its inputs.
        error: ``e H e^T`` summed over the rows of the weight's error.
        nearest: The same for nearest rounding on the scales that were found for the weight alone.
        rank: The rank of the branch, or 0 without one.
    """

    plan: LayerPlan = field(repr=False)
    error: float
    nearest: float
    rank: int = 0


def round_layer(
    weight: Tensor,
    plan: LayerPlan,
    asked: Asked,
    moments: Tensor,
    known: Factor,
    settings: SecondOrderSettings,
    target: Target = "any",
) -> RoundedLayer:
    """Second-order rounding of a layer's weight.

    Args:
        weight: Float [o, i, *k], for the input as it is multiplied.
        plan: The layer, of which the cuts along the input channels count.
        asked: What is asked of the weight, or of bands of its rows.
        moments: The mean of ``x x^T``, [groups, n, n].
        known: Their factorisation.
        settings: How the weight is rounded.
        target: The machine whose formats are taken.
    """
    drafts = _drafts(weight, [part.channels for part in plan.parts], asked, moments, target)
    bands = round_together(drafts, moments, settings, known)
    order = asked.order if isinstance(asked, MixedRows) else torch.arange(plan.shape[0])
    made = join_rows([band.plan() for band in bands], order)
    error = sum(float(band.row_error.sum()) for band in bands)
    return RoundedLayer(made, error, sum(float(band.nearest_error.sum()) for band in bands))


def with_branch(
    plain: RoundedLayer,
    weight: Tensor,
    plan: LayerPlan,
    asked: Asked,
    moments: Tensor,
    branch: LowRankSettings,
    settings: SecondOrderSettings,
    target: Target = "any",
) -> RoundedLayer:
    """The layer with a branch beside its weight, or `plain` where a branch does not lessen the error.

    The rest of the weight is rounded under what is left of the moments beside the branch, since the fit of `up` that follows
    repairs all other errors. A layer that `low_rank.fits` excludes stays plain.

    Args:
        plain: The result of `round_layer` for the same arguments.
        weight: The float weight [o, i, *k].
        plan: The layer, of which the cuts along the input channels count.
        asked: What is asked of the weight, or of bands of its rows.
        moments: The mean of ``x x^T``, [groups, n, n].
        branch: Rank and damping of the branch.
        settings: How the weight is rounded.
        target: The machine whose formats are taken.
    """
    stacked = moments if moments.dim() == 3 else moments[None]
    if not low_rank.fits(plan, branch.rank, len(stacked), stacked.shape[1]):
        return plain
    (own,) = stacked  # [n, n]
    pair = low_rank.branch(weight, own, branch)
    # Damped, since few vectors say nothing of most directions, and errors there must not count as repaired.
    damped = own + settings.damping * own.diagonal().mean() * torch.eye(len(own)).to(own)
    left = low_rank.without(damped, pair)[None]
    rest = weight.float() - pair.weight(tuple(weight.shape))
    rounded = round_layer(rest, plan, asked, left, factor(left, settings), settings, target)
    change = weight.float() - stored_values(rounded.plan)
    pair = low_rank.fitted(pair, change, damped)
    error = float(low_rank.row_error(change - pair.weight(tuple(weight.shape)), own).sum())
    if not error < plain.error:
        return plain
    return replace(plain, plan=low_rank.with_branch(rounded.plan, pair), error=error, rank=branch.rank)


def _drafts(weight: Tensor, splits: list[int], asked: Asked, moments: Tensor, target: Target) -> list[Draft]:
    """Drafts of the rows that are asked for the same, in the order of `MixedRows`."""

    def draft(rows: Tensor, rule: Rule) -> Draft:
        return draft_layer(rows, splits, fitted(restrict(rule, target), rows, splits, moments))

    if isinstance(asked, Rule):
        return [draft(weight, asked)]
    pieces = zip(asked.order.split(list(asked.counts)), asked.rules, strict=True)
    return [draft(weight[rows.to(weight.device)], rule) for rows, rule in pieces]

"""The levels of a table fitted to one layer: Lloyd's iteration, weighted by what an error costs at the layer's output.

The error of a weight that reads input j costs ``H_jj`` times its square, as far as inputs are independent. H is the mean of
``x x^T`` (`methods.moments`). Levels are fitted to weights divided by their scales, so a weight counts ``H_jj scale^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difloat.numbers import formats, rounding
from difloat.numbers.formats import Format
from difloat.plan.rules import Draft, Rule, draft_layer
from difloat.plan.scales import expand_scale

_ROUNDS = 3  # of a search for scales and a fit of levels
_ITERATIONS = 20  # of a fit
_LARGEST = 127
_SAMPLE = 1 << 20  # weights that levels are fitted to


def fitted(rule: Rule, weight: Tensor, splits: Sequence[int], moments: Tensor) -> Rule:
    """The rule with the levels of its table fitted to a weight, if it asks for that, and else the rule itself.

    The levels that the rule has are where the fit starts, and they stay if no fit has less error.

    Args:
        rule: What is asked, with one format.
        weight: Float [o, i, *k].
        splits: Channels of every part, which share the levels.
        moments: The mean of ``x x^T`` of the layer's inputs, as `second_order.round_second_order` takes it.
    """
    if not rule.fitted or not rule.formats[0].is_table:
        return rule
    cost = _cost(weight, moments)
    best = least = None
    format = rule.formats[0]
    for _ in range(_ROUNDS + 1):
        plain = replace(rule, formats=(format,), fitted=False)
        values, factor = _scaled(draft_layer(weight, splits, plain))
        change = (rounding.round_to(values, format) - values) * factor
        error = float((cost * change.square()).sum(dtype=torch.float64))
        if least is None or error < least:
            best, least = plain, error
        levels = _lloyd(values, cost * factor.square(), format)
        format = formats.table(_whole(levels))
        if format.min >= 0 or format.max <= 0:
            break  # a table lies on both sides of zero
    assert best is not None
    return best


def _cost(weight: Tensor, moments: Tensor) -> Tensor:
    """What a squared error of every weight costs, float32 in the shape of the weight."""
    stacked = moments if moments.dim() == 3 else moments[None]
    diagonal = stacked.diagonal(dim1=1, dim2=2)  # [g, n]
    taps = weight[0, 0].numel()
    if diagonal.shape[1] == weight.shape[1]:
        diagonal = diagonal.repeat_interleave(taps, 1)
    rows = diagonal.repeat_interleave(len(weight) // len(diagonal), 0)  # [o, i * taps]
    return rows.reshape(weight.shape).float().to(weight.device)


def _scaled(draft: Draft) -> tuple[Tensor, Tensor]:
    """A weight divided by its scales, and the scales, in its shape."""
    pieces = draft.weight.float().split([part.channels for part in draft.parts], dim=1)
    factors = [
        expand_scale(scale, part.weight, piece.shape).expand_as(piece)
        for piece, part, scale in zip(pieces, draft.parts, draft.scales, strict=True)
    ]
    factor = torch.cat(factors, 1)
    return draft.weight.float() / factor, factor


def _lloyd(values: Tensor, cost: Tensor, format: Format) -> Tensor:
    """The levels of a table after Lloyd's iteration on values at a cost each, float64 in ascending order."""
    step = -(-values.numel() // _SAMPLE)
    values, cost = values.flatten()[::step].double(), cost.flatten()[::step].double()
    levels = torch.tensor(format.levels, dtype=torch.float64, device=values.device)
    for _ in range(_ITERATIONS):
        cells = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        total = torch.bincount(cells, cost, len(levels))
        moment = torch.bincount(cells, cost * values, len(levels))
        levels = torch.where(total > 0, moment / total.clamp_min(1e-300), levels).sort().values
    return levels


def _whole(levels: Tensor) -> tuple[int, ...]:
    """Levels as different int8 numbers, the largest of them as large as int8 holds."""
    whole = (levels * (_LARGEST / levels.abs().max().clamp_min(1e-300))).round().int().tolist()
    for at in range(1, len(whole)):
        whole[at] = max(whole[at], whole[at - 1] + 1)
    whole[-1] = min(whole[-1], _LARGEST)
    for at in range(len(whole) - 2, -1, -1):
        whole[at] = min(whole[at], whole[at + 1] - 1)
    return tuple(whole)

"""Layers of which little is left, because most of their weights were rounded to zero.

Few bits round many weights to zero, and may do so rightly. With the three values of a signed 2-bit grid, the scale of the
lowest squared error rounds 46 % of normally distributed weights to zero and 63 % of Laplace-distributed ones; e2m1 about 10 %.
A scale taken from the largest magnitude (FP4DiT at 2 bits, groups of 128) rounds 80 % and more: the grid reaches for the few
largest weights, and the rest is gone. More than two thirds is more than any good scale of a usual weight rounds away.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from difloat.layers import packed
from difloat.plan import encode
from difloat.plan.plan import LayerPlan

MOSTLY = 2 / 3  # of a layer's weights rounded to 0 is worth a word


def rounded_away(zeros: float, zeros_before: float) -> float:
    """The share of the weights other than 0 that became 0, from the shares of zeros after and before.

    >>> rounded_away(zeros=0.75, zeros_before=0.5)
    0.5
    """
    return (zeros - zeros_before) / (1 - zeros_before) if zeros_before < 1 else 0.0


def mostly_zero(model: nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, float]:
    """The layers that lost more than `MOSTLY` of their weights to zero, and how much each.

    Args:
        model: The float model.
        plans: The plans of its layers. Of several weights by timestep the first counts.
    """
    found = {}
    for name, plan in plans.items():
        after = float((encode.dequantize(plan) == 0).float().mean())
        before = float((packed.weight_of(model, name) == 0).float().mean())
        if (lost := rounded_away(after, before)) > MOSTLY:
            found[name] = lost
    return found

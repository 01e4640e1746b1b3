"""The rounding variable of learned rounding, with its gradient written out.

A weight between its grid neighbours becomes ``low + distance * h(v)`` with the rectified sigmoid h of AdaRound
(arXiv:2004.10568 Eq. 23). A block of a large transformer has tens of millions of such variables, and a step costs more in
passes over them than in matrix products. So the value and the gradient, with that of the regulariser, are one pass each, over
pieces that stay in a core's cache.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from difloat.plan.coded import Coded
from difloat.plan.rules import Draft

_GAMMA, _ZETA = -0.1, 1.1  # ends of the stretched sigmoid, arXiv:2004.10568 Eq. 23
_PIECE = 1 << 16  # values worked on at a time: a quarter MiB of float32 per operand


@final
class SoftWeight:
    """The rounding of one layer on its way from soft to hard.

    Attributes:
        low: The grid value below every weight, [o, i, *k], or the one that a plan has given it.
        distance: The distance from there to the grid value above, or the next one, which is 0 beyond the ends of the grid.
        variable: The learned variable, in units of the weight (arXiv:2503.15465 Eq. 8: v' = s v) or unitless.
        pull: The weight and exponent of the regulariser ``weight * sum(1 - |2h - 1|**exponent)``, which adds to the gradient
            of the next backward pass. None adds nothing.
    """

    def __init__(self, draft: Draft | Coded, scale_aware: bool) -> None:
        """Start at the float weight, so that ``h(variable)`` is its place between its neighbours."""
        self.low, high, position = draft.grid_neighbours()
        self.distance = high - self.low
        self.scale_aware = scale_aware
        # The inverse of the stretched sigmoid: training begins at the float weight itself.
        start = torch.logit((position - _GAMMA) / (_ZETA - _GAMMA))
        self.variable = (start * _unit(self.distance) if scale_aware else start).requires_grad_()
        self.pull: tuple[float, float] | None = None

    def soft(self) -> Tensor:
        """The weight that a step computes with."""
        return _Soften.apply(self.variable, self)

    def hard(self) -> Tensor:
        """The weight on the grid, at the neighbour that h is nearer to."""
        return torch.where(self.variable.detach() >= 0, self.low + self.distance, self.low)

    def share(self, variable: Tensor, distance: Tensor) -> Tensor:
        """The stretched sigmoid before it is clipped to [0, 1]. The arguments are pieces of the attributes."""
        scaled = variable / _unit(distance) if self.scale_aware else variable
        return torch.sigmoid(scaled).mul_(_ZETA - _GAMMA).add_(_GAMMA)


def _unit(distance: Tensor) -> Tensor:
    # A weight beyond the ends of the grid has no neighbours; any unit serves it.
    return torch.where(distance != 0, distance, torch.ones_like(distance))


class _Soften(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, variable: Tensor, owner: SoftWeight) -> Tensor:
        """The soft weight ``low + clip(share, 0, 1) * distance``, piece by piece."""
        ctx.owner = owner
        ctx.save_for_backward(variable)
        result = torch.empty_like(variable)
        for out, v, low, distance in _pieces(result, variable, owner.low, owner.distance):
            torch.addcmul(low, distance, owner.share(v, distance).clamp_(0, 1), out=out)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient to the variable, with that of the pull to 0 or 1 if there is one."""
        owner: SoftWeight = ctx.owner
        (variable,) = ctx.saved_tensors
        result = torch.empty_like(variable)
        for out, v, distance, g in _pieces(result, variable, owner.distance, gradient.contiguous()):
            share = owner.share(v, distance)
            inside = (share >= 0) & (share <= 1)
            # With u the sigmoid, share = u (zeta - gamma) + gamma and its slope is u (1 - u) (zeta - gamma).
            slope = (share - _GAMMA).mul_(_ZETA - share).div_(_ZETA - _GAMMA).mul_(inside)
            torch.mul(g, distance, out=out)
            # d/dh (1 - |2h - 1|^n) = -2 n sign(2h - 1) |2h - 1|^(n - 1)
            if owner.pull is not None:
                weight, exponent = owner.pull
                centred = share.clamp_(0, 1).mul_(2).sub_(1)
                out.addcmul_(centred.sign(), centred.abs().pow_(exponent - 1), value=-2 * weight * exponent)
            out.mul_(slope)
            if owner.scale_aware:
                out.div_(_unit(distance))
        return result, None


def _pieces(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """The same pieces of several contiguous tensors of one shape."""
    return zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True)

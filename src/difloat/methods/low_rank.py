"""A low-rank branch beside a weight, found in closed form from the moments of the layer's input.

With ``C C^T = H + lam mean(diag H) I`` and ``U S V^T`` the first singular triples of ``W C``, the pair ``up = U S`` and
``down = V^T C^-1`` is the matrix of its rank that changes outputs least in place of W (hence "h-svd"). The rest ``W - up down``
is then rounded under moments from which the directions that ``down`` reads are taken out, since errors along them can be
repaired without cost. At the end ``up`` is fitted anew to what rounding left.

The branch reads the input before it is rounded, while moments are of the rounded input (`methods.moments`). Here both count as
equal, so the error of rounding inputs that the branch saves is not part of any choice. Margins write o for output channels, n
for columns of the weight, r for ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from difloat.plan.plan import LayerPlan
from difloat.plan.specs import SIDE, Side

_DTYPE = LayerPlan.dtype_of(SIDE[0])  # in which the factors are stored
_CUTOFF = 1e-6  # of singular values, relative to the largest, that count as zero


@dataclass(frozen=True)
class LowRankSettings:
    """How branches are made.

    Attributes:
        rank: The rank of every branch.
        damping: The lam above. Infinity makes the plain singular value decomposition of the weight.
    """

    rank: int
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.damping > 0:
            raise ValueError(
                f"a branch must have a rank of 1 or more and a positive damping, got {self.rank} and {self.damping:g}; "
                "leave it out for no branch"
            )


def settings_of(rank: int) -> LowRankSettings | None:
    """How branches of this rank are made, or None for rank 0."""
    return LowRankSettings(rank) if rank else None


def side_of(rank: int) -> Side | None:
    """What a layer with one branch of this rank says of it, or None for rank 0."""
    return Side(rank) if rank else None


@dataclass(frozen=True)
class Pair:
    """The factors of a branch, with values that float16 holds.

    Attributes:
        down: float32 [r, n], the first factor.
        up: float32 [o, r], the second one.
    """

    down: Tensor = field(repr=False)
    up: Tensor = field(repr=False)

    def weight(self, shape: tuple[int, ...]) -> Tensor:
        """The float32 weight [o, i, *k] of this shape that the pair stands for."""
        return (self.up @ self.down).reshape(shape)


def fits(plan: LayerPlan, rank: int, groups: int, columns: int) -> bool:
    """Whether a layer can have a branch of this rank.

    It must be neither smoothed nor rotated and larger than the rank, and its input must have one matrix of moments, whose
    columns are those of the flattened weight.

    Args:
        plan: The layer.
        rank: The rank of the branch.
        groups: How many matrices the moments of its input are.
        columns: The columns of each of them.
    """
    plain = not (plan.smoothed or plan.schedule or plan.side is not None or plan.rotation is not None)
    inner = math.prod(plan.shape[1:])
    return plain and groups == 1 and columns == inner and rank < min(plan.shape[0], inner)


def pair_bytes(plan: LayerPlan, rank: int) -> int:
    """The bytes that a branch of this rank takes in files, beside the weight of a layer."""
    return rank * (plan.shape[0] + math.prod(plan.shape[1:])) * _DTYPE.itemsize


def branch(weight: Tensor, moments: Tensor | None, settings: LowRankSettings) -> Pair:
    """The branch of a weight.

    >>> weight = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 0.5]))
    >>> torch.allclose(branch(weight, torch.eye(3), LowRankSettings(1)).weight((2, 3)), weight, atol=1e-2)
    True

    Args:
        weight: The float weight [o, i, *k], whose flattened columns are those of the moments.
        moments: The mean of ``x x^T``, [n, n], or None for those of independent inputs with equal variance.
        settings: Rank and damping.

    Raises:
        ValueError: if the rank is not below both sides of the weight, or moments do not fit it or are not finite.
    """
    flat = weight.detach().flatten(1).double()  # [o, n]
    if settings.rank >= min(flat.shape):
        raise ValueError(
            f"rank of a branch must be below both sides of the weight, {list(flat.shape)}, got {settings.rank}; choose a "
            "smaller one"
        )
    root = (
        None if moments is None or math.isinf(settings.damping) else _root(moments, settings.damping)
    )  # [n, n]
    left, values, right = torch.linalg.svd(flat if root is None else flat @ root, full_matrices=False)
    rank = settings.rank
    right = right[:rank]  # [r, n]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return _stored(right, left[:, :rank] * values[:rank])


def singular_pair(weight: Tensor, factors: Tensor, rank: int) -> Pair:
    """The largest singular triples of a weight divided by factors of its columns, as a pair that reads the unchanged input.

    >>> pair = singular_pair(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([8.0, 1.0]), rank=1)
    >>> pair.weight((2, 2))  # the second column of the divided weight [[0.5, 0], [0, 1]] is the larger one
    tensor([[0., 0.],
            [0., 1.]])

    Args:
        weight: The float weight [o, i, *k].
        factors: Positive, [n], one for every column of the flattened weight.
        rank: How many triples are taken, at most as many as there are.
    """
    scale = factors.double()
    left, values, right = torch.linalg.svd(weight.detach().flatten(1).double() / scale, full_matrices=False)
    return _stored(right[:rank] * scale, left[:, :rank] * values[:rank])


def in_bfloat16(pair: Pair) -> Pair:
    """A pair whose numbers bfloat16 holds as well as float16.

    >>> in_bfloat16(Pair(torch.tensor([[1.00390625]]), torch.tensor([[1.5]]))).down
    tensor([[1.]])
    """
    down, up = (factor.bfloat16().to(_DTYPE).float() for factor in (pair.down, pair.up))
    return Pair(down, up)


def without(moments: Tensor, pair: Pair) -> Tensor:
    """Moments [n, n] of what is left of inputs when all that `down` reads of them is known: ``H - H A (A^T H A)^+ A^T H``.

    An error of the weight costs only this much, since the fit of `up` repairs the rest.
    """
    read, inner = _read(moments, pair)  # [n, r], [r, r]
    left = moments.double() - read @ torch.linalg.pinv(inner, rcond=_CUTOFF, hermitian=True) @ read.mT
    left = (left + left.mT) / 2
    left.diagonal().clamp_(min=0)  # sums of rounded numbers may come out a little below zero
    return left.to(moments.dtype)


def fitted(pair: Pair, change: Tensor, moments: Tensor) -> Pair:
    """The pair with the `up` that stands best for a weight, ``(W - Q) H A (A^T H A)^+``.

    Args:
        pair: The factors, of which `down` stays.
        change: What the branch is to stand for, [o, i, *k], which is the weight without what is rounded of it.
        moments: The mean of ``x x^T``, [n, n].
    """
    read, inner = _read(moments, pair)
    up = change.flatten(1).double() @ read @ torch.linalg.pinv(inner, rcond=_CUTOFF, hermitian=True)
    return replace(pair, up=up.to(_DTYPE).float())


def row_error(change: Tensor, moments: Tensor) -> Tensor:
    """``e H e^T`` of every row of an error [o, i, *k] of the weight, [o], in float64."""
    flat = change.flatten(1).double()
    return ((flat @ moments.double()) * flat).sum(1)


def with_branch(layer: LayerPlan, pair: Pair) -> LayerPlan:
    """The layer with a branch beside its weight."""
    rank = len(pair.down)
    stored = {SIDE[0]: pair.down.reshape(rank, *layer.shape[1:]), SIDE[1]: pair.up}
    tensors = {
        name: tensor.to(layer.tensors["weight"].device, _DTYPE).contiguous()
        for name, tensor in stored.items()
    }
    return replace(layer, tensors={**layer.tensors, **tensors}, side=Side(rank))


def _root(moments: Tensor, damping: float) -> Tensor:
    """The lower triangular C [n, n] with ``C C^T = H + lam mean(diag H) I``, in float64."""
    if moments.dim() != 2 or moments.shape[0] != moments.shape[1] or not moments.isfinite().all():
        raise ValueError(
            f"moments must be a finite matrix [n, n], got {list(moments.shape)} or NaN; look for NaN in the inputs"
        )
    damped = moments.double()
    mean = damped.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.cholesky(
        damped + damping * mean * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    )


def _read(moments: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """``H A`` [n, r] and ``A^T H A`` [r, r], where A is `down` transposed, in float64."""
    down = pair.down.double()
    read = moments.double() @ down.mT
    inner = down @ read
    return read, (inner + inner.mT) / 2


def _stored(down: Tensor, up: Tensor) -> Pair:
    """Factors of equal size by rank, so that neither leaves the range of float16, rounded to it."""
    larger, smaller = down.abs().amax(1), up.abs().amax(0)  # [r]
    factor = torch.where((larger > 0) & (smaller > 0), (smaller / larger).sqrt(), 1.0)
    down, up = down * factor[:, None], up / factor
    return Pair(down.to(_DTYPE).float(), up.to(_DTYPE).float())

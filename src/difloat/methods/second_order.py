"""Second-order rounding of a weight on any grid: GPTQ (arXiv:2210.17323) in its LDL form, refitted and swept once.

The error of a row is ``e H e^T`` with ``e = q - w`` and H the mean of ``x x^T`` over input vectors. With ``H = U U^T`` and an
upper triangular U it is ``sum_j U_jj^2 (e_j + a_j)^2``, where ``a_j = sum_{i<j} e_i U_ij / U_jj`` holds the errors of the
columns before j. So column after column is rounded to the grid value nearest to ``w_j - a_j``. No inverse is needed, and scales
and zero points are those that the search found.

The better of this and nearest rounding goes on, chosen apart for all rows that share a scale. With its grid values held, scales
and zero points are fitted by least squares under H. Then every weight is moved to its best grid value given all others.

A problem is laid out as [groups, columns, rows]. A column is one step, and rows go together. Groups are those of a convolution.
If moments know channels only, every tap of a convolution makes rows of its own, which share the scales of their output channel.
Margins write g for groups, n for columns, r for rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from difloat.methods import column_steps, quadratic
from difloat.methods.quadratic import Problem, Solution, Unit
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft

_TRIES = 7  # dampings, each ten times the one before
_LEAST_SHARE = 0.2  # of a scale that a fit must leave
_INDEPENDENT = 1e-6  # of scale and zero point: how far their normal equations must be from singular, relative


@dataclass(frozen=True)
class SecondOrderSettings:
    """How a weight is rounded.

    Attributes:
        damping: The share of the mean diagonal of H that is added to its diagonal. Where H is not definite it grows tenfold, up
            to six times.
        by_diagonal: Whether columns go by falling diagonal of H instead of in their own order. Scales stay with their columns.
        refit: Whether to fit scales and zero points, on the grid that they lie on.
        sweep: Whether to move every weight once to its best grid value given the others.
        rounds: How many rounds of fit and sweep there are.
    """

    damping: float = 0.01
    by_diagonal: bool = False
    refit: bool = True
    sweep: bool = True
    rounds: int = 1


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid.

    Attributes:
        draft: The draft with the scales and zero points that belong to the weight.
        weight: float32 [o, i, *k] with values on the grid.
        row_error: ``e H e^T`` of every output channel, [o], under the moments without damping.
        nearest_error: ``e H e^T`` of every output channel for nearest rounding on the scales given.
        damping: The share of the mean diagonal that was needed, which is the largest of all groups.
    """

    draft: Draft
    weight: Tensor = field(repr=False)
    row_error: Tensor = field(repr=False)
    nearest_error: Tensor = field(repr=False)
    damping: float

    def plan(self) -> LayerPlan:
        """The encoded and packed layer, without inputs."""
        return self.draft.plan(self.weight)


@dataclass(frozen=True)
class Factor:
    """The factorised moments by which errors are fed forward, for any weight that reads the input.

    Attributes:
        order: int64 [g, n], the columns in the order in which they are rounded.
        upper: The upper triangular B [g, n, n] with a diagonal of ones, such that ``H = B D B^T`` for the damped H in that
            order.
        damping: The share of the mean diagonal that was needed, which is the largest of all groups.
        share: The error that is left of nearest rounding's when errors are fed forward, if those of columns are independent
            and alike: the sum of D over the trace of the damped H.
    """

    order: Tensor = field(repr=False)
    upper: Tensor = field(repr=False)
    damping: float
    share: float


def factor(moments: Tensor, settings: SecondOrderSettings) -> Factor:
    """Factorise moments [n, n] or [groups, n, n] once for several weights, or rows of one, that read the same input.

    Raises:
        ValueError: if they cannot be factorised even with the largest damping.
    """
    alive = quadratic.alive(moments if moments.dim() == 3 else moments[None])
    groups, count, _ = alive.shape
    order = torch.arange(count, device=alive.device).expand(groups, -1)  # [g, n]
    if settings.by_diagonal:
        order = alive.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        alive = alive.gather(1, order[:, :, None].expand(-1, -1, count))
        alive = alive.gather(2, order[:, None].expand(-1, count, -1))  # [g, n, n] in the new order
    return Factor(order, *_upper(alive, settings.damping))


def round_second_order(
    draft: Draft, moments: Tensor, settings: SecondOrderSettings, known: Factor | None = None
) -> Rounded:
    """Round a weight so that its outputs change least.

    Args:
        draft: Weight, formats, scales and zero points, as `draft_layer` finds them.
        moments: The mean of ``x x^T``, [n, n], or [groups, n, n] of a grouped convolution. Its dtype, float32 or float64, is
            that of the computation. n is ``i * kh * kw`` in the order of the flattened weight, or i. With i all taps of a
            convolution take the same moments and count as independent.
        settings: How the weight is rounded.
        known: The result of `factor` for these moments and settings, or None to make it here.

    Raises:
        ValueError: if moments do not fit a weight, are not finite, or cannot be factorised even with the largest damping.
    """
    return round_together([draft], moments, settings, known)[0]


def round_together(
    drafts: Sequence[Draft], moments: Tensor, settings: SecondOrderSettings, known: Factor | None = None
) -> list[Rounded]:
    """Round weights that read the same input, such as bands of a layer, as `round_second_order` rounds each, in one pass.

    Raises:
        ValueError: as `round_second_order`, and if scales belong to other columns in one weight than in another.
    """
    problem = quadratic.problem_of(drafts, moments)
    steps, shifts = quadratic.scales_of(drafts, problem)
    plain = quadratic.nearest(problem, steps, shifts)
    of_plain = problem.row_error(plain.values(problem))
    known = factor(problem.moments, settings) if known is None else known
    fed = column_steps.feed_forward(problem, steps, shifts, known.order, known.upper)
    if not (settings.rounds and (settings.refit or settings.sweep)):
        best, error = _better(problem, (plain, of_plain), (fed, problem.row_error(fed.values(problem))))
        return _assembled(drafts, problem, best, error, of_plain, known.damping)
    slope = _slope(problem, fed)
    of_fed = (slope * (fed.values(problem) - problem.target)).sum(1)
    best, error = _better(problem, (plain, of_plain), (fed, of_fed))
    if (rows := (error != of_fed).any(0)).any():  # where nearest rounding is better
        slope[..., rows] = _slope(problem, best, rows)
    for number in range(settings.rounds):
        slope = _slope(problem, best) if number else slope
        best, error = _better(problem, (best, error), _polish(problem, best, error, slope, settings))
    return _assembled(drafts, problem, best, error, of_plain, known.damping)


def nearest_row_error(draft: Draft, moments: Tensor, *, independent: bool = False) -> Tensor:
    """``e H e^T`` of every output channel, [o], for nearest rounding of a draft.

    Args:
        draft: Weight, formats, scales and zero points.
        moments: The moments H as `round_second_order` takes them.
        independent: Whether errors of different columns count as independent, so that only the diagonal of H is looked at.
    """
    problem = quadratic.problem_of([draft], moments)
    values = quadratic.nearest(problem, *quadratic.scales_of([draft], problem)).values(problem)
    if independent:
        diagonal = problem.moments.diagonal(dim1=1, dim2=2)  # [g, n]
        error = (values.sub_(problem.target).square_() * diagonal[:, :, None]).sum(1)
    else:
        error = problem.row_error(values)
    return error.reshape(draft.weight.shape[0], -1).sum(1)


def _upper(moments: Tensor, damping: float) -> tuple[Tensor, float, float]:
    """B [g, n, n], damping and share of `Factor` for moments that are damped as needed."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)  # [g]
    shares = torch.full_like(mean, damping)
    for _ in range(_TRIES):
        # Flipped in both axes, the lower triangular factor is the upper one that runs from the first column on.
        damped = moments.flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_((shares * mean)[:, None])
        trace = damped.diagonal(dim1=1, dim2=2).sum()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper = lower.flip(1, 2)
            roots = upper.diagonal(dim1=1, dim2=2).clone()  # [g, n], of D
            left = roots.square().sum() / trace
            return upper.div_(roots[:, None]), float(shares.max()), float(left)
        shares = torch.where(failed > 0, shares * 10, shares)
    raise ValueError(
        f"moments must be positive definite when damped by up to {float(shares.max()) / 10:g} of their mean diagonal, got "
        "others; use more calibration rows"
    )


def _slope(problem: Problem, solution: Solution, rows: Tensor | None = None) -> Tensor:
    """Half of the derivative of the error by every weight, [g, n, r], or by those of some rows."""
    change = solution.values(problem).sub_(problem.target)
    return problem.moments @ (change if rows is None else change[..., rows])


def _polish(
    problem: Problem, start: Solution, error: Tensor, slope: Tensor, settings: SecondOrderSettings
) -> tuple[Solution, Tensor]:
    """A fit and a sweep from a solution with the error of its rows [g, r]. `slope` is overwritten."""
    solution = start
    if settings.refit:
        solution, change = _refit(problem, solution, slope)
        error = error + change
    if settings.sweep:
        solution, change = column_steps.sweep(problem, solution, slope)
        error = error + change
    return solution, error.clamp_min(0)


def _refit(problem: Problem, solution: Solution, slope: Tensor) -> tuple[Solution, Tensor]:
    """Fit scale and zero point by least squares under H, unit after unit, with the levels held.

    The error is a quadratic function of both, so the gain of a fit is known before it is made. A fit that gains nothing, once
    its numbers are rounded to float32, is left out.

    Returns:
        The solution, for which `slope` is brought up to date, and by how much the error of every row changed, [g, r].
    """
    steps, shifts = solution.steps.clone(), solution.shifts.clone()
    changed = torch.zeros_like(problem.owner, dtype=slope.dtype)
    for number, unit in enumerate(problem.units):
        columns = slice(unit.start, unit.stop)
        levels, own = solution.levels[:, columns], problem.moments[:, columns, columns]
        product = own @ levels  # [g, columns of the unit, r]
        ones = own.sum(2)  # H times a column of ones, [g, columns of the unit]
        # The second derivatives by step, by step and shift, by shift, and below the first ones, all halved.
        bent = [
            (levels * product).sum(1),
            (ones[:, None] @ levels).squeeze(1),
            ones.sum(1)[:, None].expand_as(problem.owner),
        ]
        sloped = [(levels * slope[:, columns]).sum(1), slope[:, columns].sum(1)]
        step, shift = _fit(problem, unit, (steps[number], shifts[number]), bent, sloped)
        by_step, by_shift = (
            (after - before.double())[problem.owner].to(slope)  # [g, r]
            for after, before in ((step, steps[number]), (shift, shifts[number]))
        )
        steps[number], shifts[number] = step.to(steps), shift.to(shifts)
        changed += 2 * (by_step * sloped[0] + by_shift * sloped[1]) + (
            by_step.square() * bent[0] + 2 * by_step * by_shift * bent[1] + by_shift.square() * bent[2]
        )
        if len(problem.units) == 1:
            slope.addcmul_(product, by_step[:, None]).addcmul_(ones[:, :, None], by_shift[:, None])
        else:  # so the next unit sees this one's change
            slope += problem.moments[:, :, columns] @ (levels * by_step[:, None] + by_shift[:, None])
    return Solution(solution.levels, steps, shifts), changed


def _fit(
    problem: Problem,
    unit: Unit,
    before: tuple[Tensor, Tensor],
    bent: Sequence[Tensor],
    sloped: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Steps and shifts [owners] of one unit after a fit, float64, with the halved derivatives of every row [g, r]."""
    a11, a12, a22 = map(problem.per_owner, bent)  # [owners] each
    g1, g2 = map(problem.per_owner, sloped)  # [owners] each
    by_step = torch.where(a11 > 0, -g1 / a11.clamp_min(1e-300), 0.0)  # Newton's step is exact
    determinant = a11 * a22 - a12 * a12  # 0 where all levels are equal
    shifted = torch.tensor([grid.shifted for grid in unit.grids], device=a11.device)
    shifted = shifted.repeat_interleave(torch.tensor(problem.owned, device=a11.device))  # [owners]
    solvable, divisor = shifted & (determinant > _INDEPENDENT * a11 * a22), determinant.clamp_min(1e-300)
    by_step = torch.where(solvable, (a12 * g2 - a22 * g1) / divisor, by_step)
    by_shift = torch.where(solvable, (a12 * g1 - a11 * g2) / divisor, 0.0)
    # What is stored lies on a grid, that of float32 or one of few bits, so the gain is that of the rounded numbers.
    wanted = [(was + by).split(problem.owned) for was, by in zip(before, (by_step, by_shift), strict=True)]
    stored = [grid.stored(step, shift) for grid, step, shift in zip(unit.grids, *wanted, strict=True)]
    step, shift = (torch.cat(of).double() for of in zip(*stored, strict=True))
    by_step, by_shift = step - before[0].double(), shift - before[1].double()
    gained = 2 * (by_step * g1 + by_shift * g2) + (
        by_step.square() * a11 + 2 * by_step * by_shift * a12 + by_shift.square() * a22
    )
    # A fit may turn the sign of a scale or shrink it to nothing where levels hardly vary; such a fit is not taken.
    taken = (gained < 0) & (step / before[0] > _LEAST_SHARE)
    return torch.where(taken, step, before[0].double()), torch.where(taken, shift, before[1].double())


def _better(
    problem: Problem, found: tuple[Solution, Tensor], other: tuple[Solution, Tensor]
) -> tuple[Solution, Tensor]:
    """The better of two solutions with the error of their rows [g, r], for every owner of scales, and its error."""
    (best, error), (new, others) = found, other
    better = problem.per_owner(others) < problem.per_owner(error)  # [owners]
    if better.all():
        return other
    rows = better[problem.owner]  # [g, r]
    chosen = Solution(
        torch.where(rows[:, None], new.levels, best.levels),
        torch.where(better, new.steps, best.steps),
        torch.where(better, new.shifts, best.shifts),
    )
    return chosen, torch.where(rows, others, error)


def _assembled(
    drafts: Sequence[Draft], problem: Problem, best: Solution, error: Tensor, nearest: Tensor, damping: float
) -> list[Rounded]:
    stored = Solution(best.levels.float(), best.steps.float(), best.shifts.float())
    pieces = zip(
        drafts,
        stored.values(problem).split(problem.rows, 2),
        stored.steps.split(problem.owned, 1),
        stored.shifts.split(problem.owned, 1),
        error.split(problem.rows, 1),
        nearest.split(problem.rows, 1),
        strict=True,
    )
    return [_rounded(*piece, damping=damping) for piece in pieces]


def _rounded(
    draft: Draft,
    values: Tensor,
    steps: Tensor,
    shifts: Tensor,
    error: Tensor,
    nearest: Tensor,
    *,
    damping: float,
) -> Rounded:
    """One weight out of a solution, of which it has some rows and scales."""
    weight = quadratic.weight_of(values, draft.weight.shape)
    scales, zeros, at = [], [], 0
    for scale in draft.scales:
        count = scale.numel() // steps.shape[1]
        scales.append(steps[at : at + count].T.reshape(-1))
        zeros.append(shifts[at : at + count].T.reshape(-1))
        at += count
    squared = float((weight - draft.weight.detach().to(weight)).square().sum())
    by_row, at_nearest = (of.reshape(len(weight), -1).sum(1) for of in (error, nearest))
    made = replace(draft, scales=tuple(scales), zero_points=tuple(zeros), error=squared)
    return Rounded(made, weight, by_row, at_nearest, damping)

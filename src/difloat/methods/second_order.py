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

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from difloat.methods import quadratic
from difloat.methods.quadratic import Problem, Solution
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft

_TRIES = 7  # dampings, each ten times the one before
_BLOCK = 32  # columns whose errors are passed on one by one; those of blocks before in one product
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
        ValueError: if moments do not fit the weight, are not finite, or cannot be factorised even with the largest damping.
    """
    problem = quadratic.problem_of(draft, moments)
    steps, shifts = quadratic.scales_of(draft, problem)
    plain = quadratic.nearest(problem, steps, shifts)
    known = factor(problem.moments, settings) if known is None else known
    fed = _feed_forward(problem, steps, shifts, known)
    of_plain = problem.row_error(plain.values(problem))
    best, error = _better(problem, (plain, of_plain), fed)
    for _ in range(settings.rounds if settings.refit or settings.sweep else 0):
        best, error = _better(problem, (best, error), _polish(problem, best, settings))
    return _assembled(draft, problem, best, error, of_plain, known.damping)


def nearest_row_error(draft: Draft, moments: Tensor) -> Tensor:
    """``e H e^T`` of every output channel, [o], for nearest rounding of a draft under moments as `round_second_order` takes."""
    problem = quadratic.problem_of(draft, moments)
    error = problem.row_error(
        quadratic.nearest(problem, *quadratic.scales_of(draft, problem)).values(problem)
    )
    return error.reshape(draft.weight.shape[0], -1).sum(1)


def _upper(moments: Tensor, damping: float) -> tuple[Tensor, float, float]:
    """B [g, n, n], damping and share of `Factor` for moments that are damped as needed."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)  # [g]
    shares = torch.full_like(mean, damping)
    for _ in range(_TRIES):
        damped = moments + torch.diag_embed((shares * mean)[:, None].expand(-1, moments.shape[1]))
        # Flipped in both axes, the lower triangular factor is the upper one that runs from the first column on.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            roots = upper.diagonal(dim1=1, dim2=2)  # [g, n], of D
            left = roots.square().sum() / damped.diagonal(dim1=1, dim2=2).sum()
            return upper / roots[:, None], float(shares.max()), float(left)
        shares = torch.where(failed > 0, shares * 10, shares)
    raise ValueError(
        f"moments must be positive definite when damped by up to {float(shares.max()) / 10:g} of their mean diagonal, got "
        "others; use more calibration rows"
    )


def _feed_forward(problem: Problem, steps: Tensor, shifts: Tensor, known: Factor) -> Solution:
    """The solution by rounding column after column, with the errors of the columns before fed forward.

    Groups that are ordered apart have one part only, hence one format.
    """
    count, order, upper = problem.target.shape[1], known.order, known.upper
    rows = order[:, :, None].expand_as(problem.target)  # [g, n, r]
    target, units = problem.target.gather(1, rows), quadratic.unit_of(problem)[order]  # [g, n]
    rounders = _rounders(problem)
    formats = [rounders[number] for number in units[0].tolist()]
    levels, errors = torch.empty_like(target), torch.zeros_like(target)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        # The errors of all blocks before reach this block in one matrix product, [g, columns of the block, r].
        wanted = target[:, start:stop] - upper[:, :start, start:stop].mT @ errors[:, :start]
        for column in range(start, stop):
            at, unit = column - start, units[:, column, None]
            step, shift = steps[unit, problem.owner], shifts[unit, problem.owner]  # [g, r]
            levels[:, column] = formats[column]((wanted[:, at] - shift) / step)
            error = levels[:, column] * step + shift - target[:, column]  # [g, r]
            errors[:, column] = error
            # Within a block every error reaches the columns after it at once.
            wanted[:, at + 1 :] -= upper[:, column, column + 1 : stop, None] * error[:, None]
    return Solution(torch.empty_like(levels).scatter_(1, rows, levels), steps, shifts)


def _polish(problem: Problem, start: Solution, settings: SecondOrderSettings) -> Solution:
    solution = start
    gradient = problem.moments @ (solution.values(problem) - problem.target)  # half of it, [g, n, r]
    if settings.refit:
        solution = _refit(problem, solution, gradient)
    if settings.sweep:
        gradient = problem.moments @ (solution.values(problem) - problem.target)
        solution = _sweep(problem, solution, gradient)
    return solution


def _refit(problem: Problem, solution: Solution, gradient: Tensor) -> Solution:
    """Fit scale and zero point by least squares under H, unit after unit, with the levels held. `gradient` is overwritten.

    The error is a quadratic function of both, so the gain of a fit is known before it is made. A fit that gains nothing, once
    its numbers are rounded to float32, is left out.
    """
    steps, shifts = solution.steps.clone(), solution.shifts.clone()
    for number, unit in enumerate(problem.units):
        columns = slice(unit.start, unit.stop)
        levels, own = solution.levels[:, columns], problem.moments[:, columns, columns]
        product = own @ levels  # [g, columns of the unit, r]
        # The second derivatives by step, by step and shift, by shift, and below the first ones, all halved.
        bent = [(levels * product).sum(1), product.sum(1), own.sum((1, 2))[:, None].expand_as(problem.owner)]
        sloped = [(levels * gradient[:, columns]).sum(1), gradient[:, columns].sum(1)]
        a11, a12, a22 = map(problem.per_owner, bent)  # [owners] each
        g1, g2 = map(problem.per_owner, sloped)  # [owners] each
        by_step = torch.where(a11 > 0, -g1 / a11.clamp_min(1e-300), 0.0)  # Newton's step is exact
        by_shift = torch.zeros_like(by_step)
        if unit.shifted:
            determinant = a11 * a22 - a12 * a12  # 0 where all levels are equal
            solvable, divisor = determinant > _INDEPENDENT * a11 * a22, determinant.clamp_min(1e-300)
            by_step = torch.where(solvable, (a12 * g2 - a22 * g1) / divisor, by_step)
            by_shift = torch.where(solvable, (a12 * g1 - a11 * g2) / divisor, by_shift)
        # What is stored lies on a grid, that of float32 or one of few bits, so the gain is that of the rounded numbers.
        step, shift = unit.stored(steps[number] + by_step, shifts[number] + by_shift)
        by_step, by_shift = step - steps[number].double(), shift - shifts[number].double()
        gained = 2 * (by_step * g1 + by_shift * g2) + (
            by_step.square() * a11 + 2 * by_step * by_shift * a12 + by_shift.square() * a22
        )
        # A fit may turn the sign of a scale or shrink it to nothing where levels hardly vary; such a fit is not taken.
        taken = (gained < 0) & (step / steps[number] > _LEAST_SHARE)
        by_step, by_shift = by_step.where(taken, 0.0), by_shift.where(taken, 0.0)
        steps[number] = torch.where(taken, step.to(steps), steps[number])
        shifts[number] = torch.where(taken, shift.to(shifts), shifts[number])
        change = (levels * by_step[problem.owner][:, None] + by_shift[problem.owner][:, None]).to(levels)
        gradient += problem.moments[:, :, columns] @ change  # so the next unit sees this one's change
    return Solution(solution.levels, steps, shifts)


def _sweep(problem: Problem, solution: Solution, gradient: Tensor) -> Solution:
    """Move every weight to the grid value nearest to its optimum given all others, column after column."""
    levels, values = solution.levels.clone(), solution.values(problem)
    units, count = quadratic.unit_of(problem).tolist(), values.shape[1]
    rounders, moved = _rounders(problem), torch.zeros_like(values)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        inner = problem.moments[:, start:stop, start:stop]
        # What all blocks before moved reaches this one in one product, [g, columns of the block, r].
        slope = gradient[:, start:stop] + problem.moments[:, start:stop, :start] @ moved[:, :start]
        for column in range(start, stop):
            at, unit = column - start, units[column]
            step, shift = solution.steps[unit][problem.owner], solution.shifts[unit][problem.owner]
            # The optimum of one weight alone, by the derivative and the second derivative of the error.
            best = values[:, column] - slope[:, at] / inner[:, at, at, None]
            levels[:, column] = rounders[unit]((best - shift) / step)
            moved[:, column] = levels[:, column] * step + shift - values[:, column]
            slope[:, at + 1 :] += inner[:, at + 1 :, at, None] * moved[:, column, None]
    return replace(solution, levels=levels)


def _rounders(problem: Problem) -> list[Callable[[Tensor], Tensor]]:
    """How the numbers of every unit are rounded."""
    made = {unit.format: quadratic.rounder(unit.format, problem.target) for unit in problem.units}
    return [made[unit.format] for unit in problem.units]


def _better(problem: Problem, found: tuple[Solution, Tensor], other: Solution) -> tuple[Solution, Tensor]:
    """The better of a solution with the error of its rows [g, r] and another, for every owner of scales, and its error."""
    best, error = found
    others = problem.row_error(other.values(problem))  # [g, r]
    better = problem.per_owner(others) < problem.per_owner(error)  # [owners]
    rows = better[problem.owner]  # [g, r]
    chosen = Solution(
        torch.where(rows[:, None], other.levels, best.levels),
        torch.where(better, other.steps, best.steps),
        torch.where(better, other.shifts, best.shifts),
    )
    return chosen, torch.where(rows, others, error)


def _assembled(
    draft: Draft, problem: Problem, best: Solution, error: Tensor, nearest: Tensor, damping: float
) -> Rounded:
    stored = Solution(best.levels.float(), best.steps.float(), best.shifts.float())
    weight = quadratic.weight_of(stored.values(problem), draft.weight.shape)
    scales, zeros, at = [], [], 0
    for scale in draft.scales:
        count = scale.numel() // problem.owners
        scales.append(stored.steps[at : at + count].T.reshape(-1))
        zeros.append(stored.shifts[at : at + count].T.reshape(-1))
        at += count
    squared = float((weight - draft.weight.detach().to(weight)).square().sum())
    out_channels = draft.weight.shape[0]
    by_row, at_nearest = (of.reshape(out_channels, -1).sum(1) for of in (error, nearest))
    made = replace(draft, scales=tuple(scales), zero_points=tuple(zeros), error=squared)
    return Rounded(made, weight, by_row, at_nearest, damping)

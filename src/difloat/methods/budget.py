"""The least total error under a budget of bytes, with one candidate per layer, which is a multiple-choice knapsack.

Its Lagrangian relaxation needs no bisection. On the lower convex hull of a layer's candidates every step to the next larger one
saves error at a falling price, so taking the steps of all layers by price until one does not fit solves it. The rest of the
budget is filled greedily. The relaxation also bounds every solution from below. A search over partial sums that drops all that
the bound excludes then finds the optimum, as long as few enough sums are left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_SUMS = 1 << 14  # partial sums per layer; with more of them the greedy solution stands
_SLACK = 1e-12  # relative: sums in another order must not exclude the solution at hand


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Attributes:
        size: The bytes of the layer.
        error: The error of the layer, which is additive over layers and at least 0.
    """

    size: int
    error: float


@dataclass(frozen=True)
class Allotment:
    """The choice of a candidate for every layer.

    Attributes:
        picks: The index of the chosen candidate of every layer.
        size: The bytes of all chosen candidates.
        error: The total error of all chosen candidates.
        bound: An error that no choice within the budget is below.
        optimal: Whether the search was completed, so that no choice within the budget has less error than this one.
    """

    picks: dict[str, int]
    size: int
    error: float
    bound: float
    optimal: bool


@dataclass(frozen=True)
class _Step:
    """The step from one candidate on a hull to the next larger one."""

    layer: int
    to: int
    size: int
    saved: float

    @property
    def price(self) -> float:
        return self.saved / self.size


def allot(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> Allotment:
    """Choose the candidates with the least total error whose bytes are at most the budget.

    >>> small, large = Candidate(size=2, error=1.0), Candidate(size=4, error=0.1)
    >>> allot({"first": [small, large], "second": [small, Candidate(4, 0.5)]}, budget=6).picks
    {'first': 1, 'second': 0}

    The result is the optimum where `Allotment.optimal` says so. Where too many partial sums are left, it is the greedy
    solution, whose error is at most one step between neighbours on a hull above the optimum. Equal inputs give equal results.
    Of equal errors the choice with fewer bytes wins where the search was completed.

    Args:
        candidates: The candidates of every layer, at least one, in any order.
        budget: The most bytes that all choices may take together.

    Raises:
        ValueError: if there is nothing to choose, an error is not finite or negative, or the smallest choice is
            above the budget.
    """
    _check(candidates, budget)
    layers = list(candidates.values())
    hulls = [_hull(layer) for layer in layers]
    picks, price = _by_price(layers, hulls, budget)
    _fill(layers, picks, budget)
    floors = [min(one.error + price * one.size for one in layer) for layer in layers]
    # The Lagrangian dual at the price where the relaxation broke off.
    bound = max(0.0, math.fsum(floors) - price * budget)
    better, complete = _search(layers, floors, price, budget, _error(layers, picks))
    picks = picks if better is None else better
    error = _error(layers, picks)
    return Allotment(
        dict(zip(candidates, picks, strict=True)),
        sum(layer[pick].size for layer, pick in zip(layers, picks, strict=True)),
        error,
        error if complete else min(bound, error),
        complete,
    )


def _check(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> None:
    if not candidates or not all(candidates.values()):
        raise ValueError("every layer must have a candidate, got none; offer at least one format")
    for name, layer in candidates.items():
        for one in layer:
            if not (math.isfinite(one.error) and one.error >= 0 and one.size >= 0):
                raise ValueError(
                    f"candidates of layer {name!r} must have finite errors and sizes of at least 0, got {one}; "
                    "repair its weights or its moments"
                )
    smallest = sum(min(one.size for one in layer) for layer in candidates.values())
    if smallest > budget:
        raise ValueError(
            f"the budget must be at least the {smallest} bytes of the smallest candidates, got {budget}; raise it"
        )


def _error(layers: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> float:
    return math.fsum(layer[pick].error for layer, pick in zip(layers, picks, strict=True))


def _hull(layer: Sequence[Candidate]) -> list[int]:
    """The candidates on the lower convex hull of error over size, from the smallest on, falling in error and price."""
    hull: list[int] = []
    for index in sorted(range(len(layer)), key=lambda n: (layer[n].size, layer[n].error, n)):
        new = layer[index]
        if hull and layer[hull[-1]].error <= new.error:
            continue  # larger and no better
        while len(hull) > 1:
            before, last = layer[hull[-2]], layer[hull[-1]]
            # The last one lies on or above the line from the one before it to the new one.
            if (before.error - last.error) * (new.size - before.size) > (before.error - new.error) * (
                last.size - before.size
            ):
                break
            hull.pop()
        hull.append(index)
    return hull


def _by_price(
    layers: Sequence[Sequence[Candidate]], hulls: Sequence[Sequence[int]], budget: int
) -> tuple[list[int], float]:
    """The relaxation's solution without its broken last step, and the price of a byte there, which is 0 if all steps fit."""
    picks = [hull[0] for hull in hulls]
    free = budget - sum(layer[pick].size for layer, pick in zip(layers, picks, strict=True))
    steps = [
        _Step(number, after, layer[after].size - layer[before].size, layer[before].error - layer[after].error)
        for number, (layer, hull) in enumerate(zip(layers, hulls, strict=True))
        for before, after in zip(hull, hull[1:], strict=False)
    ]
    for step in sorted(steps, key=lambda step: -step.price):
        # The relaxation would take a part of this step; its price is that of a byte.
        if step.size > free:
            return picks, step.price
        picks[step.layer], free = step.to, free - step.size
    return picks, 0.0


def _fill(layers: Sequence[Sequence[Candidate]], picks: list[int], budget: int) -> None:
    """Spend the rest of the budget in place, by the change of one layer that saves most, while one that fits saves anything."""
    free = budget - sum(layer[pick].size for layer, pick in zip(layers, picks, strict=True))
    while True:
        best, saved = None, 0.0
        for number, layer in enumerate(layers):
            now = layer[picks[number]]
            for index, one in enumerate(layer):
                if one.size - now.size <= free and now.error - one.error > saved:
                    best, saved = (number, index), now.error - one.error
        if best is None:
            return
        number, index = best
        free -= layers[number][index].size - layers[number][picks[number]].size
        picks[number] = index


def _search(
    layers: Sequence[Sequence[Candidate]], floors: Sequence[float], price: float, budget: int, known: float
) -> tuple[list[int] | None, bool]:
    """The optimum over all choices that the bound does not exclude, and whether none was left out.

    Partial sums go layer by layer. A sum is dropped if another one is no larger and no worse, or if what it costs at the price
    of a byte, with the least that the layers to come cost at that price, is above the error `known`.
    """
    size, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    limit = known * (1 + _SLACK) + price * budget
    rest, smallest = math.fsum(floors), sum(min(one.size for one in layer) for layer in layers)
    slack = _SLACK * (limit + rest)
    trail: list[tuple[Tensor, Tensor]] = []
    for layer, floor in zip(layers, floors, strict=True):
        rest, smallest = rest - floor, smallest - min(one.size for one in layer)
        sizes = torch.tensor([one.size for one in layer])
        errors = torch.tensor([one.error for one in layer], dtype=torch.float64)
        sums, costs = (size[:, None] + sizes).flatten(), (error[:, None] + errors).flatten()
        # A sum must leave room for the smallest candidates to come, and must not be excluded by the bound.
        kept = (sums + smallest <= budget) & (costs + price * sums.double() + rest <= limit + slack)
        index = kept.nonzero().squeeze(1)
        # Sorted by size and, among equals, by error, a sum is of use only if its error is below all before it.
        index = index[costs[index].argsort(stable=True)]
        index = index[sums[index].argsort(stable=True)]
        if len(index) == 0:
            return None, False  # rounding ate the solution at hand; it stands
        index = index[_falling(costs[index])]
        if len(index) > _MOST_SUMS:
            return None, False
        size, error = sums[index], costs[index]
        trail.append((index // len(layer), index % len(layer)))
    at, picks = len(error) - 1, []  # errors fall with size
    for before, pick in reversed(trail):
        picks.append(int(pick[at]))
        at = int(before[at])
    return picks[::-1], True


def _falling(errors: Tensor) -> Tensor:
    """Whether each entry is below all entries before it, as bool."""
    least = errors.cummin(0).values
    first = torch.ones(1, dtype=torch.bool)
    return torch.cat([first, errors[1:] < least[:-1]])

"""The least total error under a budget of bytes, and of time where asked, with one candidate per layer: a knapsack.

Its Lagrangian relaxation needs no bisection. On the lower convex hull of a layer's candidates every step to the next larger one
saves error at a falling price, so taking the steps of all layers by price until one does not fit solves it. The rest of the
budget is filled greedily. The relaxation also bounds every solution from below. A search over partial sums that drops all that
the bound excludes then finds the optimum, as long as few enough sums are left.

A limit on time has a price of its own, which is added to the errors. It is the lowest at which the choice by price is fast
enough, and is found by bisection, because the time of that choice falls with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_MOST_SUMS = 1 << 14  # partial sums per layer; with more of them the greedy solution stands
_MOST_TIMED_SUMS = 1 << 11  # likewise where sums have times, since each is compared with all others
_BISECTIONS = 60
_SLACK = 1e-12  # relative: sums in another order must not exclude the solution at hand


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Attributes:
        size: The bytes of the layer.
        error: The error of the layer, which is additive over layers and at least 0.
        time: The time that the layer takes, in any unit, at least 0.
    """

    size: int
    error: float
    time: float = 0.0


@dataclass(frozen=True)
class Allotment:
    """The choice of a candidate for every layer.

    Attributes:
        picks: The index of the chosen candidate of every layer.
        size: The bytes of all chosen candidates.
        error: The total error of all chosen candidates.
        bound: An error that no choice within the budget is below.
        optimal: Whether the search was completed, so that no choice within the budget has less error than this one.
        time: The time of all chosen candidates.
    """

    picks: dict[str, int]
    size: int
    error: float
    bound: float
    optimal: bool
    time: float = 0.0


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


def allot(
    candidates: Mapping[str, Sequence[Candidate]], budget: int, most_time: float = math.inf
) -> Allotment:
    """Choose the candidates with the least total error whose bytes, and time, are at most the budget.

    >>> small, large = Candidate(size=2, error=1.0), Candidate(size=4, error=0.1)
    >>> allot({"first": [small, large], "second": [small, Candidate(4, 0.5)]}, budget=6).picks
    {'first': 1, 'second': 0}

    The result is the optimum where `Allotment.optimal` says so. Where too many partial sums are left, it is the greedy
    solution, whose error is at most one step between neighbours on a hull above the optimum. Equal inputs give equal results.
    Of equal errors the choice with fewer bytes wins where the search was completed.

    Args:
        candidates: The candidates of every layer, at least one, in any order.
        budget: The most bytes that all choices may take together.
        most_time: The most time that all choices may take together, in the unit of the candidates.

    Raises:
        ValueError: if there is nothing to choose, an error or time is not finite or negative, the smallest choice is
            above the budget, or no choice within it is fast enough.
    """
    _check(candidates, budget)
    if math.isfinite(most_time):
        free = allot(candidates, budget)
        if free.time <= most_time:
            return free  # a limit that does not bind must not change the choice
    layers = list(candidates.values())
    picks, prices = _relaxed(layers, _Limits(budget, most_time))
    limits = _Limits(budget, most_time, *prices)
    _fill(layers, picks, limits)
    floors = [min(one.error + limits.paid(one.size, one.time) for one in layer) for layer in layers]
    # The Lagrangian dual at the prices where the relaxation broke off.
    bound = max(0.0, math.fsum(floors) - limits.all_paid)
    better, complete = _search(layers, floors, limits, _error(layers, picks))
    picks = picks if better is None else better
    error = _error(layers, picks)
    return Allotment(
        dict(zip(candidates, picks, strict=True)),
        sum(layer[pick].size for layer, pick in zip(layers, picks, strict=True)),
        error,
        error if complete else min(bound, error),
        complete,
        _time(layers, picks),
    )


@dataclass(frozen=True)
class _Limits:
    """The most bytes and time, and the prices of both in units of error."""

    size: int
    time: float
    byte_price: float = 0.0
    time_price: float = 0.0

    def paid(self, size: float, time: float) -> float:
        return self.byte_price * size + self.time_price * time

    @property
    def all_paid(self) -> float:
        # A limit that is not there is infinite and costs nothing.
        return self.byte_price * self.size + (self.time_price * self.time if self.time_price else 0.0)


def _relaxed(layers: Sequence[Sequence[Candidate]], limits: _Limits) -> tuple[list[int], tuple[float, float]]:
    """The choice by price within both limits, and the prices of a byte and of a unit of time.

    Raises:
        ValueError: if no choice within the bytes was found fast enough.
    """

    def at(price: float) -> tuple[list[int], float]:
        dearer = [[replace(one, error=one.error + price * one.time) for one in layer] for layer in layers]
        return _by_price(dearer, [_hull(layer) for layer in dearer], limits.size)

    picks, byte_price = at(0.0)
    if _time(layers, picks) <= limits.time:
        return picks, (byte_price, 0.0)
    by_time = allot(_by_time(dict(enumerate(layers))), limits.size)
    if by_time.error > limits.time:
        raise ValueError(
            f"the time must be at least {by_time.error:.6g}, which the fastest candidates within {limits.size} bytes take, "
            f"got {limits.time:.6g}; raise it or the bytes"
        )
    low, high = 0.0, _error(layers, [0] * len(layers)) / max(limits.time, _SLACK) + _SLACK
    for _ in range(_BISECTIONS):  # until time is so dear that the choice is fast enough
        picks, byte_price = at(high)
        if _time(layers, picks) <= limits.time:
            break
        low, high = high, 4 * high
    else:
        # Prices reach only choices on the hull; one beside it keeps the limits.
        return list(by_time.picks.values()), (byte_price, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found, price = at(middle)
        if _time(layers, found) <= limits.time:
            picks, byte_price, high = found, price, middle
        else:
            low = middle
    return picks, (byte_price, high)


def least_time(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> float:
    """The least time that was found for choices whose bytes are at most the budget.

    >>> least_time({"layer": [Candidate(2, 1.0, time=3.0), Candidate(4, 0.1, time=1.0)]}, budget=3)
    3.0

    Raises:
        ValueError: as `allot`.
    """
    return allot(_by_time(candidates), budget).error


def _by_time(candidates: Mapping[Any, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
    return {str(name): [Candidate(one.size, one.time) for one in layer] for name, layer in candidates.items()}


def _time(layers: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> float:
    return math.fsum(layer[pick].time for layer, pick in zip(layers, picks, strict=True))


def _check(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> None:
    if not candidates or not all(candidates.values()):
        raise ValueError("every layer must have a candidate, got none; offer at least one format")
    for name, layer in candidates.items():
        for one in layer:
            numbers = one.error, one.size, one.time
            if not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError(
                    f"candidates of layer {name!r} must have finite errors, sizes and times of at least 0, got {one}; "
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


def _fill(layers: Sequence[Sequence[Candidate]], picks: list[int], limits: _Limits) -> None:
    """Spend the rest of the budget in place, by the change of one layer that saves most, while one that fits saves anything."""
    free = limits.size - sum(layer[pick].size for layer, pick in zip(layers, picks, strict=True))
    while True:
        spare = limits.time - _time(layers, picks)
        best, saved = None, 0.0
        for number, layer in enumerate(layers):
            now = layer[picks[number]]
            for index, one in enumerate(layer):
                fits = one.size - now.size <= free and one.time - now.time <= spare
                if fits and now.error - one.error > saved:
                    best, saved = (number, index), now.error - one.error
        if best is None:
            return
        number, index = best
        free -= layers[number][index].size - layers[number][picks[number]].size
        picks[number] = index


def _search(
    layers: Sequence[Sequence[Candidate]], floors: Sequence[float], limits: _Limits, known: float
) -> tuple[list[int] | None, bool]:
    """The optimum over all choices that the bound does not exclude, and whether none was left out.

    Partial sums go layer by layer. A sum is dropped if another one is no larger, no slower and no worse, or if what it costs
    at the prices, with the least that the layers to come cost at them, is above the error `known`.
    """
    size, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    time, timed = torch.zeros(1, dtype=torch.float64), math.isfinite(limits.time)
    limit = known * (1 + _SLACK) + limits.all_paid
    rest, smallest = math.fsum(floors), sum(min(one.size for one in layer) for layer in layers)
    quickest = math.fsum(min(one.time for one in layer) for layer in layers)
    slack = _SLACK * (limit + rest)
    trail: list[tuple[Tensor, Tensor]] = []
    for layer, floor in zip(layers, floors, strict=True):
        rest, smallest = rest - floor, smallest - min(one.size for one in layer)
        quickest -= min(one.time for one in layer)
        sizes = torch.tensor([one.size for one in layer])
        errors = torch.tensor([one.error for one in layer], dtype=torch.float64)
        times = torch.tensor([one.time for one in layer], dtype=torch.float64)
        sums, costs = (size[:, None] + sizes).flatten(), (error[:, None] + errors).flatten()
        spent = (time[:, None] + times).flatten()
        paid = limits.byte_price * sums.double() + limits.time_price * spent
        # A sum must leave room for the smallest and fastest candidates to come, and must not be excluded by the bound.
        kept = (sums + smallest <= limits.size) & (costs + paid + rest <= limit + slack)
        # In another order the times of the solution at hand may add up to a little more than its time.
        kept &= spent + quickest <= limits.time * (1 + _SLACK)
        index = kept.nonzero().squeeze(1)
        index = index[costs[index].argsort(stable=True)]
        if len(index) == 0:
            return None, False  # rounding ate the solution at hand; it stands
        if not timed:
            # Sorted by size and, among equals, by error, a sum is of use only if its error is below all before it.
            index = index[sums[index].argsort(stable=True)]
            index = index[_falling(costs[index])]
        elif len(index) <= _MOST_TIMED_SUMS * len(layer):
            index = index[_undominated(sums[index], spent[index])]
        if len(index) > (_MOST_TIMED_SUMS if timed else _MOST_SUMS):
            return None, False
        size, error, time = sums[index], costs[index], spent[index]
        trail.append((index // len(layer), index % len(layer)))
    at, picks = int(error.argmin()), []
    for before, pick in reversed(trail):
        picks.append(int(pick[at]))
        at = int(before[at])
    return picks[::-1], True


def _undominated(sizes: Tensor, times: Tensor) -> Tensor:
    """Whether no earlier entry is as small and as fast, as bool. A chunk of entries is compared with all at a time."""
    kept, place = torch.ones(len(sizes), dtype=torch.bool), torch.arange(len(sizes))
    for chunk in place.split(1024):
        before = place[None, : int(chunk[-1]) + 1] < chunk[:, None]
        no_larger = sizes[None, : before.shape[1]] <= sizes[chunk, None]
        no_slower = times[None, : before.shape[1]] <= times[chunk, None]
        kept[chunk] = ~(before & no_larger & no_slower).any(1)
    return kept


def _falling(errors: Tensor) -> Tensor:
    """Whether each entry is below all entries before it, as bool."""
    least = errors.cummin(0).values
    first = torch.ones(1, dtype=torch.bool)
    return torch.cat([first, errors[1:] < least[:-1]])

"""The knapsack over layers and formats against every choice there is."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from difloat.methods import budget
from difloat.methods.budget import Allotment, Candidate, allot

WIDTHS = (2, 3, 4, 5, 6, 8)


def brute_force(layers: dict[str, list[Candidate]], limit: int) -> float:
    """Least error of all choices within the budget."""
    choices = itertools.product(*layers.values())
    return min(
        math.fsum(one.error for one in choice)
        for choice in choices
        if sum(one.size for one in choice) <= limit
    )


def any_layers(draw: random.Random, count: int) -> dict[str, list[Candidate]]:
    """Layers with candidates in no order, some of them larger and worse than others."""
    return {
        f"layer{n}": [
            Candidate(draw.randint(1, 60), draw.choice([draw.random(), float(draw.randint(0, 4))]))
            for _ in range(draw.randint(1, 5))
        ]
        for n in range(count)
    }


def like_a_model(draw: random.Random, count: int) -> dict[str, list[Candidate]]:
    """Layers of very different size and sensitivity, whose error falls by 6 dB a bit."""
    layers = {}
    for n in range(count):
        weights, sensitivity = draw.choice([64, 256, 1024]) * draw.randint(9, 40), 10 ** draw.uniform(-4, 2)
        layers[f"layer{n}"] = [
            Candidate(weights * width // 8 + 4 * 64, sensitivity * 4.0**-width * draw.uniform(0.8, 1.25))
            for width in WIDTHS
        ]
    return layers


def bytes_of(layers: dict[str, list[Candidate]], found: Allotment) -> int:
    return sum(layers[name][pick].size for name, pick in found.picks.items())


@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    layers = any_layers(draw, draw.randint(1, 6))
    smallest = sum(min(one.size for one in layer) for layer in layers.values())
    largest = sum(max(one.size for one in layer) for layer in layers.values())
    for limit in {smallest, draw.randint(smallest, largest), largest}:
        found = allot(layers, limit)
        assert found.error == pytest.approx(brute_force(layers, limit), rel=1e-12, abs=1e-15)
        assert found.optimal and found.size == bytes_of(layers, found) <= limit


@pytest.mark.parametrize("average", [2.25, 3.0, 4.0, 6.5])
@pytest.mark.parametrize("count", [30, 300])
def test_budget_is_spent_and_not_exceeded(count: int, average: float) -> None:
    layers = like_a_model(random.Random(count), count)
    at_two, at_eight = (sum(layer[n].size for layer in layers.values()) for n in (0, -1))
    limit = int(at_two + (at_eight - at_two) * (average - 2) / 6)
    found = allot(layers, limit)
    assert 0.995 * limit <= found.size == bytes_of(layers, found) <= limit
    assert found.bound <= found.error * (1 + 1e-9)
    even = sum(layer[max(n for n, w in enumerate(WIDTHS) if w <= average)].error for layer in layers.values())
    assert found.error < 0.5 * even


@pytest.mark.parametrize("average", [2.25, 4.0])
def test_without_the_search_the_error_is_within_one_step_of_the_optimum(
    average: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = like_a_model(random.Random(7), 6)
    at_two, at_eight = (sum(layer[n].size for layer in layers.values()) for n in (0, -1))
    limit = int(at_two + (at_eight - at_two) * (average - 2) / 6)
    best = allot(layers, limit)
    assert best.error == pytest.approx(brute_force(layers, limit), rel=1e-12)
    monkeypatch.setattr(budget, "_MOST_SUMS", 0)
    greedy = allot(layers, limit)
    assert not greedy.optimal and greedy.size <= limit
    step = max(a.error - b.error for layer in layers.values() for a, b in itertools.pairwise(layer))
    assert greedy.bound <= best.error * (1 + 1e-12) <= greedy.error * (1 + 2e-12)
    assert greedy.error <= best.error + step


def test_same_input_same_choice_and_equal_layers_take_the_smaller() -> None:
    layers = like_a_model(random.Random(3), 80)
    assert allot(layers, 400_000) == allot(layers, 400_000)
    assert allot({"a": [Candidate(9, 1.0), Candidate(4, 1.0)]}, 100).picks == {"a": 1}


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="at least the 12 bytes of the smallest"):
        allot({"a": [Candidate(5, 1.0)], "b": [Candidate(7, 0.0), Candidate(9, 0.0)]}, 11)
    for error in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="'b' must have finite errors"):
            allot({"a": [Candidate(5, 1.0)], "b": [Candidate(7, error)]}, 100)
    for empty in ({}, {"a": []}):
        with pytest.raises(ValueError, match="must have a candidate"):
            allot(empty, 100)


def timed_layers(draw: random.Random, count: int) -> dict[str, list[Candidate]]:
    """Layers whose candidates have times that go neither with their sizes nor with their errors."""
    return {
        f"layer{n}": [
            Candidate(
                draw.randint(1, 60), draw.random(), draw.choice([draw.random(), float(draw.randint(0, 3))])
            )
            for _ in range(draw.randint(1, 5))
        ]
        for n in range(count)
    }


@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force_under_two_limits(seed: int) -> None:
    draw = random.Random(seed)
    layers = timed_layers(draw, draw.randint(1, 6))
    choices = list(itertools.product(*layers.values()))
    sizes = [sum(one.size for one in choice) for choice in choices]
    times = [math.fsum(one.time for one in choice) for choice in choices]
    errors = [math.fsum(one.error for one in choice) for choice in choices]
    tried = 0
    for _ in range(6):
        limit, most = draw.choice(sizes), draw.choice(times)
        fitting = [
            error
            for error, size, time in zip(errors, sizes, times, strict=True)
            if size <= limit and time <= most
        ]
        if not fitting:
            with pytest.raises(ValueError, match="time must be at least"):
                allot(layers, limit, most)
            continue
        found = allot(layers, limit, most)
        assert found.optimal and found.error == pytest.approx(min(fitting), rel=1e-12)
        assert found.size == bytes_of(layers, found) <= limit and found.time <= most * (1 + 1e-9)
        tried += 1
    assert tried


def test_many_layers_keep_both_limits() -> None:
    draw = random.Random(0)
    layers = {
        name: [Candidate(one.size, one.error, one.size * draw.uniform(0.5, 2.0)) for one in layer]
        for name, layer in like_a_model(draw, 150).items()
    }
    free = allot(layers, 150 * 5000)
    assert free.error == allot(layers, 150 * 5000, free.time).error
    found = allot(layers, 150 * 5000, 0.9 * free.time)
    assert found.size <= 150 * 5000 and found.time <= 0.9 * free.time
    assert free.error <= found.bound <= found.error <= 1.2 * found.bound


def test_times_that_no_choice_meets_are_named() -> None:
    slow = {"layer": [Candidate(4, 1.0, 2.5), Candidate(8, 0.5, 3.0)]}
    with pytest.raises(ValueError, match=r"time must be at least 2.5, which the fastest .* take, got 2"):
        allot(slow, 8, 2.0)

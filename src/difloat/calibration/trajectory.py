"""Trajectories seen from the denoiser's calls alone: which calls are steps of one, and which row comes before which."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import final


@final
class Course:
    """The place of a sampler's calls on its trajectory, where timesteps go in one direction and a batch keeps its order.

    A pass ends where the direction turns or the batch size changes. Calls with the timestep of the call before them belong to
    the same step, as in guidance by two calls, or with a corrector. The first calls of all steps make one trajectory, and the
    second calls another.

    Attributes:
        passes: How many passes there were, of which the current one is the last.
        step: The step of the current call, counted from 0 in every pass.
        repeat: How many calls of this step came before the current one.
    """

    def __init__(self) -> None:
        """Begin before the first call."""
        self.passes, self.step, self.repeat = 0, 0, 0
        self._batch = 0
        self._timestep = 0.0
        self._direction = 0.0

    def advance(self, timestep: float, batch: int) -> None:
        """Take the next call."""
        change = timestep - self._timestep
        turns = change * self._direction < 0
        if not self.passes or batch != self._batch or turns:
            self.passes, self.step, self.repeat = self.passes + 1, 0, 0
            self._direction = 0.0
        elif change == 0:
            self.repeat += 1
        else:
            self.step, self.repeat = self.step + 1, 0
            self._direction = change
        self._timestep, self._batch = timestep, batch


Point = tuple[str, int, int]  # trajectory, guidance part, step


def rows_before(points: Sequence[Point]) -> list[int | None]:
    """Find the row one step earlier on the same trajectory, in the same part, for every row.

    >>> rows_before([("a", 0, 0), ("a", 0, 1), ("b", 0, 5)])
    [0, 0, None]

    A row of the first step stands for itself. It is None where the row before is not there, or the row's trajectory is not
    known ("").
    """
    number_of = _numbers(points)
    return [
        None if not trajectory else number if step == 0 else number_of.get((trajectory, part, step - 1))
        for number, (trajectory, part, step) in enumerate(points)
    ]


def rows_beside(points: Sequence[Point], samples: Sequence[str]) -> list[int | None]:
    """Find the row of the part before its own at the same step of the same trajectory, or None, for every row.

    It is None as well where both have different `samples`, since the second call of a step may be a corrector's.
    """
    number_of = _numbers(points)
    found = [number_of.get((trajectory, part - 1, step)) for trajectory, part, step in points]
    return [
        other if other is not None and samples[other] == sample else None
        for sample, other in zip(samples, found, strict=True)
    ]


def conditional_part(parts: Sequence[int], conditions: Sequence[Hashable]) -> int | None:
    """The part of guidance with a condition, 0 or 1: the one whose rows have more different conditions, or None if neither.

    Most pipelines put the empty condition first, and some of those for classes put it last.

    Args:
        parts: The guidance part of every row.
        conditions: The arguments of every row besides the sample, in a form that can be compared.
    """
    shown = [len({c for part, c in zip(parts, conditions, strict=True) if part == own}) for own in (0, 1)]
    return None if 0 in shown or shown[0] == shown[1] else shown.index(max(shown))


def _numbers(points: Sequence[Point]) -> dict[Point, int]:
    return {point: number for number, point in enumerate(points) if point[0]}

"""The rows of every step of fine-tuning, with the teacher's outputs, and the loss on them.

Rows are those of the calibration, drawn again and again (`Fixed`), or come from trajectories that are drawn while training goes
on (`Ring`). Both are functions of seed and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from difloat import distributed
from difloat.calibration.batch_axis import predict
from difloat.calibration.collect import Calibration
from difloat.calibration.fresh_rows import Drawn
from difloat.calibration.row_store import Shelf
from difloat.methods.task import Task

_TEACHER_ROWS = 16  # of a call


class LossSettings(Protocol):
    """What the loss of a step depends on, see `TrainingSettings`."""

    @property
    def guidance_weight(self) -> float:
        """The weight of the guidance that is lost."""

    @property
    def compare_at(self) -> float:
        """The scale of guidance at which pairs are compared, or 0."""


class RingSettings(Protocol):
    """What a ring of fresh rows depends on, see `TrainingSettings`."""

    @property
    def rows(self) -> int:
        """The rows of a step."""

    @property
    def fresh_rows(self) -> int:
        """The passes that fresh rows stay."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    Attributes:
        timestep: The timestep of all of them.
        picked: The numbers of the rows, of all processes together.
        rank: The number of this process.
        world: How many processes there are, each of which takes every `world`-th row.
        fresh: The set that the numbers are of, or None for the calibration's own rows.
    """

    timestep: float
    picked: list[int]
    rank: int = 0
    world: int = 1
    fresh: Calibration | None = None

    @property
    def rows(self) -> list[int]:
        """The rows of this process."""
        return self.picked[self.rank :: self.world]


def guidance_pairs(data: Calibration) -> list[tuple[int, int]]:
    """Rows without and with condition at the same point of the same trajectory, as far as both were kept."""
    pairs = [(one, two) for two, one in enumerate(data.beside) if one is not None]
    return [(two, one) for one, two in pairs] if data.conditional_part == 0 else pairs


@final
class Rows:
    """A set of rows by timestep, with the teacher's outputs. Every process takes its share of a batch.

    Attributes:
        by_timestep: The numbers of the rows of every timestep.
        targets: The teacher's outputs, float32 [rows, ...].
        pairs: The pairs of guidance among the rows.
    """

    def __init__(self, data: Calibration, targets: Tensor) -> None:
        """Take rows with their targets."""
        self.by_timestep: dict[float, list[int]] = {}
        for row, timestep in enumerate(data.timesteps):
            self.by_timestep.setdefault(timestep, []).append(row)
        self.targets, self.pairs = targets, guidance_pairs(data)

    def loss(self, output: Tensor, batch: Batch, settings: LossSettings) -> Tensor:
        """The mean squared error, plus the lost guidance of the pairs among the rows. A row drawn twice is in one pair.

        The mean over processes is that over all rows, however unevenly they are shared.
        """
        error = output - self.targets[batch.rows]  # [rows, ...]
        share = len(batch.rows) * batch.world / len(batch.picked)
        place = {row: number for number, row in enumerate(batch.picked)}
        pairs = [(place[one], place[two]) for one, two in self.pairs if one in place and two in place]
        if not pairs or not (settings.compare_at or settings.guidance_weight):
            return share * error.square().mean()
        one, two = torch.tensor(pairs, device=error.device).unbind(1)
        compared = error
        if settings.compare_at:  # in one process only, see `train`
            compared = error[one] + settings.compare_at * (error[two] - error[one])
        targets = self.targets[batch.picked]
        each = targets[two] - targets[one]  # [pairs, ...]
        # A row between two others (guidance with three parts) is in two pairs.
        direction = torch.zeros_like(targets).index_add_(0, two, each).index_add_(0, one, -each)
        along = (error * direction[batch.rank :: batch.world]).sum()
        kept = lost_guidance(self._total(along), each.square().sum(), each.numel())
        return share * compared.square().mean() + settings.guidance_weight * kept

    def _total(self, mine: Tensor) -> Tensor:
        """The sum over processes, whose gradient, averaged over them as training does, is that of the sum."""
        return distributed.summed(mine.detach()) + distributed.count() * (mine - mine.detach())


@final
class Fixed:
    """The calibration rows, drawn at random with repeats.

    Attributes:
        rows: The rows.
        grid: Their timesteps, in descending order.
    """

    def __init__(self, task: Task) -> None:
        """Compute the teacher's outputs of all rows."""
        chunks = torch.arange(len(task.calibration)).split(_TEACHER_ROWS)
        with torch.no_grad():
            calls = (task.calibration.batch(chunk.tolist()) for chunk in chunks)  # one at a time
            outputs = [predict(task.model, *call) for call in calls]
        self.rows = Rows(task.calibration, torch.cat(outputs).float())
        self.grid = sorted(self.rows.by_timestep, reverse=True)

    def draw(self, number: int, count: int, seed: int) -> Batch:
        """The batch of a number along the trajectory: rows of one timestep at random, with repeats."""
        timestep = self.grid[number % len(self.grid)]
        rows = torch.tensor(self.rows.by_timestep[timestep])
        picked = rows[torch.randint(len(rows), (count,), generator=_generator(seed, number))]
        return Batch(timestep, picked.tolist(), distributed.number(), distributed.count())


@final
class Ring:
    """Rows of new trajectories, which come in at every pass along the trajectory and leave after some passes.

    Every process draws all of them, since all of a batch's rows count in its loss.

    Attributes:
        rows: The rows of the current pass.
        grid: The timesteps of the calibration rows, in descending order, which are those that are trained.
    """

    rows: Rows

    def __init__(self, task: Task, settings: RingSettings) -> None:
        """Prepare for a task whose calibration can draw `fresh` rows. Nothing is drawn yet."""
        assert task.calibration.fresh is not None
        self.grid = sorted(set(task.calibration.timesteps), reverse=True)
        self._task, self._source, self._stay = task, task.calibration.fresh, settings.fresh_rows
        self._pictures = -(-settings.rows // task.calibration.parts)
        self._held: dict[int, Drawn] = {}
        self._data = task.calibration

    def draw(self, number: int, count: int, seed: int) -> Batch:
        """The batch of a number along the trajectory: rows of one timestep, pairs of guidance together.

        Rows repeat only where there are fewer of them than `count`.

        Raises:
            ValueError: if new rows are not new, or are of other timesteps.
        """
        self._turn_to(number // len(self.grid))
        timestep = self.grid[number % len(self.grid)]
        groups: dict[int, list[int]] = {}
        for row in self.rows.by_timestep[timestep]:
            first = row
            while (beside := self._beside[first]) is not None:
                first = beside
            groups.setdefault(first, []).append(row)
        order = torch.randperm(len(groups), generator=_generator(seed, number)).tolist()
        there = list(groups.values())
        rows = [row for place in order for row in there[place]]
        picked = [rows[place % len(rows)] for place in range(count)]
        return Batch(timestep, picked, distributed.number(), distributed.count(), self._data)

    def _turn_to(self, turn: int) -> None:
        """Draw the trajectories of a pass, and drop those that have stayed long enough."""
        if turn in self._held and max(self._held) == turn:
            return
        stay = range(max(0, turn + 1 - self._stay), turn + 1)
        self._held = {one: self._held.get(one) or self._drawn(one) for one in stay}
        shelf = Shelf(None, self._task.memory_bytes, {})
        for one, drawn in self._held.items():
            shelf.put(f"pass-{one}", drawn.rows, drawn.blobs)
        self._data = Calibration(shelf.rows, shelf, self._task.calibration.device)
        self._beside = self._data.beside
        self.rows = Rows(self._data, torch.cat([drawn.outputs for drawn in self._held.values()]))

    def _drawn(self, turn: int) -> Drawn:
        drawn = self._source.draw(self._pictures, turn)
        if {row.leaves[0] for row in drawn.rows} & self._task.calibration.samples:
            raise ValueError(
                "forward_loop must sample from other noise each time it runs for fresh_rows, got that of the calibration rows; "
                "draw noise from torch's own random state, or say fresh_rows=0"
            )
        missing = set(self.grid) - {row.timestep for row in drawn.rows}
        if missing:
            raise ValueError(
                f"fresh rows must be of the timesteps of the calibration rows, got none of {min(missing):g}; sample along "
                "the same timesteps each time, or say fresh_rows=0"
            )
        return drawn


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def lost_guidance(along: Tensor, power: Tensor, count: int) -> Tensor:
    """The mean square of what the student's guidance direction lacks along the teacher's, over all pairs together.

    The squared error alone is lowest for a student that responds less than it should, since it leaves out what it cannot know
    from few bits. Guidance multiplies the rest by its scale, and all steps lose it alike. So the loss adds up along the
    trajectory, where other errors cancel.

    Args:
        along: The sum over all pairs and values of the error of the direction (conditional minus unconditional output) times
            the teacher's direction.
        power: The sum of the squares of the teacher's direction.
        count: How many values the directions have.

    Returns:
        A scalar, which is the squared slope of the error over the direction, times the direction's mean square.
    """
    return along.square() / (power.clamp_min(1e-12) * count)

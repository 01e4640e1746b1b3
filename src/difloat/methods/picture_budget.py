"""How many calibration rows a recipe takes, so that it costs few full-precision pictures' time on large models.

The unit is the time of one full-precision picture, which is a call of the denoiser for every step and part of guidance. Of a
budget of five pictures two are sampled for calibration, moments are gathered from the rows of one, gradients take the time of
six tenths, and the rest is for rounding, whose time does not depend on the rows.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

from torch import nn
from tqdm import tqdm

from difloat import distributed
from difloat.calibration.collect import Calibration
from difloat.methods.cost import WITH_GRADIENT
from difloat.methods.moments import MomentSettings
from difloat.methods.sensitivity import SensitivitySettings
from difloat.methods.task import Task

SMALL = 100_000_000  # weights, up to which pictures take seconds
_SAMPLED, _MOMENTS, _GRADIENTS = 0.4, 0.2, 0.12  # shares of the budget
_MATRIX_BYTES = 1 << 28  # of moments of a large model at a time
_FEWEST_MOMENT_ROWS, _FEWEST_GRADIENT_ROWS = 16, 4  # below them neither says anything
_MOST_MOMENT_ROWS = 64  # of a large model, since they wait together with all that the model still needs


@dataclass(frozen=True)
class Rows:
    """Calibration rows that a recipe takes.

    Attributes:
        moments: Rows that moments are gathered from.
        gradients: Rows that are differentiated.
        pictures: What both cost, in full-precision pictures.
        sampled: What calibration cost, in full-precision pictures.
        together: Rows that are differentiated at a time, whose activations are kept.
        recompute: Whether only what goes into blocks is kept of them, and each block runs once more.
        matrices: How moments are gathered.
    """

    moments: int
    gradients: int
    pictures: float
    sampled: int
    together: int = SensitivitySettings.rows_per_call
    recompute: bool = False
    matrices: MomentSettings = MomentSettings()

    def sensitivity(self, guidance: float) -> SensitivitySettings:
        """How sensitivities are measured, for a scale of guidance."""
        return SensitivitySettings(self.gradients, self.together, self.recompute, guidance=guidance)

    def sentence(self, budget: float) -> str:
        """One line for people."""
        total = self.sampled + self.pictures
        line = (
            f"calibration {total:.1f} of {budget:g} full-precision pictures: {self.sampled} sampled, moments of "
            f"{self.moments} rows and gradients of {self.gradients} take {self.pictures:.1f}; then weights are rounded"
        )
        return line if total <= budget else line + "; fewer rows would say too little of so few steps"


def is_large(model: nn.Module) -> bool:
    """Whether a picture of the model takes so long that pictures are counted."""
    return sum(weight.numel() for weight in model.parameters()) > SMALL


def sampled(budget: float, samples: int, steps: int) -> tuple[int, int]:
    """Pictures that calibration samples within a budget of pictures, and how many of `samples` rows are kept of them.

    >>> sampled(5, 256, 20)
    (2, 40)
    """
    pictures = max(1, math.floor(_SAMPLED * budget), math.ceil(min(samples, _FEWEST_MOMENT_ROWS) / steps))
    return pictures, min(samples, pictures * steps)


def rows_for(task: Task, budget: float, moments: int, gradients: int) -> Rows:
    """`rows_within` for a task, of which small models have no budget. Of large ones a line says what it is."""
    large = is_large(task.model)
    budget = budget if large else 0.0
    rows = rows_within(budget, task.calibration, moments, gradients)
    # A pair of rows keeps a processor busy, and what waits between two stretches of matrices is small.
    if large:
        rows = replace(rows, together=2, recompute=True, matrices=MomentSettings(memory_bytes=_MATRIX_BYTES))
    if budget and task.progress and distributed.is_main():
        tqdm.write(rows.sentence(budget), file=sys.stderr)
    return rows


def rows_within(budget: float, data: Calibration, moments: int, gradients: int) -> Rows:
    """At most so many rows for moments and gradients, within a budget of pictures; a budget of 0 leaves them as they are.

    What a picture takes is read off the rows, so that a run from a cache takes the same ones.

    Args:
        budget: Full-precision pictures for everything that calls the denoiser.
        data: The rows that there are.
        moments: The most rows for moments.
        gradients: The most rows that are differentiated.
    """
    picture = len(set(data.timesteps)) * max(1, len(data.describe()["parts"]))  # rows
    moments, gradients = min(moments, len(data)), min(gradients, len(data))
    each = WITH_GRADIENT + bool(budget)  # with a budget, blocks run once more
    if budget:
        affordable = math.floor(_MOMENTS * budget * picture)
        moments = min(moments, _MOST_MOMENT_ROWS, max(_FEWEST_MOMENT_ROWS, affordable))
        most = math.floor(_GRADIENTS * budget * picture / each)
        gradients = min(gradients, max(_FEWEST_GRADIENT_ROWS, most - most % 2))  # in pairs
    return Rows(moments, gradients, (moments + each * gradients) / picture, data.pictures)

"""What a recipe costs after calibration, counted in rows that the denoiser computes; every recipe's page says it of itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Protocol

from difloat.calibration.collect import Calibration
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.task import Sequencing
from difloat.methods.training.train import TrainingSettings
from difloat.plan.rules import Bits, Rule
from difloat.plan.specs import Side

ALL_ROWS = sys.maxsize  # of a pass that leaves no calibration row out
# A backward pass multiplies twice where the forward pass does once: by the weights and by the inputs.
WITH_GRADIENT = 3
_LEARNING_PASSES = 4  # over the rows: full precision, quantized, and the blocks' errors before and after


@dataclass(frozen=True)
class Cost:
    """What is asked of the denoiser, and what is stored of an ordinary layer at the widths asked for.

    Attributes:
        weight: Asked of a weight.
        activation: Asked of an input; None leaves inputs as they are.
        keep_8bit: Layers with 8 bits, as `post_training.keeps_8bit` takes them.
        outside: What happens to layers outside of all lists of blocks: "as others", "8bit", or "keep" in high precision.
        variants: Packed weights of a layer.
        smoothed: Whether input channels have stored factors.
        side: Low-rank pairs beside a layer that has no 8 bits.
        passes: Forward passes over calibration rows beside those below: the most rows of each.
        iterations: Updates of learned rounding per block; 0: no rounding is learned.
        rounding_rows: Calibration rows that learned rounding takes, at most.
        epochs: Passes of fine-tuning along the trajectory, an update per timestep each; 0: nothing is trained.
        batch: Rows of an update of fine-tuning.
        beside: Forward passes without gradient per row of such an update.
    """

    weight: Rule
    activation: Rule | None
    keep_8bit: tuple[str, ...] = ()
    outside: str = "as others"
    variants: int = 1
    smoothed: bool = False
    side: Side | None = None
    passes: tuple[int, ...] = ()
    iterations: int = 0
    rounding_rows: int = 0
    epochs: int = 0
    batch: int = 0
    beside: float = 0.0

    def computed(self, rows: int, timesteps: int) -> dict[str, float]:
        """Rows that the denoiser computes after calibration, by stage; a row with gradient counts as three.

        Stored input ranges take a pass over as many rows as `Sequencing` says. Learned rounding takes at most as many rows per
        update as `RoundingSettings` says, and fewer where a block has many positions. The few rows by which a model is looked
        at, and the search over weights, which calls no denoiser, are not among them.

        Args:
            rows: Calibration rows.
            timesteps: Different timesteps of them.
        """
        ranges = self.activation is not None and not self.activation.online
        passes = (*self.passes, *[Sequencing.activation_rows] * ranges)
        learned = min(rows, self.rounding_rows)
        update = WITH_GRADIENT * min(RoundingSettings.rows, learned)
        trained = self.epochs * min(rows, timesteps) * self.batch * (WITH_GRADIENT + self.beside)
        return {
            "search": sum(min(rows, most) for most in passes),
            "learned rounding": self.iterations * update + _LEARNING_PASSES * learned
            if self.iterations
            else 0,
            "fine-tuning": rows + trained if self.epochs else 0,
        }


class LearnsRounding(Protocol):
    """Options of a recipe that can learn rounding."""

    @property
    def rounding(self) -> str:
        """Whether it does: "learned", or "nearest"."""

    @property
    def iterations(self) -> int:
        """Updates per block."""

    @property
    def rounding_rows(self) -> int:
        """Calibration rows, at most."""


def learned(cost: Cost, options: LearnsRounding, bits: Bits) -> Cost:
    """`cost` with learned rounding, which weights of at most 4 bits get if the options say so."""
    if options.rounding != "learned" or bits.weight > 4:
        return cost
    return replace(cost, iterations=options.iterations, rounding_rows=options.rounding_rows)


def trained(cost: Cost, options: TrainingSettings) -> Cost:
    """`cost` with fine-tuning."""
    return replace(cost, epochs=options.epochs, batch=options.rows * options.accumulation)


def remaining(cost: Cost, calibration: Calibration) -> str:
    """One line on what comes after calibration: in seconds and full-precision pictures, as far as calibration measured them."""
    computed = cost.computed(len(calibration), len(set(calibration.timesteps)))
    rows = sum(computed.values())
    parts = [f"{name} {count:,.0f}" for name, count in computed.items() if count]
    counted = (
        f"at most {rows:,.0f} rows of the denoiser ({', '.join(parts) or 'none'}) and the search over weights"
    )
    pace = calibration.pace
    if pace.row_seconds is None:
        return f"to go: {counted}; no call of the denoiser was timed"
    as_pictures = "" if pace.picture_rows is None else f", as {rows / pace.picture_rows:,.1f} pictures take"
    return f"to go: {counted}; roughly {rows * pace.row_seconds:,.0f} s at {pace.row_seconds:.2g} s a row{as_pictures}"

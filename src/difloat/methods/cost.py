"""The cost of a recipe after calibration, counted in rows that the denoiser computes. Every recipe's page states its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from difloat.calibration.collect import Calibration
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.task import Sequencing
from difloat.methods.training.train import TrainingSettings
from difloat.plan.file_offers import LEAST_BITS, MOST_BITS
from difloat.plan.rules import Bits, Rule
from difloat.plan.specs import Side
from difloat.plan.target import BRANCH_FILES, FILES, Target, fit_inputs

ALL_ROWS = sys.maxsize  # of a pass that leaves no calibration row out
# A backward pass multiplies twice where the forward pass does once: by the weights and by the inputs.
WITH_GRADIENT = 3
_LEARNING_PASSES = 4  # over the rows: full precision, quantized, and the blocks' errors before and after


@dataclass(frozen=True)
class Cost:
    """The work of the denoiser, and the storage of an ordinary layer at the widths asked for.

    Attributes:
        weight: The rule for a weight.
        activation: The rule for an input, or None to leave inputs as they are.
        keep_8bit: The layers with 8 bits, as `post_training.keeps_8bit` takes them.
        outside: "as others", "8bit" or "keep" (in high precision) for layers outside of all lists of blocks.
        variants: How many packed weights a layer has.
        smoothed: Whether input channels have stored factors.
        rotated: Whether inputs of linear layers are rotated.
        side: The low-rank pairs beside a layer that has no 8 bits.
        side_share: How many times longer than the rank of `side` the shorter side of a weight must be, where smaller layers
            have smaller ranks, or 0 where all have the same.
        passes: The most rows of each forward pass over calibration rows besides those that the other fields imply.
        iterations: The updates of learned rounding per block, or 0 if no rounding is learned.
        rounding_rows: The most calibration rows that learned rounding takes.
        epochs: The passes of fine-tuning along the trajectory, with an update per timestep, or 0 if nothing is trained.
        batch: The rows of an update of fine-tuning.
        beside: The forward passes without gradient per row of such an update.
        updates: The updates of fine-tuning, or 0 for those of the epochs.
        fresh: Whether fine-tuning draws rows of its own, so that the teacher does not compute the calibration rows.
        for_files: Whether the recipe chooses among the formats of a kind of file, where one is asked for.
        for_branches: Whether the recipe makes what files with branches hold (`target.BRANCH_FILES`), where one is asked for.
    """

    weight: Rule
    activation: Rule | None
    keep_8bit: tuple[str, ...] = ()
    outside: str = "as others"
    variants: int = 1
    smoothed: bool = False
    rotated: bool = False
    side: Side | None = None
    side_share: int = 0
    passes: tuple[int, ...] = ()
    iterations: int = 0
    rounding_rows: int = 0
    epochs: int = 0
    batch: int = 0
    beside: float = 0.0
    updates: int = 0
    fresh: bool = False
    for_files: bool = False
    for_branches: bool = False

    def pairs_of(self, shape: Sequence[int]) -> Side | None:
        """The low-rank pairs beside a weight [o, i, *k] of this shape, or None for none."""
        if self.side is None or not self.side_share:
            return self.side
        rank = min(self.side.rank, min(shape[0], math.prod(shape[1:])) // self.side_share)
        return replace(self.side, rank=rank) if rank else None

    def computed(self, rows: int, timesteps: int) -> dict[str, float]:
        """The rows that the denoiser computes after calibration, by stage. A row with gradient counts as three.

        Stored input ranges take a pass over as many rows as `Sequencing` says. Learned rounding takes at most as many rows per
        update as `RoundingSettings` says, and fewer where a block has many positions. The few rows by which a model is looked
        at, and the search over weights, which calls no denoiser, are not among them.

        Args:
            rows: How many calibration rows there are.
            timesteps: How many different timesteps they have.
        """
        ranges = self.activation is not None and not self.activation.online
        passes = (*self.passes, *[Sequencing.activation_rows] * ranges)
        learned = min(rows, self.rounding_rows)
        update = WITH_GRADIENT * min(RoundingSettings.rows, learned)
        updates = self.updates or self.epochs * min(rows, timesteps)
        trained = updates * self.batch * (WITH_GRADIENT + self.beside)
        return {
            "search": sum(min(rows, most) for most in passes),
            "learned rounding": self.iterations * update + _LEARNING_PASSES * learned
            if self.iterations
            else 0,
            "fine-tuning": (not self.fresh) * rows + trained if self.epochs else 0,
        }


class LearnsRounding(Protocol):
    """Options of a recipe that can learn rounding."""

    @property
    def rounding(self) -> str:
        """Whether rounding is "learned" or "nearest"."""

    @property
    def iterations(self) -> int:
        """The updates per block."""

    @property
    def rounding_rows(self) -> int:
        """The most calibration rows that are taken."""


def learned(cost: Cost, options: LearnsRounding, bits: Bits) -> Cost:
    """A cost with learned rounding added, which weights of at most 4 bits get if the options say so."""
    if options.rounding != "learned" or bits.weight > 4:
        return cost
    return replace(cost, iterations=options.iterations, rounding_rows=options.rounding_rows)


def trained(cost: Cost, options: TrainingSettings) -> Cost:
    """A cost with fine-tuning added."""
    fresh = options.fresh_rows > 0
    asked = replace(cost, epochs=options.epochs, batch=options.rows * options.accumulation, fresh=fresh)
    return replace(asked, updates=options.updates, beside=float(fresh))


def remaining(cost: Cost, calibration: Calibration) -> str:
    """One line about the work after calibration, in seconds and full-precision pictures as far as calibration measured them."""
    computed = cost.computed(len(calibration), len(set(calibration.timesteps)))
    rows = sum(computed.values())
    parts = [f"{name} {count:,.0f}" for name, count in computed.items() if count]
    counted = f"at most {rows:,.0f} rows of the denoiser ({', '.join(parts) or 'none'})"
    weights = "then the work on weights, whose time depends on their number"
    pace = calibration.pace
    if pace.row_seconds is None:
        return f"to go: {counted}, of which no call was timed; {weights}"
    as_pictures = "" if pace.picture_rows is None else f", as {rows / pace.picture_rows:,.1f} pictures take"
    taken = f"roughly {rows * pace.row_seconds:,.0f} s at {pace.row_seconds:.2g} s a row{as_pictures}"
    return f"to go: {counted}, {taken}; {weights}"


def check_files(options: Any, cost_of: Callable[[Any, Bits], Cost], bits: Bits, target: Target) -> Any:
    """`options` themselves, unless files of a kind do not hold what a recipe of that cost makes with them.

    Raises:
        ValueError: says what to take instead.
    """
    if target not in FILES:
        return options
    cost = cost_of(options, bits)
    if target in BRANCH_FILES:
        _check_branches(cost, bits, target)
        return options
    if cost.for_files:
        _check_choice(options, bits, target)
    beside = cost.variants > 1 or cost.smoothed or cost.rotated or cost.side is not None or cost.epochs > 0
    if beside or (cost.passes and target != "openvino" and not cost.for_files):
        raise ValueError(
            f"recipe must make one ordinary weight per layer for {target} files, got one that trains, smooths, rotates or "
            "chooses formats of its own; take auto, rtn, lbfp, fp4dit, qdiffusion or qdit"
        )
    fit_inputs(bits.activation, bits.weight, target)
    return options


def _check_branches(cost: Cost, bits: Bits, target: Target) -> None:
    """Refuse what leaves no branch beside weights of 4 bits."""
    if not cost.for_branches or cost.side is None:
        got = "none" if cost.side is None else "integers and a branch beside them"
        raise ValueError(
            f"recipe must make a weight and a low-rank branch per layer for {target} files, got {got}; take svdquant with a "
            "rank above 0"
        )
    fit_inputs(bits.activation, bits.weight, target)
    if bits.weight > LEAST_BITS:
        raise ValueError(f"bits must be w{LEAST_BITS}a16 for {target} files, got {bits}")


def _check_choice(options: Any, bits: Bits, target: Target) -> None:
    """Refuse what leaves nothing to choose among the formats of a kind of file, or what no such file can follow."""
    if bits.mean < LEAST_BITS or (bits.activation is not None and bits.weight < MOST_BITS):
        usual = f"w{LEAST_BITS}a16 or w5.5a16"
        raise ValueError(
            f"bits must be averages of {LEAST_BITS} to {MOST_BITS} with inputs left as they are for {target} files, such as "
            f"{usual}, got {bits}"
        )
    if getattr(options, "group_size", 0):
        raise ValueError(
            f"group_size must be left to the file for {target} files, got {options.group_size}; leave it out"
        )

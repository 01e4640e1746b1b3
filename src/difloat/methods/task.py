"""What a recipe works on (`Task`), what it asks of a layer (`LayerRules`), and settings of the sequence (`Sequencing`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from difloat.calibration.collect import Calibration
from difloat.layers.exclude import Exclusion
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.trace import Call
from difloat.plan.rules import Bits, Rule
from difloat.plan.target import Target

_ROWS_PER_CALL = 32
_CALL_SHARE = 8  # a running block holds several times what its largest layer reads and writes


@dataclass(frozen=True)
class Task:
    """What every recipe is given.

    Attributes:
        model: The float denoiser, which stays untouched.
        calibration: The model's inputs along trajectories.
        bits: What the user asked for.
        seed: Seeds everything random.
        progress: Show progress bars.
        work_dir: Where finished blocks are kept, so that a killed run goes on after them. None keeps nothing.
        pipeline: Class name of the pipeline the model is part of, "" for a plain module.
        scheduler: Gives the pipeline's scheduler as its call sets it for the first step. None for a plain module.
        target: The machine whose fast formats the recipe's candidates are restricted to.
        only: The only layers to quantize, to try a recipe on a few, or None for all.
        exclude: What the user keeps out of quantization, whatever the recipe.
        layer_bits: Weight bits of some layers, for recipes with one width: in place of that width, but not of 8 bits of edges.
        memory_bytes: What activations may take while blocks are worked on. It bounds the rows, not the result's size.
    """

    model: nn.Module
    calibration: Calibration
    bits: Bits
    seed: int = 0
    progress: bool = True
    work_dir: Path | None = None
    memory_bytes: int = 2 << 30
    pipeline: str = ""
    target: Target = "any"
    only: frozenset[str] | None = None
    exclude: Exclusion = Exclusion()
    scheduler: Callable[[], Any] | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    def bits_of(self, name: str) -> int:
        """Weight bits of the layer `name`, where the recipe gives it no 8."""
        return self.layer_bits.get(name, self.bits.weight)

    def calls(self, rows: Sequence[int], row_bytes: int) -> list[Call]:
        """The calibration rows as denoiser calls of few enough rows each, where a layer's data take `row_bytes` a row."""
        size = max(1, min(_ROWS_PER_CALL, self.memory_bytes // (_CALL_SHARE * row_bytes)))
        return [self.calibration.batch(rows[at : at + size]) for at in range(0, len(rows), size)]


@dataclass(frozen=True)
class LayerRules:
    """What is asked of one layer.

    Attributes:
        weight: The rule for its weight.
        activation: The rule for its input. None leaves it.
        learn: Whether rounding is learned.
        smoothing: What the input is multiplied by before it is quantized, and the weight divided by. None leaves both.
        mixed: What is asked of bands of the weight's rows, in place of `weight`. None if all rows are alike.
    """

    weight: Rule
    activation: Rule | None
    learn: bool = False
    smoothing: Smoothing | None = None
    mixed: MixedRows | None = None

    def __post_init__(self) -> None:
        if self.learn and (self.smoothing is not None or self.mixed is not None):
            raise ValueError(
                "rounding can be learned for layers without smoothing and with rows alike only, got a layer with both"
            )
        if (
            self.smoothing is not None
            and self.smoothing.schedule
            and self.activation
            and not self.activation.online
        ):
            raise ValueError("smoothing by timestep must come with online input scales, got static ones")


@dataclass(frozen=True)
class Smoothing:
    """Factors of a layer's input channels, one row [i] for every stretch of the trajectory.

    Attributes:
        factors: float [stretches, i], positive.
        schedule: Stretch of every entry of the plan's timesteps, empty with one stretch.
    """

    factors: Tensor
    schedule: tuple[int, ...] = ()


@dataclass(frozen=True)
class MixedRows:
    """Output rows of a layer in bands, each asked for something else.

    Attributes:
        rules: The rule of every band.
        counts: Rows of every band.
        order: int64 [o], the rows of the layer, band after band.
    """

    rules: tuple[Rule, ...]
    counts: tuple[int, ...]
    order: Tensor


@dataclass(frozen=True)
class Sequencing:
    """Settings of the sequence that are not about one layer.

    Attributes:
        split: Quantize the pieces of skip concatenations apart.
        rounding: How rounding is learned where a layer asks for it.
        inputs: Whether a block's inputs during learning come from the quantized or from the full-precision prefix.
        rounding_rows: Calibration rows for learning, as far as memory allows.
        activation_rows: Calibration rows for the search over activations.
        minutes: After which no further block is learned. Then, or when a user interrupts, the others keep what they have. None
            learns all of them.
    """

    split: bool = True
    rounding: RoundingSettings = field(default_factory=RoundingSettings)
    inputs: Literal["quantized", "full"] = "quantized"
    rounding_rows: int = 256
    activation_rows: int = 128
    minutes: float | None = None

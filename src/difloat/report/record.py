"""The data of a report, as plain records that survive JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from rich.filesize import decimal
from torch.utils import _pytree as pytree

from difloat.methods.sparsity import MOSTLY, rounded_away
from difloat.plan.validation import LISTED, OPTIONAL, TUPLE, read, record
from difloat.report.text import number_text, size_text

NO_LAYER = "no layer to quantize"  # ends the reasons of modules that no recipe could quantize, such as norms
ROTATED = "input rotated in blocks of"  # begins the phrases of a layer's note that cost no bytes
_BRANCH = re.compile(r"\b1 x rank \d+ beside")  # in a note, one pair for all timesteps
_SHOWN = 3  # layers that a note names
_FAR_MORE = 1.5


def _costs_bytes(note: str) -> bool:
    """Whether a layer's note speaks of anything but a rotation."""
    return any(not phrase.startswith(ROTATED) for phrase in note.split("; "))


@record("layer of a report", finite=False)
class LayerRow:
    """One quantized layer of a report.

    Errors are ten times the decimal logarithm of the relative squared error, so -20 dB is 1 %. `kind` is ``linear`` or
    ``conv2d``. `activation_mode` reads like ``static per tensor`` or ``-``. `parts` counts runs of input channels that are
    quantized apart, which is 2 for a split skip concatenation. `zeros` is the share of weights that are exactly 0.
    `integer_grid` says that the weight format counts as an integer format. `bytes` include scales and adapters.
    """

    name: str
    kind: str
    shape: Annotated[tuple[int, ...], LISTED]
    weight_format: str
    weight_granularity: str
    activation_format: str | None
    activation_mode: str
    parts: int
    weight_error_db: float
    zeros: float
    zeros_before: float
    integer_grid: bool
    bytes: int
    bytes_before: int
    effective_bits: float
    note: str = ""


@record("histogram of a report", finite=False)
class Histogram:
    """The values of a layer and the grid they are rounded to. `edges` (one more than `counts`) and `grid` are real units."""

    layer: str
    edges: list[float]
    counts: list[float]
    grid: list[float]
    quantity: str  # "weight" or "activation"


@record("ranges of a report", finite=False)
class TokenRanges:
    """The reach of the tokens of a layer's input: `quantiles` (smallest, 10 %, median, 90 %, largest) per timestep."""

    layer: str
    timesteps: list[float]
    quantiles: list[list[float]]


@record("input of a report", finite=False)
class InputShape:
    """A static input that may be asymmetric: its `quantiles` (smallest, 1 %, median, 99 %, largest) and the chosen format.

    `lopsided` is 1 minus the shorter side of the values over the longer one, in the extremes or in the 1 % and 99 % quantiles,
    whichever is more. It is 0 for symmetric values, and 1 for values on one side of zero.
    """

    layer: str
    quantiles: list[float]
    lopsided: float
    asymmetric: bool
    format: str

    @property
    def unsigned(self) -> bool:
        """Whether an unsigned format with a zero point was taken."""
        return self.format.startswith("u")


@record("share of a report", finite=False)
class Share:
    """What a layer got of a budget of bytes.

    Attributes:
        layer: The name of the layer.
        formats: The formats of its weights, from the rows with most bits on.
        weights: How many weights it has.
        bits: The bits of a weight on average, scales and all.
        errors: What its rounding does to the output at every bits per weight that it could have had for all of its rows, as
            pairs of both.
        times_ms: Expected milliseconds of a call on the machine that quantized, and those of the float layer. None where
            times had no say.
    """

    layer: str
    formats: str
    weights: int
    bits: float
    errors: list[Annotated[tuple[float, float], TUPLE]]
    times_ms: Annotated[Annotated[tuple[float, float], TUPLE] | None, OPTIONAL] = None


@record("tried part of a report", finite=False)
class Tried:
    """An optional part that was judged on held-out trajectories.

    Attributes:
        part: The name of the part.
        kept: Whether the plan has it.
        gain_db: The fall of the squared error of the guided output: the mean over trajectories, low and high end of its
            95 % interval.
        trajectories: How many were held out.
        pictures: What judging took, in full-precision pictures, or None where that is not known.
    """

    part: str
    kept: bool
    gain_db: Annotated[tuple[float, float, float], TUPLE]
    trajectories: int
    pictures: float | None


@record("adapters of a report", finite=False)
class AdapterTable:
    """The adapter of every layer: `table` has a row per timestep, in the sampler's order, and a column per layer."""

    timesteps: list[float]
    layers: list[str]
    table: list[list[int]]


@record("measure of a report", finite=False)
class Measure:
    """One measured metric of a report.

    Attributes:
        name: The name in `evaluation.picture_metrics.METRICS`.
        label: What people call it.
        value: What was measured, in `unit`.
        low: The lower end of its 95 % interval, or None without one.
        high: The upper end.
        unit: The unit, or "" without one.
        better: "higher" or "lower".
        reference: The value of full precision, or None where it has none.
    """

    name: str
    label: str
    value: float
    low: float | None
    high: float | None
    unit: str
    better: Literal["higher", "lower"]
    reference: float | None


@record("report record", finite=False)
class Record:
    """Everything that the report shows besides pictures, as plain data that survives JSON.

    `created` is an ISO date. `recipe_notes` say what the paper leaves open and what was taken. `skipped` holds (layer, reason,
    bytes) of what stayed in high precision. `quality` has the metrics in the order of the table. `attention` is a sentence
    about what is quantized inside attention, or empty. `trajectory` has timesteps, value, low and high, one per sampler step.
    `timings` are (name, seconds).
    """

    title: str
    recipe: str
    bits: str
    model: str
    model_class: str
    command: str
    created: str
    versions: dict[str, str]
    machine: str
    options: dict[str, Any]
    recipe_notes: list[str]
    original_bytes: int
    packed_bytes: int
    effective_bits: float
    weight_bits_nominal: float
    layers: list[LayerRow]
    skipped: list[Annotated[tuple[str, str, int], TUPLE]]
    quality: list[Measure]
    samples: int
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    trajectory: dict[str, list[float]] | None = None
    histograms: list[Histogram] = field(default_factory=list)
    ranges: list[TokenRanges] = field(default_factory=list)
    inputs: list[InputShape] = field(default_factory=list)
    adapters: AdapterTable | None = None
    shares: list[Share] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    attention: str = ""
    timings: list[Annotated[tuple[str, float], TUPLE]] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @property
    def left_float(self) -> list[tuple[str, str, int]]:
        """The layers among `skipped`, which could have been quantized by their kind, and were not."""
        return [entry for entry in self.skipped if not entry[1].endswith(NO_LAYER)]

    @property
    def size_remark(self) -> str:
        """A sentence about why the quantized layers take far more than their bits say, or "" if they do not.

        That is so where layers hold a packed weight for each of several adapters or stretches of timesteps, or have adapters
        beside their weights.
        """
        several = [row for row in self.layers if row.note and _costs_bytes(row.note)]
        nominal = sum(math.prod(row.shape) for row in several) * self.weight_bits_nominal / 8
        taken = sum(row.bytes for row in several)
        if not several or taken < _FAR_MORE * nominal:
            return ""
        branches = all(_BRANCH.search(row.note) and "packed" not in row.note for row in several)
        remedy = (
            "a smaller rank of the branches takes less"
            if branches
            else "msfp --set adapters=1 and viditq --set stretches=1 keep one weight"
        )
        return (
            f"{len(several)} layers take {decimal(taken, precision=2)}, {taken / nominal:.1f} times what one weight of "
            f"{self.weight_bits_nominal:g} bits takes ({several[0].name}: "
            f"{several[0].note}); {remedy}"
        )

    @property
    def summary(self) -> str:
        """One sentence with model, recipe, size and the first metrics."""
        packed, original = (
            decimal(self.packed_bytes, precision=2),
            decimal(self.original_bytes, precision=2),
        )
        change = size_text(self.original_bytes, self.packed_bytes)
        size = f"{change} ({packed} instead of {original})"
        quality = [f"{q.label} {number_text(q.value)} {q.unit}".strip() for q in self.quality[:3]]
        return f"{self.model}, {self.recipe.upper()} {self.bits}: " + ", ".join([size, *quality]) + "."


def zeros_note(rows: Sequence[LayerRow]) -> str:
    """A sentence about the layers of which little is left (`MOSTLY`), the emptiest first, or "" if there is none."""
    lost = {row.name: rounded_away(row.zeros, row.zeros_before) for row in rows}
    names = sorted((name for name, share in lost.items() if share > MOSTLY), key=lambda name: -lost[name])
    if not names:
        return ""
    shown = ", ".join(f"{name} ({lost[name]:.0%})" for name in names[:_SHOWN])
    others = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"Mostly zeros, more than two thirds of the weights rounded to 0: {len(names)} of {len(rows)} layers, {shown}{others}. "
        "Give them more bits, smaller groups, or a format and range that are searched."
    )


def record_to_json(made: Record) -> str:
    """The record as strict JSON text, which `record_from_json` reads. Inf and NaN become ``{"float": "inf"}``."""
    return json.dumps(_without_specials(asdict(made)), indent=1, ensure_ascii=False, allow_nan=False)


def record_from_json(text: str) -> Record:
    """The record that `record_to_json` wrote.

    Raises:
        ValueError: if the text is no JSON, or a field is missing, unknown or of another type.
    """
    try:
        data = json.loads(text, object_hook=lambda d: float(d["float"]) if d.keys() == {"float"} else d)
        for row in data["layers"]:
            row.pop("output_error_db", None)  # of earlier versions, which never knew it
        return read(Record, data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"report record must be JSON with the fields of this version of difloat, but {error}; quantize again to write one"
        ) from error


def _without_specials(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become texts in a dict."""
    return pytree.tree_map_only(
        float, lambda number: number if math.isfinite(number) else {"float": str(number)}, value
    )

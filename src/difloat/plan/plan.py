"""The plan of a quantized model: the formats, scales and codes of every layer, as plain data.

A `Plan` is where deciding ends. Nothing that carries a plan out knows which recipe made it.

The axes of a weight are ``o`` output channels, ``i`` input channels, then kernel axes. A layer's input channels may be cut into
*parts*, each with its own formats and scales. For example, a U-Net's skip concatenation feeds two different distributions into
one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from difloat.numbers.packing import unpack
from difloat.plan.specs import (
    SIDE,
    AttentionPlan,
    Band,
    Part,
    Rotation,
    Schedule,
    Side,
    layer_tensor_shapes,
)
from difloat.plan.validation import LARGEST, LISTED, OPTIONAL, Rule, record, shown
from difloat.plan.weight import Layout, Weight, layout, pack

PLAN_VERSION = 1
ROTATED_VERSION = 2  # of plans with rotated layers only, so that older readers refuse these and no others
VARIED = ("weight", "weight_scale", "weight_zero_point", "input_factor")  # one after the other per variant
_DTYPES = {"weight": torch.uint8, "row_band": torch.uint8, **dict.fromkeys(SIDE, torch.float16)}
_INPUT_SIDE = ("input_scale", "input_zero_point", "input_factor")  # what the bands of a layer have in common


def _given(noun: str) -> BeforeValidator:
    """Refuse an explicit None of an optional record."""

    def check(found: Any) -> Any:
        if found is None:
            raise ValueError(f"{noun} must be left out of a layer that has none, got None")
        return found

    return BeforeValidator(check)


@record("plan of a layer")
class LayerSpec:
    """The formats of one quantized layer, and what its tensors are laid out by: all that a file says in JSON.

    Attributes:
        kind: "linear" or "conv2d".
        shape: The shape [o, i, *k] of the float weight.
        parts: The cuts along the input channels, whose `channels` add up to i.
        smoothed: Whether there is an `input_factor`.
        schedule: The number of the weight variant (with its scales and factors) for every entry of the plan's timesteps. It
            is empty with one variant. Variants are stored one after the other along the first axis.
        input_schedule: The number of the input scale and zero point for every entry of the plan's timesteps, or empty.
        bands: The rows of several widths, in the order of their storage, or empty if all rows are alike. The rows of a band
            keep their order. `weight` is then [variants, bytes, *k], row after row, band after band, and the scales of a band
            follow those of the one before. `parts` has the weight specs of the first band.
        side: The low-rank pairs beside the weight, with float16 tensors `side_down` [pairs * rank, i, *k] and `side_up`
            [pairs * o, rank].
        rotation: How the input of a linear layer is rotated before anything else. The stored weight is meant for the rotated
            input. The side branch reads the input as it comes.
    """

    kind: Annotated[Literal["linear", "conv2d"], Field(title="kind of a layer"), Rule("be linear or conv2d")]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=LARGEST, title="size in a shape")], ...], LISTED]
    parts: Annotated[tuple[Part, ...], LISTED, Field(title="parts of a layer")]
    smoothed: Annotated[bool, OPTIONAL] = False
    schedule: Annotated[Schedule, OPTIONAL] = ()
    input_schedule: Annotated[Schedule, OPTIONAL] = ()
    bands: Annotated[tuple[Band, ...], LISTED, OPTIONAL, Field(title="bands of a layer")] = ()
    side: Annotated[Side | None, OPTIONAL, _given("side branch")] = None
    rotation: Annotated[Rotation | None, OPTIONAL, _given("rotation")] = None

    def __post_init__(self) -> None:
        if len(self.shape) != {"linear": 2, "conv2d": 4}[self.kind]:
            raise ValueError(f"a {self.kind} weight cannot have the shape {shown(self.shape)}")
        pairs = 0 if self.side is None else self.side.rank * self.side.pairs
        if math.prod(self.shape) * max(1, pairs) > LARGEST:
            raise ValueError(f"a layer must be of a possible size, got {self.shape} and {pairs} pairs")
        if self.rotation is not None:
            if self.kind != "linear" or len(self.parts) != 1 or self.smoothed:
                raise ValueError(
                    "a rotated layer must be linear, of one part and not smoothed, got another; rotate other layers"
                )
            if self.shape[1] % self.rotation.block:
                raise ValueError(
                    f"block of a rotation must divide the {self.shape[1]} input channels, got {self.rotation.block}"
                )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerPlan:
        """The layer with its stored tensors. A ValueError says where their shapes do not fit."""
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != (expected := self.tensor_shapes()):
            raise ValueError(f"tensors of a layer must have the shapes {expected}, got {got}")
        return LayerPlan(**{one.name: getattr(self, one.name) for one in fields(LayerSpec)}, tensors=tensors)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the stored tensors must have, by name."""
        numbers = (self.variants, self.smoothed, max(self.input_schedule, default=0) + 1)
        return layer_tensor_shapes(self.shape, self.parts, *numbers, self.bands, self.side)

    def rotated(self, weight: Tensor) -> Tensor:
        """A weight [..., i], or rows of it, as a rotated layer stores it. Of other layers it is the weight itself."""
        return weight if self.rotation is None else self.rotation.forward(weight)

    @property
    def schedules(self) -> list[tuple[int, ...]]:
        """All schedules of the layer, each with an entry for every entry of the plan's timesteps."""
        side = () if self.side is None else self.side.schedule
        return [schedule for schedule in (self.schedule, self.input_schedule, side) if schedule]

    @property
    def version(self) -> int:
        """The version of the file format from which on a reader knows everything that the layer has."""
        return PLAN_VERSION if self.rotation is None else ROTATED_VERSION

    @property
    def variants(self) -> int:
        """How many weights are stored."""
        return max(self.schedule, default=0) + 1


@dataclass(frozen=True)
class LayerPlan(LayerSpec):
    """The formats and stored tensors of one quantized layer.

    Attributes:
        tensors: The layer's stored state besides its bias. `weight` is uint8 with the parts' packed rows side by side. The
            others are float32 vectors, part after part: `weight_scale`, and where the specs ask for them
            `weight_zero_point`, `input_scale` and `input_zero_point`. A smoothed layer has `input_factor`, by which its input
            is multiplied channel by channel before it is quantized, and which its weight undoes. A layer whose rows have
            several widths has `row_band` (uint8 [o]), the band of every output channel.
    """

    tensors: Mapping[str, Tensor] = field(kw_only=True, repr=False)

    def variant(self, number: int) -> LayerPlan:
        """The layer with only one of its weights. Its tensors are views."""
        if not self.schedule:
            return self
        tensors = {
            name: tensor.chunk(self.variants)[number] if name in VARIED else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, schedule=())

    @property
    def layout(self) -> Layout:
        """The places of the weight's rectangles in the tensors of one variant."""
        return layout(self.shape[0], self.parts, self.bands)

    def weight(self, number: int = 0) -> Weight:
        """One of the stored weights, rectangle by rectangle. Its tensors are views."""
        return self.layout.weight(self.variant(number).tensors)

    def split_rows(self) -> list[LayerPlan]:
        """An ordinary layer for every band of rows, or the layer itself if its rows are alike."""
        if not self.bands:
            return [self]
        assert not self.schedule, "take a variant first"
        shared = {name: tensor for name, tensor in self.tensors.items() if name in _INPUT_SIDE}
        result = []
        for band, pieces in zip(self.bands, zip(*self.weight().columns, strict=True), strict=True):
            tensors = {**shared, **pack(Weight(tuple([(piece,) for piece in pieces])))}
            shape, parts = (band.rows, *self.shape[1:]), band.parts(self.parts)
            result.append(replace(self, shape=shape, parts=parts, tensors=tensors, bands=(), side=None))
        return result

    def codes(self) -> list[Tensor]:
        """The codes of every part, uint8 [variants * o, channels, *k]. Rows of several widths give one tensor per band."""
        in_bands = [
            [piece for band in zip(*self.weight(number).columns, strict=True) for piece in band]
            for number in range(self.variants)
        ]
        return [
            torch.cat([unpack(p.codes, p.spec.format.bits, p.part.channels) for p in variants])
            for variants in zip(*in_bands, strict=True)
        ]

    @staticmethod
    def dtype_of(name: str) -> torch.dtype:
        """The dtype of the stored tensor of this name."""
        return _DTYPES.get(name, torch.float32)

    @property
    def nbytes(self) -> int:
        """The bytes of all stored tensors, without the bias."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    """The plan of a model: an entry for every layer that is quantized, and a reason for every layer that is not.

    >>> import difloat
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    >>> plan = difloat.plan(model, "rtn", "w4a8", exclude=["1"], progress=False)
    >>> {name: layer.parts[0].weight.format.name for name, layer in plan.layers.items()}
    {'0': 'e2m1'}
    >>> plan.skipped
    {'1': 'excluded by the user'}

    Attributes:
        recipe: The name of the recipe that decided.
        bits: The widths that were asked for, like "w4a8".
        layers: The quantized layers by module name.
        skipped: The reasons of layers that stay float, by module name.
        options: The recipe's options as plain data.
        measured: Times and errors on the way, which are not part of the checkpoint.
        attention: The quantized attention by the name of its module. Other attention computes as before.
        timesteps: The grid that the layers' schedules refer to, in the unit of the denoiser's argument. The entry that is
            nearest to a call's timestep counts.
        components: The plans of the pipeline's other components by name, each stored with its component.
    """

    recipe: str
    bits: str
    layers: Mapping[str, LayerPlan]
    skipped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    components: Mapping[str, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(schedule) for layer in self.layers.values() for schedule in layer.schedules}
        if lengths - {len(self.timesteps)}:
            raise ValueError(
                f"schedules must have an entry for each of the {len(self.timesteps)} timesteps, got {sorted(lengths)}"
            )

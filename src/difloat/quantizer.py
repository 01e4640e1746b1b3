"""Scales, shapes and codes: how a format is laid over a tensor, and the plan that says so for a whole model.

A `Plan` is where deciding ends: plain data, per layer which format, scale and codes. Nothing that carries a plan out knows
which recipe made it.

Axes of weights: ``o`` output channels, ``i`` input channels, then kernel axes. A layer's input channels may be cut into
*parts*, each with its own formats and scales: a U-Net's skip concatenation feeds two different distributions into one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from difloat import json_fields
from difloat.numbers import rounding
from difloat.numbers.packing import pack, packed_channels, unpack
from difloat.scales import expand_scale, reorder_scale, row_places
from difloat.specs import SIDE, AttentionPlan, Band, Part, Side, layer_tensor_shapes, schedule_of

PLAN_VERSION = 1
VARIED = ("weight", "weight_scale", "weight_zero_point", "input_factor")  # one after the other per variant
_DTYPES = {"weight": torch.uint8, "row_band": torch.uint8, **dict.fromkeys(SIDE, torch.float16)}
_PER_ROW = ("weight_scale", "weight_zero_point")
_INPUT_SIDE = ("input_scale", "input_zero_point", "input_factor")  # what the bands of a layer have in common


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        kind: "linear" or "conv2d".
        shape: Of the float weight, [o, i, *k].
        parts: Cut along the input channels; their `channels` add up to i.
        tensors: The layer's stored state besides its bias: `weight` (uint8, the parts' packed rows side by side) and float32
            vectors, part after part: `weight_scale`, and where the specs ask for them `weight_zero_point`, `input_scale`,
            `input_zero_point`. Where the layer is smoothed, `input_factor`: the input is multiplied by it, channel by
            channel, before it is quantized, and the weight stands for what undoes that.
            Where rows have several widths, `row_band` (uint8 [o]): the band of every output channel.
        smoothed: Whether there is an `input_factor`.
        schedule: For every entry of the plan's timesteps, which variant of the weight (with its scales and factors) is used;
            empty with one variant. Variants are stored one after the other along the first axis.
        input_schedule: Likewise which of several input scales and zero points.
        bands: Rows of several widths, in the order of their storage; empty if all are alike. The rows of a band keep their
            order; `weight` is then [variants, bytes, *k], row after row, band after band, and the scales of a band follow
            those of the one before. `parts` has the weight specs of the first band.
        side: Low-rank pairs beside the weight: float16 tensors `side_down` [pairs * rank, i, *k], `side_up` [pairs * o, rank].
    """

    kind: Literal["linear", "conv2d"]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    smoothed: bool = False
    schedule: tuple[int, ...] = ()
    input_schedule: tuple[int, ...] = ()
    bands: tuple[Band, ...] = ()
    side: Side | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        parts = [part.to_json() for part in self.parts]
        optional = {
            "smoothed": self.smoothed,
            "schedule": list(self.schedule),
            "input_schedule": list(self.input_schedule),
            "bands": [band.to_json() for band in self.bands],
            "side": None if self.side is None else self.side.to_json(),
        }
        present = {name: value for name, value in optional.items() if value}
        return {"kind": self.kind, "shape": list(self.shape), "parts": parts, **present}

    @staticmethod
    def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerPlan:
        """Inverse of `to_json`, with the tensors beside it; ValueError where fields or shapes do not fit."""
        layer = replace(LayerPlan.without_tensors(data), tensors=tensors)
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != (expected := layer.tensor_shapes()):
            raise ValueError(f"tensors of a layer must have the shapes {expected}, got {got}")
        return layer

    @staticmethod
    def without_tensors(data: Mapping[str, Any]) -> LayerPlan:
        """Inverse of `to_json` before any tensor is at hand; ValueError on fields of a wrong name, type or range."""
        optional = ("smoothed", "schedule", "input_schedule", "bands", "side")
        json_fields.json_object(data, "plan of a layer", ["kind", "shape", "parts"], optional)
        if (kind := data["kind"]) not in ("linear", "conv2d"):
            raise ValueError(f"kind of a layer must be linear or conv2d, got {json_fields.shown(kind)}")
        sizes = json_fields.entries(data["shape"], "shape")
        layer = LayerPlan(
            kind,
            tuple(json_fields.whole_number(size, "size in a shape") for size in sizes),
            tuple(map(Part.from_json, json_fields.entries(data["parts"], "parts of a layer"))),
            {},
            json_fields.flag(data.get("smoothed", False), "smoothed"),
            schedule_of(data.get("schedule", ()), "schedule"),
            schedule_of(data.get("input_schedule", ()), "input_schedule"),
            tuple(map(Band.from_json, json_fields.entries(data.get("bands", ()), "bands of a layer"))),
            Side.from_json(data["side"]) if "side" in data else None,
        )
        if len(layer.shape) != {"linear": 2, "conv2d": 4}[kind]:
            raise ValueError(f"a {kind} weight cannot have the shape {json_fields.shown(layer.shape)}")
        pairs = 0 if layer.side is None else layer.side.rank * layer.side.pairs
        if math.prod(layer.shape) * max(1, pairs) > json_fields.LARGEST:
            raise ValueError(f"a layer must be of a possible size, got {layer.shape} and {pairs} pairs")
        return layer

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the stored tensors must have."""
        numbers = (self.variants, self.smoothed, max(self.input_schedule, default=0) + 1)
        return layer_tensor_shapes(self.shape, self.parts, *numbers, self.bands, self.side)

    @property
    def schedules(self) -> list[tuple[int, ...]]:
        """Whatever of the layer depends on the timestep: an entry of each for every entry of the plan's timesteps."""
        side = () if self.side is None else self.side.schedule
        return [schedule for schedule in (self.schedule, self.input_schedule, side) if schedule]

    @property
    def variants(self) -> int:
        """How many weights are stored."""
        return max(self.schedule, default=0) + 1

    def variant(self, number: int) -> LayerPlan:
        """The layer with one of its weights only; tensors are views."""
        if not self.schedule:
            return self
        tensors = {
            name: tensor.chunk(self.variants)[number] if name in VARIED else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, schedule=())

    def split_rows(self) -> list[LayerPlan]:
        """The inverse of `join_rows`: an ordinary layer per band, the layer itself if its rows are alike; tensors are views."""
        if not self.bands:
            return [self]
        assert not self.schedule, "take a variant first"
        at, ends = 0, dict.fromkeys(_PER_ROW, 0)
        result = []
        for band in self.bands:
            shape, parts = (band.rows, *self.shape[1:]), band.parts(self.parts)
            shapes = layer_tensor_shapes(shape, parts)
            size = math.prod(shapes["weight"][:2])
            tensors = {name: tensor for name, tensor in self.tensors.items() if name in _INPUT_SIDE}
            tensors["weight"] = self.tensors["weight"][0, at : at + size].unflatten(0, (band.rows, -1))
            at += size
            for name in _PER_ROW:
                if name in shapes:
                    tensors[name] = self.tensors[name][ends[name] : ends[name] + shapes[name][0]]
                    ends[name] += shapes[name][0]
            result.append(replace(self, shape=shape, parts=parts, tensors=tensors, bands=(), side=None))
        return result

    def codes(self) -> list[Tensor]:
        """The codes of every part, uint8 [variants * o, channels, *k]; of rows of several widths band after band."""
        if self.bands:
            variants = [self.variant(number).split_rows() for number in range(self.variants)]
            found = [[codes for band in bands for codes in band.codes()] for bands in variants]
            return [torch.cat(pieces) for pieces in zip(*found, strict=True)]
        widths = [packed_channels(part.channels, part.weight.format.bits) for part in self.parts]
        packed = self.tensors["weight"].split(widths, dim=1)
        return [
            unpack(p, part.weight.format.bits, part.channels)
            for p, part in zip(packed, self.parts, strict=True)
        ]

    @staticmethod
    def dtype_of(name: str) -> torch.dtype:
        """Dtype of the stored tensor of this name."""
        return _DTYPES.get(name, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (the bias not counted)."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    """What becomes of a model: one entry per layer that is quantized, one reason per layer that is not.

    Attributes:
        recipe, bits: The name of the recipe that decided; what was asked for, like "w4a8".
        layers: By module name.
        skipped: Reasons, by module name.
        options: The recipe's options, plain data.
        measured: Times and errors on the way; not part of the checkpoint.
        attention: By the name of the attention module; what is not there computes as before.
        timesteps: Grid that the layers' schedules refer to, in the unit of the denoiser's argument, the nearest entry counts.
        components: Plans of the pipeline's other components by name, each stored with its component.
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

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, ready for `json.dumps`; `attention` and `timesteps` only where there are some."""
        data = {
            "version": PLAN_VERSION,
            "recipe": self.recipe,
            "bits": self.bits,
            "options": dict(self.options),
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "skipped": dict(self.skipped),
        }
        attention = {"attention": {name: entry.to_json() for name, entry in self.attention.items()}}
        optional = attention | {"timesteps": list(self.timesteps)}
        return data | {name: value for name, value in optional.items() if value}


def plan_layer(
    weight: Tensor,
    parts: Sequence[Part],
    weight_scales: Sequence[Tensor],
    *,
    weight_zero_points: Sequence[Tensor] | None = None,
    input_scales: Sequence[Tensor | None] = (),
    input_zero_points: Sequence[Tensor | None] = (),
) -> LayerPlan:
    """Encode and pack a weight.

    Args:
        weight: Float [o, i] or [o, i, kh, kw]; values off the grid are rounded to the nearest.
        parts: Their channels add up to i.
        weight_scales: Per part, as many scales as its spec asks for.
        weight_zero_points: Per part, where a spec has a zero point.
        input_scales: Per part; None where the activation is online or not quantized.
        input_zero_points: Likewise.

    Raises:
        ValueError: if shapes do not fit.
    """
    shapes = layer_tensor_shapes(weight.shape, parts)
    if not weight.isfinite().all() or not all(bool((scale > 0).all()) for scale in weight_scales):
        raise ValueError(
            "weights must be finite and their scales positive, got NaN, Inf or a scale of 0; repair the weights"
        )
    zero_points = weight_zero_points or [torch.zeros(0)] * len(parts)
    packed = []
    pieces = weight.float().split([part.channels for part in parts], dim=1)
    for piece, part, scale, zero in zip(pieces, parts, weight_scales, zero_points, strict=True):
        shifted = piece - expand_scale(zero, part.weight, piece.shape) if part.weight.zero_point else piece
        codes = rounding.encode(shifted / expand_scale(scale, part.weight, piece.shape), part.weight.format)
        packed.append(pack(codes, part.weight.format.bits))
    vectors = {
        "weight_scale": list(weight_scales),
        "weight_zero_point": [
            z for z, part in zip(zero_points, parts, strict=True) if part.weight.zero_point
        ],
        "input_scale": [s for s in input_scales if s is not None],
        "input_zero_point": [z for z in input_zero_points if z is not None],
    }
    tensors = {"weight": torch.cat(packed, dim=1)}
    tensors |= {name: torch.cat([v.reshape(-1).float() for v in vs]) for name, vs in vectors.items() if vs}
    kind: Literal["linear", "conv2d"] = "linear" if weight.dim() == 2 else "conv2d"
    layer = LayerPlan(kind, tuple(weight.shape), tuple(parts), tensors)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != shapes:
        raise ValueError(f"scales must fit the parts, expected shapes {shapes}, got {got}")
    return layer


def join_variants(
    plans: Sequence[LayerPlan], schedule: Sequence[int], factors: Tensor | None = None
) -> LayerPlan:
    """One layer from its weights for several stretches of the trajectory.

    Args:
        plans: The same layer with different weights; inputs and specs are those of the first.
        schedule: Which of them belongs to every entry of the plan's timesteps; empty with one.
        factors: float [variants, i], positive: what the input is multiplied by, and the weights are divided by already.

    Raises:
        ValueError: if rows of several widths are not the same rows in all plans.
    """
    first = plans[0]
    if any(
        plan.bands and not torch.equal(plan.tensors["row_band"], first.tensors["row_band"]) for plan in plans
    ):
        raise ValueError("variants must have their rows in the same bands, got others; choose the rows once")
    tensors = {
        name: torch.cat([plan.tensors[name] for plan in plans]) if name in VARIED else tensor
        for name, tensor in first.tensors.items()
    }
    if factors is not None:
        tensors["input_factor"] = factors.reshape(-1).float()
    return replace(first, tensors=tensors, smoothed=factors is not None, schedule=tuple(schedule))


def join_rows(bands: Sequence[LayerPlan], order: Tensor) -> LayerPlan:
    """One layer from layers of some of its rows (output channels) each, which differ in their weight formats.

    Args:
        bands: Layers of `plan_layer` (or `join_variants`, for smoothed ones) with the same input channels, activations, input
            scales and factors, and one weight. With one band the result is an ordinary layer.
        order: int [o]: row j of the bands, one after the other, is row ``order[j]`` of the joined layer. Within a band the
            stored rows take the order of the joined layer, so that a byte per row is all there is to keep of it.

    Raises:
        ValueError: if the bands do not belong together, or the order is no permutation.
    """
    first, counts = bands[0], [band.shape[0] for band in bands]
    for band in bands:
        _check_belongs(band, first)
    order = order.long().cpu()
    if order.shape != (sum(counts),) or not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(
            f"order must be a permutation of the {sum(counts)} rows of the bands, got {order.tolist()!r:.80}"
        )
    places = order.split(counts)
    sorted_bands = [_rows_of(band, place.argsort()) for band, place in zip(bands, places, strict=True)]
    if len(bands) == 1:
        return sorted_bands[0]
    tensors = {name: tensor for name, tensor in first.tensors.items() if name in _INPUT_SIDE}
    tensors["weight"] = torch.cat([band.tensors["weight"].flatten(0, 1) for band in sorted_bands])[None]
    for name in _PER_ROW:
        if vectors := [band.tensors[name] for band in sorted_bands if name in band.tensors]:
            tensors[name] = torch.cat(vectors)
    row_band = torch.arange(len(bands)).repeat_interleave(torch.tensor(counts))[order.argsort()]
    tensors["row_band"] = row_band.to(tensors["weight"].device, torch.uint8)
    specs = tuple(Band(n, tuple(p.weight for p in band.parts)) for n, band in zip(counts, bands, strict=True))
    joined = replace(first, shape=(len(order), *first.shape[1:]), tensors=tensors, bands=specs)
    joined.tensor_shapes()  # refuses too many bands
    return joined


def _check_belongs(band: LayerPlan, first: LayerPlan) -> None:
    """ValueError unless the rows of `band` can be rows of the layer that those of `first` belong to."""

    def inputs(layer: LayerPlan) -> list[object]:
        facts = [(part.channels, part.activation) for part in layer.parts]
        return [layer.kind, layer.shape[1:], facts, layer.smoothed, layer.input_schedule]

    if band.schedule or band.bands:
        raise ValueError(
            "bands must have one weight of equal rows each, got a joined layer; join variants last"
        )
    shared = [{n: t.tolist() for n, t in b.tensors.items() if n in _INPUT_SIDE} for b in (band, first)]
    if inputs(band) != inputs(first) or shared[0] != shared[1]:
        raise ValueError("bands must read the same input with the same specs, scales and factors, got others")


def _rows_of(layer: LayerPlan, rows: Tensor) -> LayerPlan:
    """The layer with its rows in another order, int64 [o]."""
    tensors = {**layer.tensors, "weight": layer.tensors["weight"][rows]}
    for name in _PER_ROW:
        if name in tensors:
            specs = [part for part in layer.parts if name == "weight_scale" or part.weight.zero_point]
            counts = [part.weight.scale_count(len(rows), part.channels) for part in specs]
            tensors[name] = torch.cat([reorder_scale(v, rows) for v in tensors[name].split(counts)])
    return replace(layer, tensors=tensors)


def dequantize(layer: LayerPlan) -> Tensor:
    """The float32 weight [o, i, *k] that the codes stand for; of the first variant if there are several.

    A smoothed layer's weight comes back as the input sees it, with the factors multiplied in.
    """
    if layer.schedule:
        return dequantize(layer.variant(0))
    if layer.bands:
        stored = torch.cat([dequantize(band) for band in layer.split_rows()])
        return stored[row_places(layer.tensors["row_band"])]
    pieces, scale_at, zero_at = [], 0, 0
    for codes, part in zip(layer.codes(), layer.parts, strict=True):
        count = part.weight.scale_count(codes.shape[0], part.channels)
        scale = layer.tensors["weight_scale"][scale_at : scale_at + count]
        scale_at += count
        piece = rounding.decode(codes, part.weight.format) * expand_scale(scale, part.weight, codes.shape)
        if part.weight.zero_point:
            zero = layer.tensors["weight_zero_point"][zero_at : zero_at + count]
            zero_at += count
            piece = piece + expand_scale(zero, part.weight, codes.shape)
        pieces.append(piece)
    weight = torch.cat(pieces, dim=1)
    if layer.smoothed:
        weight = weight * layer.tensors["input_factor"].reshape(1, -1, *[1] * (weight.dim() - 2))
    return weight

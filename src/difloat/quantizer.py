"""Scales, shapes and codes: how a format is laid over a tensor, and the plan that says so for a whole model.

A `Plan` is where deciding ends: plain data, per layer which format, scale and codes. Nothing that carries a plan out knows
which recipe made it.

Axes of weights: ``o`` output channels, ``i`` input channels, then kernel axes. A layer's input channels may be cut into
*parts*, each with its own formats and scales: a U-Net's skip concatenation feeds two different distributions into one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from difloat import formats, rounding
from difloat.formats import Format
from difloat.packing import pack, packed_channels, unpack

Granularity = Literal["tensor", "channel", "group", "token"]
PLAN_VERSION = 1


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        format: The grid.
        granularity: What shares a scale: the tensor, an output channel (weights), a token (activations: one row along the
            channel axis), or `group_size` input channels of one output channel or one token.
        group_size: Input channels per group; only with granularity "group".
        online: The scale comes from the data at run time, nothing is stored: the largest magnitude becomes the largest value
            of the grid; with a zero point the smallest value becomes the smallest of the grid as well.
        zero_point: A real offset is added after the grid (``value * scale + zero_point``).
    """

    format: Format
    granularity: Granularity = "tensor"
    group_size: int | None = None
    online: bool = False
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {self.granularity!r}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size must be given exactly with granularity 'group', got {self.group_size!r}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.granularity == "token" and not self.online:
            raise ValueError("granularity 'token' must be online, since tokens are not known beforehand")

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, with the format by name."""
        data: dict[str, Any] = {"format": self.format.name, "granularity": self.granularity}
        if self.group_size is not None:
            data["group_size"] = self.group_size
        if self.online:
            data["online"] = True
        if self.zero_point:
            data["zero_point"] = True
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantSpec:
        """Inverse of `to_json`; ValueError on an unknown field, format or value."""
        unknown = set(data) - {"format", "granularity", "group_size", "online", "zero_point"}
        if unknown or "format" not in data:
            raise ValueError(
                f"quantization spec must have 'format' and known fields only, got {sorted(data)}"
            )
        return QuantSpec(**{**data, "format": formats.parse(data["format"])})

    def scale_count(self, out_channels: int, in_channels: int) -> int:
        """How many scales a weight of this shape stores."""
        if self.granularity == "tensor":
            return 1
        return out_channels * (-(-in_channels // self.group_size) if self.group_size else 1)


def _check_activation(spec: QuantSpec) -> None:
    if spec.granularity == "channel":
        raise ValueError("activation granularity must be 'tensor', 'token' or 'group', got 'channel'")
    if spec.granularity == "group" and not spec.online:
        raise ValueError(
            "activation granularity 'group' must be online, since tokens are not known beforehand"
        )


@dataclass(frozen=True)
class Part:
    """A run of input channels of one layer with its own formats; `activation` None leaves the input as it is."""

    channels: int
    weight: QuantSpec
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels of a part must be at least 1, got {self.channels}")
        if self.weight.online or self.weight.granularity == "token":
            raise ValueError(f"weight scales must be stored, got an online spec {self.weight.to_json()}")
        if self.activation is not None:
            _check_activation(self.activation)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        data = {"channels": self.channels, "weight": self.weight.to_json()}
        return data if self.activation is None else {**data, "activation": self.activation.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Part:
        """Inverse of `to_json`; ValueError on missing or unknown fields."""
        if not {"channels", "weight"} <= set(data) <= {"channels", "weight", "activation"}:
            raise ValueError(
                f"a part must have 'channels', 'weight' and perhaps 'activation', got {sorted(data)}"
            )
        activation = data.get("activation")
        return Part(
            int(data["channels"]),
            QuantSpec.from_json(data["weight"]),
            None if activation is None else QuantSpec.from_json(activation),
        )


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        kind: "linear" or "conv2d".
        shape: Of the float weight, [o, i, *k].
        parts: Cut along the input channels; their `channels` add up to i.
        tensors: The layer's stored state besides its bias: `weight` (uint8, the parts' packed rows side by side) and float32
            vectors, part after part: `weight_scale`, and where the specs ask for them `weight_zero_point`, `input_scale`,
            `input_zero_point`.
    """

    kind: Literal["linear", "conv2d"]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "parts": [part.to_json() for part in self.parts],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerPlan:
        """Inverse of `to_json`, with the tensors beside it; ValueError where fields or shapes do not fit."""
        if set(data) != {"kind", "shape", "parts"} or data["kind"] not in ("linear", "conv2d"):
            raise ValueError(
                f"a layer plan must have 'kind' linear or conv2d, 'shape' and 'parts', got {dict(data)!r:.200}"
            )
        parts = tuple(Part.from_json(part) for part in data["parts"])
        layer = LayerPlan(data["kind"], tuple(int(n) for n in data["shape"]), parts, tensors)
        expected = layer_tensor_shapes(layer.shape, parts)
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            raise ValueError(f"tensors of a layer must have the shapes {expected}, got {got}")
        return layer

    def codes(self) -> list[Tensor]:
        """The codes of every part, uint8 [o, channels, *k]."""
        widths = [packed_channels(part.channels, part.weight.format.bits) for part in self.parts]
        packed = self.tensors["weight"].split(widths, dim=1)
        return [
            unpack(p, part.weight.format.bits, part.channels)
            for p, part in zip(packed, self.parts, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (the bias not counted)."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class AttentionPlan:
    """What is rounded inside one attention; nothing is stored for it, all scales come from the data or the grid.

    Attributes:
        operand: Grid of query, key and value after the heads are split, one online scale per token and head; None
            leaves them.
        softmax: Unsigned grid of the attention map, whose largest value stands for 1; None leaves the map.
    """

    operand: Format | None = None
    softmax: Format | None = None

    def __post_init__(self) -> None:
        if self.operand is None and self.softmax is None:
            raise ValueError("an attention plan must quantize its operands or its map, got neither")
        if self.softmax is not None and self.softmax.min < 0:
            raise ValueError(f"grid of an attention map must be unsigned, got {self.softmax.name}")

    def to_json(self) -> dict[str, str]:
        """Names of the grids that are there."""
        grids = {"operand": self.operand, "softmax": self.softmax}
        return {name: grid.name for name, grid in grids.items() if grid is not None}

    @staticmethod
    def from_json(data: Mapping[str, str]) -> AttentionPlan:
        """Inverse of `to_json`; ValueError on an unknown field or format."""
        if unknown := set(data) - {"operand", "softmax"}:
            raise ValueError(
                f"an attention plan must have 'operand' and 'softmax' only, got {sorted(unknown)}"
            )
        return AttentionPlan(**{name: formats.parse(grid) for name, grid in data.items()})


@dataclass(frozen=True)
class Plan:
    """What becomes of a model: one entry per layer that is quantized, one reason per layer that is not.

    Attributes:
        recipe: The name of the recipe that decided.
        bits: What was asked for, like "w4a8".
        layers: By module name.
        skipped: Reasons, by module name.
        options: The recipe's options, plain data.
        measured: Times and errors on the way; not part of the checkpoint.
        attention: By the name of the attention module; what is not there computes as before.
    """

    recipe: str
    bits: str
    layers: Mapping[str, LayerPlan]
    skipped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, ready for `json.dumps`; `attention` only where some is quantized."""
        data = {
            "version": PLAN_VERSION,
            "recipe": self.recipe,
            "bits": self.bits,
            "options": dict(self.options),
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "skipped": dict(self.skipped),
        }
        attention = {name: entry.to_json() for name, entry in self.attention.items()}
        return {**data, "attention": attention} if attention else data


def layer_tensor_shapes(shape: Sequence[int], parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors of a layer whose float weight has `shape` [o, i, *k].

    Raises:
        ValueError: if the parts do not add up to the input channels.
    """
    out_channels, in_channels, *kernel = shape
    if sum(part.channels for part in parts) != in_channels:
        raise ValueError(
            f"parts must add up to {in_channels} input channels, got {[p.channels for p in parts]}"
        )
    packed = sum(packed_channels(part.channels, part.weight.format.bits) for part in parts)
    scales = sum(part.weight.scale_count(out_channels, part.channels) for part in parts)
    zeros = sum(
        part.weight.scale_count(out_channels, part.channels) for part in parts if part.weight.zero_point
    )
    activations = [part.activation for part in parts if part.activation is not None]
    counts = {
        "weight_scale": scales,
        "weight_zero_point": zeros,
        "input_scale": sum(not spec.online for spec in activations),
        "input_zero_point": sum(spec.zero_point and not spec.online for spec in activations),
    }
    return {"weight": (out_channels, packed, *kernel), **{name: (n,) for name, n in counts.items() if n}}


def expand_scale(scale: Tensor, spec: QuantSpec, shape: Sequence[int]) -> Tensor:
    """Stored weight scales (or zero points) in a shape that broadcasts with the weight [o, i, *k]."""
    out_channels, in_channels, *kernel = shape
    ones = [1] * len(kernel)
    if spec.granularity == "tensor":
        return scale.reshape(1, 1, *ones)
    if spec.granularity == "channel":
        return scale.reshape(out_channels, 1, *ones)
    assert spec.group_size is not None
    groups = scale.reshape(out_channels, -1).repeat_interleave(spec.group_size, dim=1)[:, :in_channels]
    return groups.reshape(out_channels, in_channels, *ones)


def rows_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The weight [o, i, *k] with one row per scale, [scales, values]: what a search over scales looks at.

    The last group of a row is padded with zeros if `i` is no multiple of the group size: zeros are on every grid.
    """
    if spec.granularity == "tensor":
        return weight.reshape(1, -1)
    if spec.granularity == "channel":
        return weight.flatten(1)
    assert spec.group_size is not None
    size = spec.group_size
    channels_last = weight.movedim(1, -1)
    padded = torch.nn.functional.pad(channels_last, (0, -weight.shape[1] % size)).unflatten(-1, (-1, size))
    return padded.movedim(-2, 1).reshape(weight.shape[0] * padded.shape[-2], -1)


def fake_quantize(x: Tensor, format: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Round ``x`` to ``grid * scale + zero_point`` and stay in float; shapes broadcast.

    Gradients: straight-through to `x` inside the range, zero outside; to the scale by the product rule of the rounded
    value, as LSQ does (the rounding error inside the range, the end of the grid outside).
    """
    shifted = x if zero_point is None else x - zero_point
    rounded = rounding.round_straight_through(shifted / scale, format) * scale
    return rounded if zero_point is None else rounded + zero_point


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


def dequantize(layer: LayerPlan) -> Tensor:
    """The float32 weight [o, i, *k] that the codes stand for."""
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
    return torch.cat(pieces, dim=1)

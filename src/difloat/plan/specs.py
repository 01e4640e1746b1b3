"""Specifications of quantized tensors: the format, what shares a scale, and where the scale comes from, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from difloat.numbers import formats
from difloat.numbers.formats import Format
from difloat.numbers.packing import packed_channels
from difloat.plan import json_fields

MOST_BANDS = 256  # a byte names the band of a row
MOST_IN_A_GROUP = 1 << 16  # input channels; a row is filled up to its groups when scales are laid over it
MOST_VARIANTS = 1024  # weights, input ranges or low-rank pairs of one layer
Granularity = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class QuantSpec:
    """The quantization of one tensor.

    >>> spec = QuantSpec(formats.parse("e2m1"), "group", group_size=32)
    >>> spec.scale_count(out_channels=16, in_channels=64)
    32

    Attributes:
        format: The format whose values are the grid.
        granularity: What shares a scale: the tensor, an output channel (of weights), a token (of activations, which is one
            row along the channel axis), or a group of input channels of one output channel or one token.
        group_size: Input channels per group, which only granularity "group" has.
        online: Whether the scale comes from the data at run time. Then nothing is stored, and the largest magnitude becomes
            the largest value of the grid. With a zero point the smallest value becomes the smallest of the grid as well.
        zero_point: Whether a real offset is added after the grid (``value * scale + zero_point``).
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
        """The spec of `to_json`'s data.

        Raises:
            ValueError: if a field, format or value is unknown.
        """
        optional = ("granularity", "group_size", "online", "zero_point")
        given = json_fields.json_object(data, "quantization spec", ["format"], optional)
        size = given.get("group_size")
        granularity = json_fields.text(given.get("granularity", "tensor"), "granularity")
        return QuantSpec(
            formats.parse(json_fields.text(given["format"], "format")),
            granularity,  # type: ignore[arg-type]  # checked there
            None if size is None else json_fields.whole_number(size, "group_size", 1, MOST_IN_A_GROUP),
            json_fields.flag(given.get("online", False), "online"),
            json_fields.flag(given.get("zero_point", False), "zero_point"),
        )

    def scale_count(self, out_channels: int, in_channels: int) -> int:
        """The number of scales that a weight of this shape stores."""
        if self.granularity == "tensor":
            return 1
        return out_channels * (-(-in_channels // self.group_size) if self.group_size else 1)


def _check_activation(spec: QuantSpec) -> None:
    if spec.format.levels:
        raise ValueError(
            f"activation format must not be a table, got {spec.format.name}; tables are for weights"
        )
    if spec.granularity == "channel":
        raise ValueError("activation granularity must be 'tensor', 'token' or 'group', got 'channel'")
    if spec.granularity == "group" and not spec.online:
        raise ValueError(
            "activation granularity 'group' must be online, since tokens are not known beforehand"
        )


@dataclass(frozen=True)
class Part:
    """A run of input channels of one layer with its own formats. With an `activation` of None the input stays as it is.

    >>> Part(64, QuantSpec(formats.parse("e2m1")), QuantSpec(formats.parse("e4m3"), "token", online=True)).channels
    64
    """

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
        json_fields.json_object(data, "part of a layer", ["channels", "weight"], ["activation"])
        activation = data.get("activation")
        return Part(
            json_fields.whole_number(data["channels"], "channels of a part"),
            QuantSpec.from_json(data["weight"]),
            None if activation is None else QuantSpec.from_json(activation),
        )


@dataclass(frozen=True)
class Band:
    """Rows (output channels) of one layer with their own weight formats, in a layer whose rows have several widths.

    Attributes:
        rows: The number of rows.
        weights: The spec of the weight in every part of the layer.
    """

    rows: int
    weights: tuple[QuantSpec, ...]

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.weights:
            raise ValueError(f"a band must have rows and a weight spec per part, got {self.rows} rows")

    def parts(self, of_layer: Sequence[Part]) -> tuple[Part, ...]:
        """The layer's parts with the weight specs of these rows, and the layer's channels and activations."""
        pairs = zip(of_layer, self.weights, strict=True)
        return tuple(replace(part, weight=weight) for part, weight in pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return {"rows": self.rows, "weights": [spec.to_json() for spec in self.weights]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Band:
        """Inverse of `to_json`; ValueError on missing or unknown fields."""
        json_fields.json_object(data, "band of rows", ["rows", "weights"])
        weights = json_fields.entries(data["weights"], "weights of a band")
        return Band(
            json_fields.whole_number(data["rows"], "rows of a band"), tuple(map(QuantSpec.from_json, weights))
        )


def schedule_of(value: Any, what: str) -> tuple[int, ...]:
    """The schedule in a JSON value: the number of the variant for each entry of a plan's timesteps.

    Raises:
        ValueError: if the value is no list of small whole numbers.
    """
    return tuple(
        json_fields.whole_number(entry, f"entry of the {what}", 0, MOST_VARIANTS - 1)
        for entry in json_fields.entries(value, what)
    )


SIDE = ("side_down", "side_up")  # what a side branch stores, one pair after the other


@dataclass(frozen=True)
class Side:
    """Low-rank pairs beside the packed weight of a layer, which add ``up (down x)`` of the unrounded input.

    Attributes:
        rank: The rank of every pair.
        schedule: The number of the pair for each entry of the plan's timesteps, or empty with one pair.
    """

    rank: int
    schedule: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.rank - 1, *self.schedule)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(
                f"a side branch must have a rank of at least 1 and a schedule of pairs, got {self.rank!r:.80} and "
                f"{self.schedule!r:.80}"
            )

    @property
    def pairs(self) -> int:
        """The number of pairs that are stored."""
        return max(self.schedule, default=0) + 1

    def tensor_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored factors for a weight [o, i, *k]. Pairs follow each other along the first axis."""
        out_channels, *inner = shape
        shapes = (self.pairs * self.rank, *inner), (self.pairs * out_channels, self.rank)
        return dict(zip(SIDE, shapes, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return {"rank": self.rank} | ({"schedule": list(self.schedule)} if self.schedule else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Side:
        """Inverse of `to_json`; ValueError on missing or unknown fields."""
        json_fields.json_object(data, "side branch", ["rank"], ["schedule"])
        return Side(
            json_fields.whole_number(data["rank"], "rank of a side branch"),
            schedule_of(data.get("schedule", ()), "schedule of a side branch"),
        )


def rows_of_parts(out_channels: int, parts: Sequence[Part], bands: Sequence[Band] = ()) -> list[Band]:
    """The bands of a layer, which is one with all rows if all have the same formats."""
    return list(bands) or [Band(out_channels, tuple(part.weight for part in parts))]


def layer_tensor_shapes(
    shape: Sequence[int],
    parts: Sequence[Part],
    variants: int = 1,
    smoothed: bool = False,
    entries: int = 1,
    bands: Sequence[Band] = (),
    side: Side | None = None,
) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors of a layer whose float weight has a shape [o, i, *k].

    >>> layer_tensor_shapes((16, 64), [Part(64, QuantSpec(formats.parse("e2m1"), "channel"))])
    {'weight': (16, 32), 'weight_scale': (16,)}

    Raises:
        ValueError: if the parts do not add up to the input channels, or the bands to the output channels.
    """
    out_channels, in_channels, *kernel = shape
    if sum(part.channels for part in parts) != in_channels:
        raise ValueError(
            f"parts must add up to {in_channels} input channels, got {[p.channels for p in parts]}"
        )
    _check_bands(out_channels, parts, bands)
    packed = scales = zeros = 0
    for band in rows_of_parts(out_channels, parts, bands):
        own = band.parts(parts)
        packed += band.rows * sum(packed_channels(part.channels, part.weight.format.bits) for part in own)
        counts = [part.weight.scale_count(band.rows, part.channels) for part in own]
        scales += sum(counts)
        zeros += sum(n for n, part in zip(counts, own, strict=True) if part.weight.zero_point)
    activations = [part.activation for part in parts if part.activation is not None]
    counts_by_name = {
        "weight_scale": scales * variants,
        "weight_zero_point": zeros * variants,
        "input_scale": sum(not spec.online for spec in activations) * entries,
        "input_zero_point": sum(spec.zero_point and not spec.online for spec in activations) * entries,
        "input_factor": in_channels * variants if smoothed else 0,
        "row_band": out_channels if bands else 0,
    }
    # Rows of several widths make no rectangle: they lie one after the other along the second axis.
    weight = (variants, packed) if bands else (variants * out_channels, packed // out_channels)
    shapes = {"weight": (*weight, *kernel), **{name: (n,) for name, n in counts_by_name.items() if n}}
    return shapes if side is None else shapes | side.tensor_shapes(shape)


def _check_bands(out_channels: int, parts: Sequence[Part], bands: Sequence[Band]) -> None:
    if not bands:
        return
    if sum(band.rows for band in bands) != out_channels or not 2 <= len(bands) <= MOST_BANDS:
        raise ValueError(
            f"2 to {MOST_BANDS} bands must add up to {out_channels} rows, got {[band.rows for band in bands]!r:.80}"
        )
    if any(len(band.weights) != len(parts) for band in bands):
        raise ValueError(
            f"every band must have a weight spec for each of the {len(parts)} parts, got another number"
        )
    if bands[0].weights != tuple(part.weight for part in parts):
        raise ValueError("weight specs of the parts must be those of the first band, got others")


def weight_formats(out_channels: int, parts: Sequence[Part], bands: Sequence[Band] = ()) -> str:
    """The names of a layer's weight formats, like "e2m1 + int8" for two parts, "uint1/uint2" for rows of two widths."""
    found = rows_of_parts(out_channels, parts, bands)
    names = [
        "/".join(dict.fromkeys(band.weights[n].format.name for band in found)) for n in range(len(parts))
    ]
    return " + ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class AttentionPlan:
    """The quantization inside one attention. Nothing is stored, since all scales come from the data or the grid.

    >>> AttentionPlan(operand=formats.parse("int8"), softmax=formats.parse("uint8")).to_json()
    {'operand': 'int8', 'softmax': 'uint8'}

    Attributes:
        operand: The grid of query, key and value after the heads are split, with one online scale per token and head. None
            leaves them unrounded.
        softmax: The unsigned grid of the attention map, whose largest value stands for 1. None leaves the map unrounded.
    """

    operand: Format | None = None
    softmax: Format | None = None

    def __post_init__(self) -> None:
        if self.operand is None and self.softmax is None:
            raise ValueError("an attention plan must quantize its operands or its map, got neither")
        if self.softmax is not None and self.softmax.min < 0:
            raise ValueError(f"grid of an attention map must be unsigned, got {self.softmax.name}")

    def to_json(self) -> dict[str, str]:
        """The names of the grids that are there."""
        grids = {"operand": self.operand, "softmax": self.softmax}
        return {name: grid.name for name, grid in grids.items() if grid is not None}

    @staticmethod
    def from_json(data: Mapping[str, str]) -> AttentionPlan:
        """The plan of `to_json`'s data.

        Raises:
            ValueError: if a field or format is unknown.
        """
        json_fields.json_object(data, "attention plan", [], ["operand", "softmax"])
        return AttentionPlan(
            **{name: formats.parse(json_fields.text(grid, name)) for name, grid in data.items()}
        )

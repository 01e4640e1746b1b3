"""Specifications of quantized tensors: the format, what shares a scale, and where the scale comes from, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer
from torch import Tensor

from difloat.numbers import formats, hadamard
from difloat.numbers.formats import Format
from difloat.numbers.packing import packed_channels
from difloat.plan.validation import LARGEST, LISTED, OPTIONAL, Rule, plain, record

MOST_BANDS = 256  # a byte names the band of a row
MOST_IN_A_GROUP = 1 << 16  # input channels; a row is filled up to its groups when scales are laid over it
MOST_VARIANTS = 1024  # weights, input ranges or low-rank pairs of one layer
Granularity = Literal["tensor", "channel", "group", "token"]


def _grid(name: Any) -> Any:
    return formats.parse(name) if isinstance(name, str) else name


Grid = Annotated[
    InstanceOf[Format],
    BeforeValidator(_grid),
    PlainSerializer(lambda format: format.name, return_type=str),
    Rule("be text"),
]
Schedule = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_VARIANTS - 1)], ...], LISTED]


@record("quantization spec")
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

    format: Grid
    granularity: Granularity = "tensor"
    group_size: Annotated[Annotated[int, Field(ge=1, le=MOST_IN_A_GROUP)] | None, OPTIONAL] = None
    online: Annotated[bool, OPTIONAL] = False
    zero_point: Annotated[bool, OPTIONAL] = False

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size must be given exactly with granularity 'group', got {self.group_size!r}"
            )
        if self.granularity == "token" and not self.online:
            raise ValueError("granularity 'token' must be online, since tokens are not known beforehand")

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


@record("part of a layer")
class Part:
    """A run of input channels of one layer with its own formats. With an `activation` of None the input stays as it is.

    >>> Part(64, QuantSpec(formats.parse("e2m1")), QuantSpec(formats.parse("e4m3"), "token", online=True)).channels
    64
    """

    channels: Annotated[int, Field(ge=1, le=LARGEST, title="channels of a part")]
    weight: QuantSpec
    activation: Annotated[QuantSpec | None, OPTIONAL] = None

    def __post_init__(self) -> None:
        if self.weight.online or self.weight.granularity == "token":
            raise ValueError(f"weight scales must be stored, got an online spec {plain(self.weight)}")
        if self.activation is not None:
            _check_activation(self.activation)


@record("band of rows")
class Band:
    """Rows (output channels) of one layer with their own weight formats, in a layer whose rows have several widths.

    Attributes:
        rows: The number of rows.
        weights: The spec of the weight in every part of the layer.
    """

    rows: Annotated[int, Field(ge=1, le=LARGEST, title="rows of a band")]
    weights: Annotated[tuple[QuantSpec, ...], LISTED, Field(title="weights of a band")]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"a band must have rows and a weight spec per part, got {self.rows} rows")

    def parts(self, of_layer: Sequence[Part]) -> tuple[Part, ...]:
        """The layer's parts with the weight specs of these rows, and the layer's channels and activations."""
        pairs = zip(of_layer, self.weights, strict=True)
        return tuple(replace(part, weight=weight) for part, weight in pairs)


SIDE = ("side_down", "side_up")  # what a side branch stores, one pair after the other


@record("side branch")
class Side:
    """Low-rank pairs beside the packed weight of a layer, which add ``up (down x)`` of the unrounded input.

    Attributes:
        rank: The rank of every pair.
        schedule: The number of the pair for each entry of the plan's timesteps, or empty with one pair.
    """

    rank: Annotated[int, Field(ge=1, le=LARGEST, title="rank of a side branch")]
    schedule: Annotated[Schedule, OPTIONAL, Field(title="schedule of a side branch")] = ()

    @property
    def pairs(self) -> int:
        """The number of pairs that are stored."""
        return max(self.schedule, default=0) + 1

    def tensor_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored factors for a weight [o, i, *k]. Pairs follow each other along the first axis."""
        out_channels, *inner = shape
        shapes = (self.pairs * self.rank, *inner), (self.pairs * out_channels, self.rank)
        return dict(zip(SIDE, shapes, strict=True))


@record("rotation")
class Rotation:
    """The rotation of a linear layer's input, which its stored weight undoes (`numbers.hadamard`).

    >>> plain(Rotation(128, seed=3))
    {'block': 128, 'seed': 3}

    Attributes:
        block: The number of neighbouring channels that are mixed, a power of two.
        seed: The seed of the channels' signs and of their permutation.
        permuted: Whether channels are permuted before they are cut into blocks.
        regular: Whether the regular Hadamard matrix of a power of four takes the place of signs, as in ComfyUI's files.
    """

    block: Annotated[int, Field(ge=2, le=MOST_IN_A_GROUP, title="block of a rotation")]
    seed: Annotated[int, OPTIONAL, Field(ge=0, lt=1 << 31, title="seed of a rotation")] = 0
    permuted: Annotated[bool, OPTIONAL] = False
    regular: Annotated[bool, OPTIONAL] = False

    def __post_init__(self) -> None:
        if self.block & (self.block - 1) or (self.regular and self.block.bit_length() % 2 == 0):
            kind = "four where it is regular" if self.regular else "two"
            raise ValueError(f"block of a rotation must be a power of {kind}, got {self.block}")
        if self.regular and (self.seed or self.permuted):
            raise ValueError("a regular rotation must have neither seed nor permutation, got one")

    def forward(self, x: Tensor) -> Tensor:
        """The rotated input or weight [..., i], in float32."""
        return hadamard.rotate(x, self.block, None if self.regular else self.seed, self.permuted)

    def backward(self, x: Tensor) -> Tensor:
        """The inverse of `forward`, in float32."""
        return hadamard.rotate_back(x, self.block, None if self.regular else self.seed, self.permuted)


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


@record("attention plan")
class AttentionPlan:
    """The quantization inside one attention. Nothing is stored, since all scales come from the data or the grid.

    >>> plain(AttentionPlan(operand=formats.parse("int8"), softmax=formats.parse("uint8")))
    {'operand': 'int8', 'softmax': 'uint8'}

    Attributes:
        operand: The grid of query, key and value after the heads are split, with one online scale per token and head. None
            leaves them unrounded.
        softmax: The unsigned grid of the attention map, whose largest value stands for 1. None leaves the map unrounded.
    """

    operand: Annotated[Grid | None, OPTIONAL] = None
    softmax: Annotated[Grid | None, OPTIONAL] = None

    def __post_init__(self) -> None:
        if self.operand is None and self.softmax is None:
            raise ValueError("an attention plan must quantize its operands or its map, got neither")
        if self.softmax is not None and self.softmax.min < 0:
            raise ValueError(f"grid of an attention map must be unsigned, got {self.softmax.name}")

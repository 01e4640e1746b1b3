"""The packed weight of a layer: rectangles of codes with their scales, and where flat vectors hold each of them.

A `Weight` is a grid of rectangles: runs of input channels (*parts*, as a skip concatenation feeds two distributions into one
layer) times runs of output channels (*bands*, where rows have several widths). Files and `state_dict` hold flat vectors.
`Layout` alone knows where they hold what, and everybody else asks for pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from difloat.numbers.packing import packed_channels
from difloat.plan.specs import Band, Part, QuantSpec, rows_of_parts
from difloat.plan.validation import plain, read


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One rectangle of a weight, which has some of its output channels (rows) and some of its input channels.

    Attributes:
        codes: uint8 [o, bytes, *k], as `packing.pack` lays them out. Rows may be apart.
        scale: float32, as many as the weight spec of the part asks for.
        zero_point: float32, as many as there are scales. None without zero points.
        part: Channels, formats and granularities. Its activation is that of the input channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    part: Part

    @property
    def spec(self) -> QuantSpec:
        """The format and granularity of the weight."""
        return self.part.weight

    @property
    def rows(self) -> int:
        """The number of output channels."""
        return self.codes.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [o, i, *k] of the float weight."""
        return (self.codes.shape[0], self.part.channels, *self.codes.shape[2:])


@dataclass(frozen=True, eq=False)
class Inputs:
    """The stored scale and zero point of the input of one part, float32 [1] where they are static, else None."""

    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Branch:
    """A low-rank pair, which adds ``up (down x)`` of the unrounded input, with `down` [r, i, *k] and `up` [o, r]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class Weight:
    """The packed weight of a layer.

    Attributes:
        columns: The rectangles of every part, band after band. There is one where all rows have one width.
        row_band: uint8 [o], the band of every output channel, or None with one band. The rows of a band keep their order.
        branch: The low-rank pair beside the weight, or None.
        texts: The text that `parts_text` makes of every part's rectangles. It is made where it is left out.
    """

    columns: tuple[tuple[PackedWeight, ...], ...]
    row_band: Tensor | None = None
    branch: Branch | None = None
    texts: tuple[str, ...] = ()

    def pieces(self) -> Iterator[PackedWeight]:
        """All rectangles, part after part, and within a part band after band."""
        return (piece for column in self.columns for piece in column)

    def parts(self) -> list[Weight]:
        """The weight of every part by itself, without the branch, or the weight itself if it has one part and no branch."""
        if len(self.columns) == 1 and self.branch is None:
            return [self]
        texts: Sequence[str] = self.texts or [""] * len(self.columns)
        return [
            Weight((column,), self.row_band, None, (text,) if text else ())
            for column, text in zip(self.columns, texts, strict=True)
        ]

    @property
    def bands(self) -> tuple[PackedWeight, ...]:
        """The rectangles of the first part, which for a backend is the only one."""
        return self.columns[0]

    @property
    def part(self) -> Part:
        """The first part, whose channels and activation are the same in all bands."""
        return self.columns[0][0].part

    @property
    def text(self) -> str:
        """The first part as operators take it."""
        return self.texts[0] if self.texts else parts_text(tuple(piece.part for piece in self.bands))

    @property
    def out_channels(self) -> int:
        """The number of output channels of all bands together."""
        return sum(piece.codes.shape[0] for piece in self.columns[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of the kernel's axes, which a linear layer does not have."""
        return tuple(self.columns[0][0].codes.shape[2:])


@cache
def parts_text(parts: tuple[Part, ...]) -> str:
    """One part of a layer in all bands of rows, as the string that operators take."""
    return json.dumps([plain(part) for part in parts])


@cache
def parts_of(text: str) -> tuple[Part, ...]:
    """Inverse of `parts_text`."""
    return tuple(read(Part, data) for data in json.loads(text))


@dataclass(frozen=True)
class Place:
    """The place of one rectangle in flat vectors.

    Attributes:
        part: Channels, formats and granularities.
        rows: The number of output channels.
        stretch: The band's bytes along axis 1 of a weight whose rows have several widths, or None where all are alike.
        columns: The bytes within a row.
        scale: The entries of ``weight_scale``.
        zero_point: The entries of ``weight_zero_point``, or None.
    """

    part: Part
    rows: int
    stretch: slice | None
    columns: slice
    scale: slice
    zero_point: slice | None


@dataclass(frozen=True)
class Layout:
    """The places of all rectangles in the flat vectors of one variant of a layer.

    Attributes:
        places: The places of every part, band after band.
        inputs: The entries of ``input_scale`` and ``input_zero_point`` of every part, or None where there are none.
        texts: The text of every part, as operators take it.
    """

    places: tuple[tuple[Place, ...], ...]
    inputs: tuple[tuple[slice | None, slice | None], ...]
    texts: tuple[str, ...]

    def weight(self, tensors: Mapping[str, Tensor], branch: Branch | None = None) -> Weight:
        """The weight as views of flat vectors."""
        columns = tuple([tuple([_piece(place, tensors) for place in column]) for column in self.places])
        return Weight(columns, tensors.get("row_band"), branch, self.texts)

    def stored_inputs(self, tensors: Mapping[str, Tensor]) -> tuple[Inputs, ...]:
        """The scales and zero points of the inputs, part after part, as views."""
        return tuple(
            [
                Inputs(
                    None if scale is None else tensors["input_scale"][scale],
                    None if zero is None else tensors["input_zero_point"][zero],
                )
                for scale, zero in self.inputs
            ]
        )


def _piece(place: Place, tensors: Mapping[str, Tensor]) -> PackedWeight:
    codes = tensors["weight"]
    if place.stretch is not None:
        codes = codes[0, place.stretch].unflatten(0, (place.rows, -1))
    zero = None if place.zero_point is None else tensors["weight_zero_point"][place.zero_point]
    return PackedWeight(codes[:, place.columns], tensors["weight_scale"][place.scale], zero, place.part)


@cache
def layout(out_channels: int, parts: tuple[Part, ...], bands: tuple[Band, ...] = ()) -> Layout:
    """The layout of a layer with these parts and bands, in the order that `LayerPlan` describes."""
    places: list[list[Place]] = [[] for _ in parts]
    at = scales = zeros = 0
    for band in rows_of_parts(out_channels, parts, bands):
        own = band.parts(parts)
        widths = [packed_channels(part.channels, part.weight.format.bits) for part in own]
        stretch = slice(at, at + band.rows * sum(widths))
        column = 0
        for part, width, of_part in zip(own, widths, places, strict=True):
            count = part.weight.scale_count(band.rows, part.channels)
            shift = slice(zeros, zeros + count) if part.weight.zero_point else None
            within = slice(column, column + width)
            of_part.append(
                Place(
                    part, band.rows, stretch if bands else None, within, slice(scales, scales + count), shift
                )
            )
            column, scales, zeros = column + width, scales + count, zeros + (count if shift else 0)
        at = stretch.stop
    texts = tuple(parts_text(tuple(place.part for place in column)) for column in places)
    return Layout(tuple(map(tuple, places)), _input_entries(parts), texts)


def _input_entries(parts: Sequence[Part]) -> tuple[tuple[slice | None, slice | None], ...]:
    entries, scales, zeros = [], 0, 0
    for part in parts:
        static = part.activation is not None and not part.activation.online
        shifted = static and part.activation is not None and part.activation.zero_point
        entries.append(
            (slice(scales, scales + 1) if static else None, slice(zeros, zeros + 1) if shifted else None)
        )
        scales, zeros = scales + static, zeros + shifted
    return tuple(entries)


def pack(weight: Weight) -> dict[str, Tensor]:
    """The flat vectors of a weight by name, of which `Layout.weight` makes the weight again."""
    bands = list(zip(*weight.columns, strict=True))  # of every band its pieces, part after part
    # Bytes of all parts of a row lie side by side, [rows, bytes, *k].
    rows = [torch.cat([piece.codes for piece in band], dim=1) for band in bands]
    scales = [piece.scale.reshape(-1).float() for band in bands for piece in band]
    zeros = [
        piece.zero_point.reshape(-1).float()
        for band in bands
        for piece in band
        if piece.zero_point is not None
    ]
    several = weight.row_band is not None
    tensors = {"weight": torch.cat([row.flatten(0, 1) for row in rows])[None] if several else rows[0]}
    tensors["weight_scale"] = torch.cat(scales)
    if zeros:
        tensors["weight_zero_point"] = torch.cat(zeros)
    if weight.row_band is not None:
        tensors["row_band"] = weight.row_band
    return tensors


def with_rows(piece: PackedWeight, rows: Tensor) -> PackedWeight:
    """A rectangle with its rows in another order, int64 [o]."""

    def reordered(vector: Tensor) -> Tensor:
        return vector if len(vector) == 1 else vector.unflatten(0, (len(rows), -1))[rows].flatten()

    zero = piece.zero_point
    return replace(
        piece,
        codes=piece.codes[rows],
        scale=reordered(piece.scale),
        zero_point=None if zero is None else reordered(zero),
    )

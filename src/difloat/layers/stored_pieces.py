"""Where a layer's stored tensors hold what belongs to each of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difloat.kernels import operators, row_operators
from difloat.numbers.packing import packed_channels
from difloat.plan.specs import Band, Part

VECTORS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


@dataclass(frozen=True)
class Slot:
    """Where a layer keeps what belongs to one of its parts.

    Attributes:
        channels: Input channels of the part.
        text: The part as the operators take it.
        columns: Of the packed weight.
        vectors: Entries of each of the `VECTORS`; None where the part has none.
    """

    channels: int
    text: str
    columns: slice
    vectors: tuple[slice | None, ...]


@dataclass(frozen=True)
class BandSlot:
    """Where a layer with rows of several widths keeps what belongs to one of its parts in one band.

    Attributes:
        rows: How many.
        stretch: The band's bytes along axis 1 of the packed weight, all parts.
        slot: The part; its columns count within a row of the band.
    """

    rows: int
    stretch: slice
    slot: Slot


@dataclass(frozen=True)
class RowSlot:
    """Where a layer with rows of several widths keeps what belongs to one of its parts.

    Attributes:
        channels: Input channels of the part.
        text: The part in all bands as the operators take it.
        bands: In the order of their storage.
    """

    channels: int
    text: str
    bands: tuple[BandSlot, ...]


def slots_of(
    out_channels: int, parts: tuple[Part, ...], weight_vectors: Sequence[int] = (0, 0)
) -> tuple[Slot, ...]:
    """The slots of rows with so many output channels, part by part; their scales and zero points start at `weight_vectors`."""
    ends = [0, *weight_vectors, 0, 0]
    slots = []
    for part in parts:
        scales = part.weight.scale_count(out_channels, part.channels)
        static = part.activation is not None and not part.activation.online
        lengths = (
            packed_channels(part.channels, part.weight.format.bits),
            scales,
            scales * part.weight.zero_point,
            int(static),
            int(static and part.activation is not None and part.activation.zero_point),
        )
        columns, *vectors = (slice(end, end + n) if n else None for end, n in zip(ends, lengths, strict=True))
        assert columns is not None
        slots.append(Slot(part.channels, operators.part_text(part), columns, tuple(vectors)))
        ends = [end + n for end, n in zip(ends, lengths, strict=True)]
    return tuple(slots)


def row_slots_of(parts: tuple[Part, ...], bands: tuple[Band, ...]) -> tuple[RowSlot, ...]:
    """The slots of a layer with rows of several widths, part by part."""
    at, scales, zeros = 0, 0, 0
    found: list[list[BandSlot]] = [[] for _ in parts]
    for band in bands:
        own = band.parts(parts)
        slots = slots_of(band.rows, own, (scales, zeros))
        stretch = slice(at, at + band.rows * slots[-1].columns.stop)
        for slot, of_part in zip(slots, found, strict=True):
            of_part.append(BandSlot(band.rows, stretch, slot))
        counts = [part.weight.scale_count(band.rows, part.channels) for part in own]
        at, scales = stretch.stop, scales + sum(counts)
        zeros += sum(n for n, part in zip(counts, own, strict=True) if part.weight.zero_point)
    texts = [row_operators.parts_text(tuple(b.parts(parts)[n] for b in bands)) for n in range(len(parts))]
    return tuple(
        RowSlot(part.channels, text, tuple(of_part))
        for part, text, of_part in zip(parts, texts, found, strict=True)
    )

"""Where a layer's stored tensors hold what belongs to each of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from difloat.kernels import ops
from difloat.packing import packed_channels
from difloat.specs import Part

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


def slots_of(out_channels: int, parts: tuple[Part, ...]) -> tuple[Slot, ...]:
    """The slots of a layer with so many output channels, part by part."""
    ends = [0] * (1 + len(VECTORS))
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
        slots.append(Slot(part.channels, ops.part_text(part), columns, tuple(vectors)))
        ends = [end + n for end, n in zip(ends, lengths, strict=True)]
    return tuple(slots)

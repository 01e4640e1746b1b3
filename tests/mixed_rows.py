"""Layers whose rows have several widths, for tests: random weights, bands and orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difloat.numbers.formats import parse
from difloat.plan.encode import join_rows, join_variants, plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import rows_of
from difloat.plan.specs import Part, QuantSpec

TOKEN = QuantSpec(parse("int8"), "token", online=True)
STATIC = QuantSpec(parse("uint8"), zero_point=True)


@dataclass(frozen=True)
class Mixed:
    """A joined layer, the ordinary layers of its bands, and the float row that each of their rows is."""

    joined: LayerPlan
    bands: list[LayerPlan]
    order: Tensor


def spec_of(name: str, granularity: str = "channel", group_size: int | None = None) -> QuantSpec:
    """A weight spec, with a zero point where the format has no sign."""
    format = parse(name)
    return QuantSpec(format, granularity, group_size, zero_point=not format.signed)


def band_of(weight: Tensor, parts: Sequence[Part]) -> LayerPlan:
    """An ordinary layer with plain largest-magnitude scales; static inputs reach from about -3 to 3."""
    scales, zeros = [], []
    for piece, part in zip(weight.split([part.channels for part in parts], dim=1), parts, strict=True):
        rows, spec = rows_of(piece, part.weight), part.weight
        zero = rows.amin(1) if spec.zero_point else torch.zeros(len(rows))
        scales.append(((rows - zero[:, None]).abs().amax(1) / spec.format.max).clamp_min(1e-3))
        zeros.append(zero)
    static = [part.activation is not None and not part.activation.online for part in parts]
    shifted = [there and part.activation.zero_point for there, part in zip(static, parts, strict=True)]
    return plan_layer(
        weight,
        parts,
        scales,
        weight_zero_points=zeros,
        input_scales=[
            torch.tensor(6 / part.activation.format.max) if there else None
            for there, part in zip(static, parts, strict=True)
        ],
        input_zero_points=[torch.tensor(-3.0) if there else None for there in shifted],
    )


def mixed(
    shape: Sequence[int],
    specs: Sequence[QuantSpec],
    counts: Sequence[int],
    generator: torch.Generator,
    *,
    channels: Sequence[int] = (),
    activation: QuantSpec | None = TOKEN,
    factors: Tensor | None = None,
) -> Mixed:
    """A layer with random weights, whose rows are dealt out to bands at random.

    Args:
        shape: Of the float weight, [o, i, *k].
        specs: Of the weight, per band.
        counts: Rows per band; they add up to o.
        generator: Draws weights and order.
        channels: Of the parts; one part by default.
        activation: Of all parts.
        factors: Of the smoothed input, [i].
    """
    order = torch.randperm(shape[0], generator=generator)
    bands = []
    for spec, count in zip(specs, counts, strict=True):
        weight = torch.randn(count, *shape[1:], generator=generator)
        band = band_of(weight, [Part(n, spec, activation) for n in channels or shape[1:2]])
        bands.append(band if factors is None else join_variants([band], (), factors))
    return Mixed(join_rows(bands, order), bands, order)


def in_bands(
    weight: Tensor, parts: Sequence[Part], names: Sequence[str], factors: Tensor | None = None
) -> LayerPlan:
    """A float weight whose row n is in band ``n % len(names)``, with the channels and activations of `parts`."""
    order = torch.cat([torch.arange(n, len(weight), len(names)) for n in range(len(names))])
    bands = []
    for number, name in enumerate(names):
        own = [replace(part, weight=spec_of(name)) for part in parts]
        rows = weight.detach()[number :: len(names)]
        if factors is not None:
            rows = rows / factors.reshape(1, -1, *[1] * (rows.dim() - 2))
        band = band_of(rows, own)
        bands.append(band if factors is None else join_variants([band], (), factors))
    return join_rows(bands, order)

"""Addition of a change to a packed weight: decode, add, and encode again in the layer's own formats.

A low-bit grid holds little of a small change, because values that move by less than half a step stay where they are. So the
result says how much of the change arrived, and no row gets scales that serve it worse than those it had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difloat import torch_modes
from difloat.numbers import rounding
from difloat.numbers.search import ZERO_POINTS, search
from difloat.plan import encode
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import rows_of
from difloat.plan.specs import SIDE, Part, QuantSpec


@dataclass(frozen=True)
class Changed:
    """A layer whose weight was changed.

    Attributes:
        layer: The changed layer, with the same shape, parts, inputs and schedules.
        share: The share of the change's squared norm that arrived, which is 0 where every weight stayed as it was. It counts
            all variants, as the quantized input sees them (with smoothing factors divided out, and rotated).
    """

    layer: LayerPlan
    share: float


@torch_modes.plain()
@torch.no_grad()
def add_to_weight(layer: LayerPlan, change: Tensor) -> Changed:
    """Add a change [o, i, *k] to the weight of a layer and round it again. Every variant by timestep gets the change.

    Formats and granularities stay. A scale stays as well, unless another one has a lower squared error. A change of zero
    changes nothing.

    Raises:
        ValueError: if the shape is another one, or a value is not finite.
    """
    if tuple(change.shape) != tuple(layer.shape):
        raise ValueError(
            f"change must have the shape of the weight, {list(layer.shape)}, got {list(change.shape)}; "
            "use an adapter of this model"
        )
    if not bool(change.isfinite().all()):
        raise ValueError("change must be finite, got NaN or Inf; the adapter is damaged")
    asked = lost = 0.0
    plans = []
    for number in range(layer.variants):
        variant = layer.variant(number)
        added = change.float().to(variant.tensors["weight"].device)
        if layer.smoothed:
            added = added / variant.tensors["input_factor"].reshape(1, -1, *[1] * (added.dim() - 2))
        added = layer.rotated(added)
        changed, target = _encode(variant, added)
        asked += float(added.square().sum())
        lost += float((encode.stored_values(changed) - target).square().sum())
        plans.append(changed)
    joined = encode.join_variants(plans, layer.schedule)
    beside = {name: layer.tensors[name] for name in SIDE if name in layer.tensors}
    tensors = {**joined.tensors, **beside}
    joined = replace(joined, tensors=tensors, smoothed=layer.smoothed, side=layer.side)
    return Changed(joined, 1 - lost / asked if asked else 1.0)


def _encode(layer: LayerPlan, added: Tensor) -> tuple[LayerPlan, Tensor]:
    """A layer with one variant after the addition, and the weight it should have."""
    if layer.bands:
        order = layer.tensors["row_band"].argsort(stable=True)
        pieces = added[order].split([band.rows for band in layer.bands])
        bands, targets = zip(*map(_encode, layer.split_rows(), pieces), strict=True)
        return encode.join_rows(bands, order), torch.cat(targets)[order.argsort()]
    before = encode.stored_values(layer)
    after = before + added
    scales, zeros = [], []
    pieces = after.split([part.channels for part in layer.parts], dim=1)
    for piece, stored in zip(pieces, layer.weight().pieces(), strict=True):
        old_zero = before.new_zeros(0) if stored.zero_point is None else stored.zero_point
        scale, zero = _scales(piece, stored.spec, stored.scale, old_zero)
        scales.append(scale)
        zeros.append(zero)
    bare = [Part(part.channels, part.weight) for part in layer.parts]
    encoded = encode.plan_layer(after, bare, scales, weight_zero_points=zeros)
    return replace(layer, tensors={**layer.tensors, **encoded.tensors}), after


def _scales(piece: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The old scale and zero point of every row, or the best ones where they have less error."""
    format = spec.format
    rows = rows_of(piece, spec)  # [r, n], one per scale
    # A search moves zero points of unsigned grids only, and needs one where there are negative values.
    if format.signed == spec.zero_point:
        return scale, zero
    real = rows_of(torch.ones_like(piece), spec) > 0  # [r, n], False in a group's padding
    rows = torch.where(real, rows, rows[:, :1])  # a group's padding must not draw the grid towards zero

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        spread, shift = scale[:, None], 0.0 if zero is None else zero[:, None]
        rounded = rounding.round_to((rows - shift) / spread, format) * spread + shift
        return ((rounded - rows).double() * real).square().sum(dim=1)

    found = search(rows, [format], zero_points=ZERO_POINTS if spec.zero_point else None)
    if not spec.zero_point:
        better = error(found.scale, None) < error(scale, None)  # [r]
        return torch.where(better, found.scale, scale), zero
    better = error(found.scale, found.zero_point) < error(scale, zero)
    return torch.where(better, found.scale, scale), torch.where(better, found.zero_point, zero)

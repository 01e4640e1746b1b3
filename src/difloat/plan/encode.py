"""Encoding of a float weight with its scales as the plan of a layer, and joining of such plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from difloat.numbers import packing, rounding
from difloat.plan.plan import _INPUT_SIDE, VARIED, LayerPlan
from difloat.plan.scales import expand_scale, row_places
from difloat.plan.specs import Band, Part, layer_tensor_shapes
from difloat.plan.weight import PackedWeight, Weight, pack, with_rows


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

    >>> from difloat import formats
    >>> from difloat.plan.specs import QuantSpec
    >>> part = Part(4, QuantSpec(formats.parse("e2m1")))
    >>> layer = plan_layer(torch.tensor([[0.1, 0.5, -1.0, 3.0]]), [part], [torch.tensor([0.5])])
    >>> dequantize(layer)
    tensor([[ 0.0000,  0.5000, -1.0000,  3.0000]])

    Args:
        weight: The float weight, [o, i] or [o, i, kh, kw]. Values off the grid are rounded to the nearest.
        parts: The parts of the layer, whose channels add up to i.
        weight_scales: The scales of every part, as many as its spec asks for.
        weight_zero_points: The zero points of every part whose spec has some.
        input_scales: The input scale of every part, or None where the activation is online or not quantized.
        input_zero_points: The zero point of every part's input, or None.

    Raises:
        ValueError: if shapes do not fit.
    """
    shapes = layer_tensor_shapes(weight.shape, parts)
    if not weight.isfinite().all() or not all(
        bool(((scale != 0) if part.weight.format.levels else (scale > 0)).all() and scale.isfinite().all())
        for part, scale in zip(parts, weight_scales, strict=True)
    ):
        raise ValueError(
            "weights must be finite and their scales positive (of tables of either sign), got NaN, Inf or a scale of 0; "
            "repair the weights"
        )
    zero_points = weight_zero_points or [torch.zeros(0)] * len(parts)
    columns = []
    pieces = weight.float().split([part.channels for part in parts], dim=1)
    for piece, part, scale, zero in zip(pieces, parts, weight_scales, zero_points, strict=True):
        shift = zero if part.weight.zero_point else None
        codes = packing.pack(_codes(piece, part, scale, shift), part.weight.format.bits)
        columns.append((PackedWeight(codes, scale, shift, part),))
    tensors = pack(Weight(tuple(columns)))
    for name, given in (("input_scale", input_scales), ("input_zero_point", input_zero_points)):
        if vectors := [vector.reshape(-1).float() for vector in given if vector is not None]:
            tensors[name] = torch.cat(vectors)
    kind: Literal["linear", "conv2d"] = "linear" if weight.dim() == 2 else "conv2d"
    layer = LayerPlan(kind, tuple(weight.shape), tuple(parts), tensors=tensors)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != shapes:
        raise ValueError(f"scales must fit the parts, expected shapes {shapes}, got {got}")
    return layer


def _codes(piece: Tensor, part: Part, scale: Tensor, zero: Tensor | None) -> Tensor:
    shifted = piece if zero is None else piece - expand_scale(zero, part.weight, piece.shape)
    return rounding.encode(shifted / expand_scale(scale, part.weight, piece.shape), part.weight.format)


def join_variants(
    plans: Sequence[LayerPlan], schedule: Sequence[int], factors: Tensor | None = None
) -> LayerPlan:
    """One layer made of its weights for several stretches of the trajectory.

    Args:
        plans: The same layer with different weights. Inputs and specs are those of the first.
        schedule: The number of the weight for every entry of the plan's timesteps, or empty with one weight.
        factors: Positive float [variants, i] that the input is multiplied by, and that the weights are divided by already.

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
    """One layer made of layers with some of its rows (output channels) each, which differ in their weight formats.

    Args:
        bands: Layers of `plan_layer` (or `join_variants`, for smoothed ones) with the same input channels, activations, input
            scales and factors, and one weight. With one band the result is an ordinary layer.
        order: int [o], by which row j of the bands, one after the other, is row ``order[j]`` of the joined layer. Within a
            band the stored rows take the order of the joined layer, so that a byte per row records it.

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
    row_band = torch.arange(len(bands)).repeat_interleave(torch.tensor(counts))[order.argsort()]
    # Of every part its pieces, one per band.
    columns = zip(*[[piece for (piece,) in band.weight().columns] for band in sorted_bands], strict=True)
    on_device = row_band.to(first.tensors["weight"].device, torch.uint8)
    tensors |= pack(Weight(tuple(columns), on_device))
    specs = tuple(Band(n, tuple(p.weight for p in band.parts)) for n, band in zip(counts, bands, strict=True))
    joined = replace(first, shape=(len(order), *first.shape[1:]), tensors=tensors, bands=specs)
    joined.tensor_shapes()  # refuses too many bands
    return joined


def _check_belongs(band: LayerPlan, first: LayerPlan) -> None:
    """Raise a ValueError unless the rows of `band` can be rows of the layer that those of `first` belong to."""

    def inputs(layer: LayerPlan) -> list[object]:
        facts = [(part.channels, part.activation) for part in layer.parts]
        return [layer.kind, layer.shape[1:], facts, layer.smoothed, layer.input_schedule, layer.rotation]

    if band.schedule or band.bands:
        raise ValueError(
            "bands must have one weight of equal rows each, got a joined layer; join variants last"
        )
    shared = [{n: t.tolist() for n, t in b.tensors.items() if n in _INPUT_SIDE} for b in (band, first)]
    if inputs(band) != inputs(first) or shared[0] != shared[1]:
        raise ValueError("bands must read the same input with the same specs, scales and factors, got others")


def _rows_of(layer: LayerPlan, rows: Tensor) -> LayerPlan:
    """The layer with its rows in another order, int64 [o]."""
    weight = layer.weight()
    columns = tuple(tuple(with_rows(piece, rows) for piece in column) for column in weight.columns)
    return replace(layer, tensors={**layer.tensors, **pack(Weight(columns))})


def dequantize(layer: LayerPlan) -> Tensor:
    """The float32 weight [o, i, *k] that the codes stand for. Of several variants it is the first.

    A smoothed layer's weight comes back as the input sees it, with the factors multiplied in, and that of a rotated layer is
    rotated back.
    """
    weight = stored_values(layer)
    if layer.smoothed:
        weight = weight * layer.variant(0).tensors["input_factor"].reshape(1, -1, *[1] * (weight.dim() - 2))
    return weight if layer.rotation is None else layer.rotation.backward(weight)


def stored_values(layer: LayerPlan) -> Tensor:
    """The float32 values [o, i, *k] of the codes themselves, for a smoothed and rotated input."""
    columns, places = [], None
    for column in layer.weight().columns:
        stored = torch.cat([_values(piece) for piece in column])
        if layer.bands:
            places = row_places(layer.tensors["row_band"]) if places is None else places
            stored = stored[places]
        columns.append(stored)
    return torch.cat(columns, dim=1)


def _values(piece: PackedWeight) -> Tensor:
    """The float32 values [o, i, *k] of one rectangle."""
    spec, shape = piece.spec, piece.shape
    codes = packing.unpack(piece.codes, spec.format.bits, piece.part.channels)
    values = rounding.decode(codes, spec.format) * expand_scale(piece.scale, spec, shape)
    return values if piece.zero_point is None else values + expand_scale(piece.zero_point, spec, shape)

"""Arrangements that readers get wrong: order of nibbles, tiled or transposed scales, foreign groups, inverted scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from difloat.interchange.layers import decode
from difloat.interchange.schemes import Scheme, from_tiles, swap_nibbles, tile_shape, to_tiles
from difloat.numbers import packing
from difloat.plan.encode import dequantize

_SATURATED = 0.5  # share of groups that should reach the upper end of the grid; made by absmax, nearly all do
_LARGEST_WEIGHT = 1000.0  # no trained layer has weights beyond it
_CLEARLY = 0.8  # of the spread that the arrangement as stored leaves, for the other one to be the likelier
_WRONG = 0.7  # relative error from which a weight has little to do with the float one


def alone(tensors: Mapping[str, Tensor], scheme: Scheme) -> Iterator[str]:
    """What looks wrong in a layer of the right structure, without the float weight."""
    shape = _shape(tensors["weight"], scheme)
    if scheme.group_size:
        codes = packing.unpack(tensors["weight"].view(torch.uint8), scheme.element.bits, shape[1])
        magnitude = torch.tensor(scheme.element.decode_table).abs()[codes.int()]
        groups = magnitude.unflatten(1, (-1, scheme.group_size)).amax(-1)
        used = groups[groups > 0]
        reaching = float((used > scheme.element.max / 2).float().mean()) if used.numel() else 1.0
        if reaching < _SATURATED:
            yield (
                f"only {reaching:.0%} of the groups reach the upper half of {scheme.element.name}: groups and scales may not "
                f"belong together (another group size, or another order of channels)"
            )
        yield from _order_of_scales(tensors, scheme, shape)
    if scheme.scales == "e4m3" and float(tensors["weight_scale_2"]) > 1:
        yield (
            f"weight_scale_2 is {float(tensors['weight_scale_2']):g}: it may be the inverse, as compressed-tensors stores it"
        )
        return
    largest = float(dequantize(decode(tensors, scheme, shape)).abs().max())
    if largest > _LARGEST_WEIGHT:
        yield f"weights reach {largest:g}: the scale may be inverted or counted twice"


def _order_of_scales(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    """Rows of a trained weight differ in size, so scales of one row are alike; in the wrong order they are not."""
    rows, columns = scheme.groups(shape)
    if rows < 32 or columns < 2:
        return
    stored = tensors["weight_scale"]
    linear = _magnitudes(from_tiles(stored, rows, columns) if scheme.tiled else stored, scheme)
    others = {}
    if tile_shape(rows, columns) == (rows, columns):  # elsewhere the shape tells
        other = stored.reshape(rows, columns) if scheme.tiled else from_tiles(stored, rows, columns)
        order = "in linear order" if scheme.tiled else "in cuBLAS' tiles"
        others[order] = _magnitudes(other, scheme)
    if rows == columns:
        others["transposed"] = linear.T
    for what, scales in others.items():
        if _within_rows(scales) < _CLEARLY * _within_rows(linear):
            yield f"weight_scale may be {what}: read so, scales of one row are more alike"


def _magnitudes(stored: Tensor, scheme: Scheme) -> Tensor:
    """Binary logarithms of stored scales, relative to the tensor's."""
    if scheme.scales == "e8m0":
        return stored.view(torch.uint8).double()
    return stored.double().clamp_min(2.0**-9).log2()


def _within_rows(scales: Tensor) -> float:
    """Share of the variance that is left inside of rows, once columns are taken off."""
    scales = scales - scales.mean(0)
    total = float(scales.square().mean())
    return float((scales - scales.mean(1, keepdim=True)).square().mean()) / total if total > 0 else 1.0


def against(tensors: Mapping[str, Tensor], scheme: Scheme, weight: Tensor) -> Iterator[str]:
    """Errors of a layer whose float weight is known: the arrangement as stored must be the nearest of all."""
    shape = (int(weight.shape[0]), int(weight.shape[1])) if weight.dim() == 2 else (0, 0)
    if scheme.weight_shape(shape) != tuple(tensors["weight"].shape):
        yield f"weight must be of the float layer's shape {list(weight.shape)}, got {list(tensors['weight'].shape)} packed"
        return
    errors = {
        what: _error(variant, scheme, weight)
        for what, variant in {"": dict(tensors), **_variants(tensors, scheme, shape)}.items()
    }
    best = min(errors, key=lambda what: errors[what])
    if best and errors[best] < errors[""] / 2:
        yield (
            f"{best}: read so, the relative error to the float weight is {errors[best]:.3f} instead of {errors['']:.3f}"
        )
    elif errors[""] > _WRONG:
        yield f"weight must be near the float one, got a relative error of {errors['']:.3f} in every arrangement"


def _variants(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> dict[str, dict[str, Tensor]]:
    """The layer as it would be if it was written in another arrangement, by what would be wrong then."""
    found: dict[str, dict[str, Tensor]] = {}
    stored, weight = tensors["weight_scale"], tensors["weight"]
    rows, columns = scheme.groups(shape)
    if scheme.group_size and tile_shape(rows, columns) == (rows, columns):
        linear = (
            to_tiles(stored.reshape(rows, columns)) if scheme.tiled else from_tiles(stored, rows, columns)
        )
        order = "linear order" if scheme.tiled else "cuBLAS' tiles"
        found[f"weight_scale is in {order}"] = {**tensors, "weight_scale": linear}
    if scheme.group_size and not scheme.tiled and rows == columns:
        found["weight_scale is transposed"] = {**tensors, "weight_scale": stored.T.contiguous()}
    if "weight_scale_2" in tensors:
        found["weight_scale_2 is inverted"] = {**tensors, "weight_scale_2": 1 / tensors["weight_scale_2"]}
    if scheme.element.bits == 4:
        swapped = swap_nibbles(weight)
        pairs = {f"{what} and the nibbles are swapped": one for what, one in found.items()}
        found["the nibbles are swapped"] = {**tensors, "weight": swapped}
        found |= {what: {**one, "weight": swapped} for what, one in pairs.items()}
    return found


def _error(tensors: Mapping[str, Tensor], scheme: Scheme, weight: Tensor) -> float:
    """Relative error of the decoded weight."""
    wanted = weight.detach().float()
    found = dequantize(decode(tensors, scheme, (int(wanted.shape[0]), int(wanted.shape[1]))))
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _shape(weight: Tensor, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns as stored, before packing."""
    return int(weight.shape[0]), int(weight.shape[1]) * (2 if scheme.element.bits == 4 else 1)

"""One layer between a plan and a foreign layout, bit for bit: what the layout cannot hold is refused, never rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from difloat.interchange.schemes import E8M0_BIAS, E8M0_NAN, Scheme, from_tiles, swap_nibbles, to_tiles
from difloat.numbers import formats, packing
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part, QuantSpec, Rotation

NEUTRAL_INPUT_SCALE = (
    1.0  # inputs up to 448 * 6 = 2688 fit, those below 2**-10 * 6 of a group's largest vanish
)
_E4M3 = formats.parse("e4m3fn")
_NEIGHBOURS = range(-2, 3)  # units in the last place; a quotient of rounded numbers is off by one or two


def obstacle(layer: LayerPlan, scheme: Scheme) -> str:
    """Why the layout cannot hold the layer without loss and what to do, as the end of "layer L ...", or "" if it can."""
    if problem := obstacle_of_structure(layer) or obstacle_of_rotation(layer, scheme.rotated):
        return problem
    if layer.kind != "linear":
        return "is a convolution; keep it as it is with --exclude"
    part = layer.parts[0]
    if part.weight.zero_point:
        return "has zero points; quantize with another recipe, such as rtn"
    own_inputs = QuantSpec(scheme.element, "token", online=True)
    if scheme.group_size != 0 or part.activation != own_inputs:
        if problem := obstacle_of_inputs(layer):
            return problem
    if problem := _obstacle_of_codes(layer, scheme):
        return problem
    if layer.shape[1] % (scheme.group_size or 1) and scheme.padded_to == 1:
        return f"has {layer.shape[1]} input channels, no multiple of {scheme.group_size}; keep it as it is with --exclude"
    if (scales := _scales_at(layer, scheme)) is None:
        return f"has one scale per {_per(part.weight)}, finer than {_groups(scheme)}; {_advice_on_groups(scheme)}"
    if scheme.scales == "e8m0" and not _is_power_of_two(scales):
        return "has scales that are no powers of two; quantize with --set scale_format=e8m0"
    if scheme.scales == "e4m3" and split_scales(scales) is None:
        return "has scales that are no e4m3 numbers times one float32 number; quantize with --set scale_format=e4m3"
    return ""


def obstacle_of_structure(layer: LayerPlan) -> str:
    """Why no foreign layout holds the layer, or "" if it is a single weight with the same input at all timesteps."""
    if layer.schedule or layer.input_schedule or layer.smoothed:
        return "depends on the timestep or smooths its input; quantize with another recipe, such as auto"
    if layer.bands or layer.side is not None:
        return "has rows of several widths or a branch beside its weight; quantize with another recipe, such as rtn"
    if len(layer.parts) != 1:
        return "has parts with scales of their own; quantize with --set split=false"
    return ""


def obstacle_of_rotation(layer: LayerPlan, block: int = 0) -> str:
    """Why a layout with the regular rotation in such blocks (0 for none) does not hold the layer, or "" if it does."""
    if layer.rotation == (Rotation(block, regular=True) if block else None):
        return ""
    if layer.rotation is None:
        return f"does not rotate its input in blocks of {block}"
    return "rotates its input; quantize without, which is --set rotate=none, or with another recipe"


def obstacle_of_inputs(layer: LayerPlan) -> str:
    """Why a layout that says nothing of inputs does not hold the layer, or "" if it does."""
    activation = layer.parts[0].activation
    if activation is None:
        return ""
    return f"quantizes its input to {activation.format.name}; quantize weights only, like --bits w4a16"


def _obstacle_of_codes(layer: LayerPlan, scheme: Scheme) -> str:
    own, wanted = layer.parts[0].weight.format, scheme.element
    table, kept = torch.tensor(own.decode_table), torch.tensor(wanted.decode_table)
    kinds = [
        (format.bits, format.integer, format.exponent_bits, bool(format.levels)) for format in (own, wanted)
    ]
    if kinds[0] != kinds[1] or not own.signed:
        return f"is on the grid of {own.name}, not {wanted.name}; quantize with --set weight_format={wanted.name}"
    codes = layer.codes()[0].unique().long()
    if not torch.equal(table[codes], kept[codes]):
        largest = float(table[codes].abs().max())
        return (
            f"uses {largest:g}, which {wanted.name} has not; quantize with --set weight_format={wanted.name}"
        )
    return ""


def _per(spec: QuantSpec) -> str:
    return f"{spec.group_size} input channels" if spec.group_size else spec.granularity


def _groups(scheme: Scheme) -> str:
    if scheme.group_size is None:
        return f"the one per tensor of {scheme.name}"
    return f"{scheme.group_size or 'all'} input channels of {scheme.name}"


def _advice_on_groups(scheme: Scheme) -> str:
    if scheme.group_size:
        return f"quantize with --set weight_granularity=group --set group_size={scheme.group_size}"
    return f"quantize with --set weight_granularity={'tensor' if scheme.group_size is None else 'channel'}"


def _scales_at(layer: LayerPlan, scheme: Scheme) -> Tensor | None:
    """The layer's scales [rows, groups] as the layout groups them, without padding. None if the layer's groups are finer."""
    (rows, columns), spec = layer.shape[:2], layer.parts[0].weight
    scale, size = layer.tensors["weight_scale"], spec.group_size or columns
    if spec.granularity == "tensor":
        scale = scale.expand(rows)
    elif scheme.group_size is None:
        return None
    per_row = scale.reshape(rows, -1)
    if scheme.group_size is None:
        return per_row[:1, :1]
    if not scheme.group_size:
        return per_row if per_row.shape[1] == 1 else None
    if size < columns and size % scheme.group_size:
        return None
    first_channels = torch.arange(0, columns, scheme.group_size)  # of every group of the layout
    return per_row[:, first_channels // size]


def _is_power_of_two(scales: Tensor) -> bool:
    mantissa, exponent = torch.frexp(scales)
    return bool((mantissa == 0.5).all() and ((exponent - 1).abs() <= E8M0_BIAS).all())


def split_scales(scales: Tensor, shared_in: torch.dtype = torch.float32) -> tuple[Tensor, Tensor] | None:
    """Positive float32 scales as e4m3 numbers times one float32 number, whose rounded products are exactly the scales.

    Args:
        scales: The scales, of any shape.
        shared_in: The dtype that must hold the one number.

    Returns:
        The e4m3 numbers (dtype float8_e4m3fn, shape of `scales`) and the float32 scalar, or None if there are none.
    """
    largest = scales.max()
    for value in reversed([value for value in _E4M3.values if value > 0]):
        shared = largest / value
        for steps in _NEIGHBOURS:
            candidate = (shared.view(torch.int32) + steps).view(torch.float32)
            if not float(candidate) > 0 or candidate.to(shared_in).float() != candidate:
                continue
            ratio = (scales / candidate).clamp(max=_E4M3.max).to(torch.float8_e4m3fn)
            if torch.equal(ratio.float() * candidate, scales):
                return ratio, candidate.reshape(())
    return None


def encode(layer: LayerPlan, scheme: Scheme, input_scale: float = NEUTRAL_INPUT_SCALE) -> dict[str, Tensor]:
    """The stored tensors of a layer for which there is no `obstacle`, by their names behind the layer's."""
    rows, columns = layer.shape[:2]
    stored_rows, stored_columns = scheme.padded((rows, columns))
    codes = torch.zeros(stored_rows, stored_columns, dtype=torch.uint8)  # padded to the layout's tiles
    codes[:rows, :columns] = layer.codes()[0]
    weight = packing.pack(codes, scheme.element.bits)
    if scheme.high_first:
        weight = swap_nibbles(weight)
    scales = _scales_at(layer, scheme)
    assert scales is not None
    tensors = {"weight": weight.view(scheme.weight_dtype)}
    if scheme.scales == "e4m3":
        found = split_scales(scales)
        assert found is not None
        scales, tensors["weight_scale_2"] = found
    elif scheme.scales == "e8m0":
        scales = (torch.frexp(scales).exponent - 1 + E8M0_BIAS).to(
            torch.uint8
        )  # 2**e is 0.5 * 2**(e + 1) to frexp
    if scheme.group_size and scales.shape != scheme.groups((rows, columns)):
        padded = torch.zeros(scheme.groups((rows, columns)), dtype=torch.uint8)
        padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
        scales = padded.view(scales.dtype)
    if scheme.tiled:
        scales = to_tiles(scales)
    tensors["weight_scale"] = scales.reshape(scheme.scale_shape((rows, columns))).contiguous()
    if scheme.input_scale:
        tensors["input_scale"] = torch.tensor(input_scale)
    return tensors


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> LayerPlan:
    """The layer [o, i] that stored tensors stand for.

    Negative zeros become zeros, and scales of groups that are all zero become positive.

    Args:
        tensors: `weight`, `weight_scale` and perhaps `weight_scale_2`, with the dtypes and shapes of the scheme.
        scheme: The layout.
        shape: The float weight's shape [o, i].

    Raises:
        ValueError: if a value is NaN or infinite, or a scale is zero over values that are not.
    """
    rows, columns = shape
    packed = tensors["weight"].contiguous().view(torch.uint8)
    if scheme.high_first:
        packed = swap_nibbles(packed)
    codes = packing.unpack(packed, scheme.element.bits, columns)[:rows]
    table = torch.tensor(scheme.element.decode_table)  # the value of every code
    if not bool(table[codes.int()].isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinity; download it again")
    codes = torch.where(table[codes.int()] == 0, 0, codes)
    scales = _decoded_scales(tensors, scheme, shape)
    if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
        raise ValueError(
            f"weight_scale must be finite and positive, got {float(scales.min()):g} to {float(scales.max()):g}; "
            "download it again"
        )
    groups = scheme.group_size or columns
    expanded = (
        scales.expand(rows, 1) if scheme.group_size is None else scales[:rows, : math.ceil(columns / groups)]
    )
    empty = (expanded == 0).repeat_interleave(groups, 1)[:, :columns]  # [o, i]
    codes = torch.where(empty, 0, codes).to(torch.uint8)  # whatever is multiplied by zero is zero
    smallest = scales[scales > 0].min() if bool((scales > 0).any()) else torch.tensor(1.0)
    spec = QuantSpec(
        scheme.element,
        "tensor" if scheme.group_size is None else "group" if scheme.group_size else "channel",
        scheme.group_size or None,
    )
    flat = expanded[:1] if scheme.group_size is None else expanded
    stored = {
        "weight": packing.pack(codes, scheme.element.bits),
        "weight_scale": torch.where(flat == 0, smallest, flat).reshape(-1).contiguous(),
    }
    rotation = Rotation(scheme.rotated, regular=True) if scheme.rotated else None
    return LayerPlan("linear", shape, (Part(columns, spec),), rotation=rotation, tensors=stored)


def _decoded_scales(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Float32 scales [rows, groups] in linear order, padding included."""
    stored, groups = tensors["weight_scale"], scheme.groups(shape)
    linear = from_tiles(stored, *groups) if scheme.tiled else stored.reshape(groups)
    if scheme.scales == "float32":
        return linear
    if scheme.scales == "e4m3":
        return linear.float() * tensors["weight_scale_2"].float().reshape(())
    bits = linear.view(torch.uint8)
    exponent = bits.double() - E8M0_BIAS
    return torch.where(bits == E8M0_NAN, torch.nan, torch.exp2(exponent)).float()

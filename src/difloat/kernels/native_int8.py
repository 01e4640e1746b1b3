"""Backend "cpu": the native library reads packed weights as they are stored, and keeps nothing else in memory.

One call quantizes the input, multiplies in integers and writes the result in the input's dtype (``csrc/``, docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from difloat.kernels import integer_operands, native_library, native_prepared
from difloat.kernels.geometry import Geometry
from difloat.plan.specs import Part
from difloat.plan.weight import Inputs, Weight

_GROUP_MULTIPLE = 16  # channels: sums of a group are taken from whole vectors, on every unit


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer whose weight, of this part, has `weight_shape` [o, i, *k]."""
    return (
        x.dtype in native_library.TYPES
        and x.device.type == "cpu"
        and _computes(part, math.prod(weight_shape[1:]))
        and (len(weight_shape) == 2 or x.shape[1] == weight_shape[1])  # no groups of channels
    )


def _computes(part: Part, terms: int) -> bool:
    return (
        integer_operands.reason_against(part) is None
        and integer_operands.sums_fit(part, terms)
        and _divides(part, part.weight.group_size or part.channels)
    )


def _divides(part: Part, size: int) -> bool:
    """Whether groups of channels, those of the weight and those of the input inside them, are made of whole vectors."""
    if size < part.channels and size % _GROUP_MULTIPLE:
        return False
    spec = part.activation
    own = part.channels if spec is None or spec.group_size is None else min(spec.group_size, part.channels)
    if own < part.channels and own % _GROUP_MULTIPLE:
        return False
    ranged = own < part.channels or (spec is not None and spec.online and spec.zero_point)
    return not ranged or size >= part.channels or size % own == 0


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`, from [..., i] to [..., o]."""
    return native_prepared.linear(weight, x.dtype)(x, inputs.scale, inputs.zero_point, bias)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`."""
    call = native_prepared.conv2d(weight, x.dtype, geometry)
    return call(x, inputs.scale, inputs.zero_point, bias)

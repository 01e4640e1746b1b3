"""Backend "mps": Apple's GPU, by operations that torch has there.

Products are those of `torch_int8` where torch multiplies int8 on the device, as it does from 2.15 on, and has an exact product
for the layer. Everything else is decoded and multiplied in the dtype of the input, as the reference does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from difloat.kernels import reference, torch_int8
from difloat.kernels.geometry import Geometry
from difloat.kernels.pieces import shapes
from difloat.plan.specs import Part
from difloat.plan.weight import Inputs, Weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the device has no float64


def available() -> bool:
    """Whether torch sees a GPU of Apple's."""
    return torch.backends.mps.is_available()


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer, which it does for every one on its device."""
    return x.device.type == "mps" and x.dtype in _DTYPES


def _way(weight: Weight, x: Tensor) -> ModuleType:
    bands = zip(weight.bands, shapes(weight), strict=True)
    exact = all(torch_int8.computes(piece.part, shape, x) for piece, shape in bands)
    return torch_int8 if exact else reference


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`, from [..., i] to [..., o]."""
    result: Tensor = _way(weight, x).linear(x, weight, inputs, bias)
    return result


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`."""
    result: Tensor = _way(weight, x).conv2d(x, weight, inputs, bias, geometry)
    return result

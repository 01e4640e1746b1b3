"""The GPU backend: quantized linear layers and convolutions in Triton, exact on FP8 and int8 tensor cores.

A layer takes two launches. One kernel quantizes the input and lays it out (`quantize`), and another multiplies it with the
packed weight (`matmul`). A third adds up where few tokens make several programs share the k axis. `operands` decides which type
of the tensor cores carries the numbers, and `tiles` decides the tiles.

Importing this module neither needs nor imports Triton. `available` says whether a device can use it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from difloat.kernels.geometry import Geometry
from difloat.kernels.pieces import as_stored, restored
from difloat.kernels.triton import operands as triton_operands
from difloat.kernels.triton.operands import Operands
from difloat.plan.specs import Part
from difloat.plan.validation import plain
from difloat.plan.weight import Inputs, Weight

_MOST_PRODUCTS = 2**31 // 128**2  # of int8 numbers whose sum surely fits int32


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which takes tensors of the CPU as well."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether Triton is installed and computes on this device."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.cuda is not None:
        return True
    return "TRITON_INTERPRET" in os.environ and interpreting()


def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability of a device. The interpreter computes all that Hopper can."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether `linear` or `conv2d` computes this part of a layer.

    Args:
        part: The formats and granularities of the part.
        weight_shape: The shape of the float weight, [o, i] or [o, i, kh, kw].
        x: The input, [..., i] or [b, i, h, w].
    """
    if not available(x.device) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if math.prod(weight_shape[1:]) >= _MOST_PRODUCTS:
        return False
    channels = x.shape[1 if len(weight_shape) == 4 else -1]
    if not channels == part.channels == weight_shape[1]:
        return False  # a convolution in groups
    activation = part.activation
    if activation is not None and (
        activation.granularity not in ("tensor", "token") or (activation.online and activation.zero_point)
    ):
        return False
    operands = _operands(part, x)
    if operands is None:
        return False
    # Sums of an input per group are made step by step, and a step is a power of two.
    return not (part.weight.zero_point and operands.group_words & (operands.group_words - 1))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make the device of the tensors the current one, which is where launches go."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _operands(part: Part, x: Tensor, planes: int = 0) -> Operands | None:
    return triton_operands.choose(
        part.weight.format,
        None if part.activation is None else part.activation.format,
        x.dtype,
        capability(x.device),
        group_size=part.weight.group_size or 0,
        planes=planes,
    )


def _required(part: Part, x: Tensor, planes: int = 0) -> Operands:
    operands = _operands(part, x, planes)
    if operands is None:
        raise ValueError(
            f"formats must fit one type of tensor core operands, got {plain(part)} for a {x.dtype} input on "
            f"{x.device}; ask supports() first"
        )
    return operands


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """One part of a linear layer, whose output channels may have several widths. The input is quantized once for all of them.

    Args:
        x: The input [..., i], bfloat16, float16 or float32.
        weight: The weight of one part, such that `supports` holds for every piece. A branch ``(down [r, i], up [o, r])`` in
            the dtype of the input adds ``x @ down.T @ up.T`` of the unrounded input, which is read in the same pass.
        inputs: The scale and zero point of the input where they are static.
        bias: The bias [o], or None.

    Returns:
        [..., o] in the dtype of the input.
    """
    from difloat.kernels.triton import launch

    pieces, bias = weight.bands, as_stored(weight, bias)
    up = None if weight.branch is None else as_stored(weight, weight.branch.up)
    # All pieces read one quantized input, so all take the planes of the widest word.
    planes = max(triton_operands.least_planes(piece.spec.format.bits) for piece in pieces)
    source = launch.rows_source(x.reshape(-1, x.shape[-1]))
    out = x.new_empty((source.tokens, weight.out_channels))
    start, given_inputs = 0, _Quantized(source, inputs)
    with _on(x.device):
        for piece in pieces:
            run, start = slice(start, start + piece.rows), start + piece.rows
            operands = _required(piece.part, x, planes)
            packed = launch.Weight(piece.codes, piece.scale, piece.zero_point, piece.spec)
            branch = None
            if weight.branch is not None and up is not None:
                branch = launch.Adapter(weight.branch.down, up[run])
            if source.tokens == 0:
                continue
            if launch.lies_well(source, operands, packed, branch):
                given = launch.as_it_lies(source, operands)
            else:
                given = given_inputs.of(operands, piece.part, packed, branch)
            own_bias = None if bias is None else bias[run]
            launch.multiply(
                given, operands, packed, piece.part, inputs.zero_point, own_bias, out[:, run], branch
            )
    return restored(weight, out, 1).reshape(*x.shape[:-1], out.shape[1])


class _Quantized:
    """The quantized forms of one call's input, each made once."""

    def __init__(self, source: Any, inputs: Inputs) -> None:
        self.source, self.inputs = source, inputs
        self.made: dict[tuple[Operands | str, int], Any] = {}

    def of(self, operands: Operands, part: Part, weight: Any, branch: Any) -> Any:
        """The input as a piece with these operands needs it."""
        from difloat.kernels.triton import launch

        sum_groups = 0 if weight.zero_point is None else max(1, weight.scale_stride)
        key = (operands.kind, sum_groups)
        if key not in self.made:
            spec, inputs = part.activation, self.inputs
            self.made[key] = launch.quantized(
                self.source, operands, spec, inputs.scale, inputs.zero_point, sum_groups, branch
            )
        return self.made[key]


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """One part of a convolution, as an implicit product: no patches are stored, and the input is quantized once.

    Padding is the number 0, not the zero point.

    Args:
        x: The input [b, i, h, w] in any memory format, of which channels last is the fastest.
        weight: The weight of one part, such that `supports` holds. Codes [o, bytes, kh, kw] that are channels last save a
            copy per call.
        inputs: The scale and zero point of the input where they are static. An online scale "per token" is one per picture.
        bias: The bias [o], or None.
        geometry: Stride, padding and dilation, with one group.

    Returns:
        [b, o, h', w'] in the dtype of the input, channels last.

    Raises:
        ValueError: if there are several groups.
    """
    if geometry.groups != 1:
        raise ValueError(f"groups must be 1, got {geometry.groups}; ask supports() first")
    out = _conv2d_pieces(x, weight, inputs, as_stored(weight, bias), geometry)
    return restored(weight, out, -1).permute(0, 3, 1, 2)


def _conv2d_pieces(
    x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The convolution's result [b, h', w', o] in the order of the stored rows, which the bias has too."""
    from difloat.kernels.triton import launch

    pieces, count = weight.bands, weight.out_channels
    # All pieces read one quantized input, so all take the planes of the widest word.
    planes = max(triton_operands.least_planes(piece.spec.format.bits) for piece in pieces)
    picture = launch.picture_of(x, pieces[0].codes, geometry.stride, geometry.padding, geometry.dilation)
    out = x.new_empty((x.shape[0], picture.out_height, picture.out_width, count))
    if out.numel() == 0:
        return out
    flat, start = out.view(-1, count), 0
    given_inputs = _Quantized(launch.picture_source(x), inputs)
    with _on(x.device):
        for piece in pieces:
            run, start = slice(start, start + piece.rows), start + piece.rows
            operands = _required(piece.part, x, planes)
            taps_first = piece.codes.permute(0, 2, 3, 1).contiguous()
            packed = launch.Weight(taps_first, piece.scale, piece.zero_point, piece.spec)
            given = given_inputs.of(operands, piece.part, packed, None)
            own_bias = None if bias is None else bias[run]
            launch.multiply(
                given, operands, packed, piece.part, inputs.zero_point, own_bias, flat[:, run], None, picture
            )
    return out

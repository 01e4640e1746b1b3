"""The call of a packed layer, prepared once, because choosing a backend and checking tensors costs more than a small layer.

A layer keeps one `Prepared` per dtype, device and class of token counts. A call looks at its input, and at whether the stored
tensors are the same objects at the same addresses. Offloading, loading and moving give others, which are prepared again.
Calls that autograd, a compiler, a tracer or a subclass of tensors must see go through `torch.ops.difloat` instead.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from difloat.kernels import (
    checks,
    dispatch,
    latency,
    native_decode,
    native_int8,
    native_prepared,
    operators,
    rotation,
)
from difloat.kernels.pieces import shapes
from difloat.plan.weight import Layout, Weight

if TYPE_CHECKING:
    from difloat.layers.packed import QuantConv2d, QuantLinear

_BUFFERS = (
    "weight_scale",
    "weight_zero_point",
    "input_scale",
    "input_zero_point",
    "input_factor",
    "row_band",
)


_MOST_KEPT = 16
_PREPARES = {
    native_int8: (native_prepared.linear, native_prepared.conv2d),
    native_decode: (native_decode.prepared_linear, native_decode.prepared_conv2d),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared call of one layer.

    Attributes:
        call: The function that computes the layer, or None where it is computed another way.
        direct: The backend that computes the layer past torch's dispatcher, or None for the general way.
        epoch: The count of changes of the backend (`dispatch.epoch`) at which the call was prepared.
        held: Every stored tensor, as whether it is a parameter, its name, a weak reference to it, and its address.
        bias: Whether the layer had a bias.
        version: The version counter of the order of rows, from which other tensors are derived, or -1 without one.
    """

    call: native_prepared.Call | None
    direct: ModuleType | None
    epoch: int
    held: tuple[tuple[bool, str, Any, int], ...]
    bias: bool
    version: int


def computed(layer: QuantLinear | QuantConv2d, x: Tensor, axis: int) -> Tensor | None:
    """The layer's result without its branch by a prepared call, or None where the general way must be taken.

    Args:
        layer: The layer.
        x: The input of the layer, as it came.
        axis: The axis of the input channels, which is -1 for tokens and 1 for pictures.
    """
    parameters, buffers, kept = layer._parameters, layer._buffers, layer._prepared
    bias = parameters["bias"]
    if kept is None or operators.needs_operator(x, bias):
        return None
    channels, axes = layer.float_shape[1], len(layer.float_shape)
    if x.dim() != axes if axes == 4 else x.dim() < 1:
        return None
    if x.shape[axis] != channels or x.layout is not torch.strided:
        return None  # the general way refuses it in a sentence
    key = (x.dtype, x.device, bisect_right(dispatch.classes(axes), x.numel() // channels))
    prepared = kept.get(key)
    good = (
        prepared is not None
        and prepared.epoch == dispatch.epoch
        and prepared.bias is (bias is not None)
        and (prepared.version < 0 or buffers["row_band"]._version == prepared.version)  # type: ignore[union-attr]
    )
    if good and prepared is not None:
        for is_parameter, name, reference, address in prepared.held:
            tensor = (parameters if is_parameter else buffers).get(name)
            if tensor is None or tensor is not reference() or tensor.data_ptr() != address:
                good = False
                break
    if not good or prepared is None:
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        kept[key] = prepared = prepare(layer, x)
    direct = prepared.direct
    if prepared.call is None and direct is None:
        return None
    if layer.rotation is not None:
        x = rotation.run(x, layer.rotation)
    elif layer.smoothed:
        factor = buffers["input_factor"].to(x.dtype)  # type: ignore[union-attr]
        x = x * (factor if axis == -1 else factor.reshape(-1, 1, 1))
    if prepared.call is None and direct is not None:
        weight, (inputs,) = layer.packed_weight()
        if (geometry := layer.geometry()) is None:
            # The stored tensors were checked when the call was prepared.
            result: Tensor = direct.linear(x, weight, inputs, bias)
            return result
        return operators.run_conv2d(x, weight, inputs, bias, geometry)
    assert prepared.call is not None
    return prepared.call(x, buffers.get("input_scale"), buffers.get("input_zero_point"), bias)


def prepare(layer: QuantLinear | QuantConv2d, x: Tensor) -> Prepared:
    """Check the tensors of a layer and prepare its call for inputs like `x`.

    Raises:
        ValueError: if a stored tensor does not fit.
    """
    buffers, bias = layer._buffers, layer._parameters["bias"]
    row_band = buffers.get("row_band")
    stored: list[tuple[bool, str, Tensor | None]] = [
        (True, "weight", layer._parameters["weight"]),
        (True, "bias", bias),
    ]
    stored += [(False, name, buffers.get(name)) for name in _BUFFERS]
    call, direct = None, None
    if _is_plain(layer, [tensor for _, _, tensor in stored]):
        call, direct = _call(layer, x)
    held = tuple(
        (is_parameter, name, weakref.ref(tensor), tensor.data_ptr())
        for is_parameter, name, tensor in stored
        if tensor is not None
    )
    version = -1 if row_band is None or row_band.is_inference() else row_band._version
    return Prepared(call, direct, dispatch.epoch, held, bias is not None, version)


def _is_plain(layer: QuantLinear | QuantConv2d, stored: list[Tensor | None]) -> bool:
    """Whether a layer can be prepared: nothing depends on the timestep, and tensors count versions."""
    if layer.schedule or layer.input_schedule or layer.input_dtype is not None:
        return False
    if len(layer.float_shape) == 4:
        geometry = layer.geometry()
        if geometry is None or geometry.groups != 1:
            return False
    return not any(tensor is not None and tensor.is_inference() for tensor in stored)


def _call(
    layer: QuantLinear | QuantConv2d, x: Tensor
) -> tuple[native_prepared.Call | None, ModuleType | None]:
    """The call of the native library, or another backend of the CPU that computes a layer of one part."""
    weight, inputs = layer.packed_weight()
    geometry = layer.geometry() if len(layer.float_shape) == 4 else None
    axis = -1 if geometry is None else 1
    factor = layer._buffers.get("input_factor")
    if factor is not None and factor.device != x.device:
        return None, None
    calls: list[native_prepared.Call] = []
    parts = weight.parts()
    pieces = x.split([part.part.channels for part in parts], dim=axis)
    for part, piece, own in zip(parts, pieces, inputs, strict=True):
        bias = None if calls else layer.bias
        if geometry is None:
            checks.linear(piece, part, own, bias)
        else:
            checks.conv2d(piece, part, own, bias, geometry)
        backend = _allowed(dispatch.choose_for(part, piece), part, piece)
        if backend not in _PREPARES:
            # Triton multiplies a branch in the same pass, which is the operator's business, also in the interpreter.
            known = x.device.type == "cpu" and backend is not dispatch.BACKENDS["triton"]
            return None, backend if known and len(parts) == 1 else None
        linear, conv2d = _PREPARES[backend]
        calls.append(linear(part, x.dtype) if geometry is None else conv2d(part, x.dtype, geometry))
    return calls[0] if len(calls) == 1 else _sum(calls, layer.layout, axis), None


def _allowed(backend: ModuleType, part: Weight, x: Tensor) -> ModuleType:
    """The backend, or that of decoded weights where this machine has it faster by measure and memory for it is allowed.

    Both compute the layer's result, and a named backend stays as it was named.
    """
    if (
        backend is not native_int8
        or dispatch.backend() != "auto"
        or not native_decode.may_keep(part, x.dtype)
    ):
        return backend
    bands = zip(part.bands, shapes(part), strict=True)
    decodes = all(native_decode.supports(piece.part, shape, x) for piece, shape in bands)
    return native_decode if decodes and latency.slower_than_float(part, x) else backend


def _sum(calls: Sequence[native_prepared.Call], layout: Layout, axis: int) -> native_prepared.Call:
    """The sum over parts, each of which reads its own input channels."""
    widths = [column[0].part.channels for column in layout.places]
    pairs = list(zip(calls, layout.inputs, strict=True))

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        total: Tensor | None = None
        # Of `torch`: the method of the same name is a Python function.
        for piece, (part, (at, zero_at)) in zip(torch.split_with_sizes(x, widths, axis), pairs, strict=True):
            own = None if scale is None or at is None else scale[at]
            own_zero = None if zero is None or zero_at is None else zero[zero_at]
            term = part(piece, own, own_zero, bias if total is None else None)
            total = term if total is None else total + term
        assert total is not None
        return total

    return call

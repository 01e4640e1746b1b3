"""The rotation of a layer's input as the operator ``torch.ops.difloat.rotate``, by the native library where there is one.

`numbers.hadamard` defines the result. Sums are taken in float32 in its order everywhere, so all of them give the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import native_library
from difloat.kernels.operators import needs_operator
from difloat.numbers import hadamard
from difloat.plan.specs import Rotation


@torch.library.custom_op("difloat::rotate", mutates_args=())
def _rotate(x: Tensor, block: int, seed: int, permuted: bool, regular: bool, back: bool) -> Tensor:
    """The rotation of the last axis, or its inverse, in the dtype of the input and computed in float32."""
    return run(x, Rotation(block, seed, permuted, regular), back)


@_rotate.register_fake
def _(x: Tensor, block: int, seed: int, permuted: bool, regular: bool, back: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.fields, ctx.back = inputs[1:5], inputs[5]


def _turned_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """The gradient to the input, which an orthonormal matrix takes back."""
    return torch.ops.difloat.rotate(gradient, *ctx.fields, not ctx.back), None, None, None, None, None


_rotate.register_autograd(_turned_back, setup_context=_keep)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The rotated input [..., i] in its dtype, with its gradient.

    >>> rotate(torch.ones(1, 4), Rotation(4, regular=True))
    tensor([[1., 1., 1., 1.]])
    """
    if not needs_operator(x, None):
        return run(x, rotation)
    fields = (rotation.block, rotation.seed, rotation.permuted, rotation.regular)
    found: Tensor = torch.ops.difloat.rotate(x, *fields, False)
    return found


def run(x: Tensor, rotation: Rotation, back: bool = False) -> Tensor:
    """The same past torch's dispatcher: no gradients, compiler or tracer."""
    if x.device.type == "cpu" and native_library.unit() is not None and not back and x.numel():
        return _native(x, rotation)
    return (rotation.backward(x) if back else rotation.forward(x)).to(x.dtype)


@cache
def _vectors(channels: int, rotation: Rotation) -> tuple[Tensor | None, Tensor | None]:
    """Signs and permutation as the library reads them, float32 and int32 [channels]. They must stay where they are."""
    if rotation.regular:
        return None, None
    order = hadamard.order(channels, rotation.seed).int() if rotation.permuted else None
    return hadamard.signs(channels, rotation.seed), order


def _native(x: Tensor, rotation: Rotation) -> Tensor:
    channels = x.shape[-1]
    signs, order = _vectors(channels, rotation)
    source = x.float().contiguous()
    out = torch.empty_like(source)
    native_library.check(
        native_library.library().difloat_rotate(
            source.data_ptr(),
            out.data_ptr(),
            source.numel() // channels,
            channels,
            rotation.block,
            rotation.block**-0.5,
            None if signs is None else signs.data_ptr(),
            None if order is None else order.data_ptr(),
            native_library.threads(source.numel()),
        )
    )
    return out.to(x.dtype)

"""A linear layer with a low-rank branch as one operator: a backend that can reads the input once for both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difloat.kernels import checks, dispatch, operators


def branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``x @ down.T @ up.T`` in the dtype of `x` [..., i]; `down` [r, i] and `up` [o, r] in any float dtype."""
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


@torch.library.custom_op("difloat::linear_beside", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
    down: Tensor,
    up: Tensor,
) -> Tensor:
    """See `linear`; no gradients."""
    stored = (packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias)
    return _run(x, stored, part, down, up)


def _run(x: Tensor, stored: tuple[Any, ...], text: str, down: Tensor, up: Tensor) -> Tensor:
    part = operators.part_of(text)
    checks.linear(x, stored[0], stored[1:], part)
    checks.branch(x, down, up, stored[0].shape[0])
    module = dispatch.choose_linear(text, part, stored[0].shape[0], x)
    if module is dispatch.BACKENDS["triton"]:  # the one that fuses a branch
        fused: Tensor = module.linear(x, *stored, part, adapter=(down.to(x.dtype), up.to(x.dtype)))
        return fused
    out: Tensor = module.linear(x, *stored, part)
    return out + branch(x, down, up)


@_linear.register_fake
def _(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def linear(x: Tensor, stored: tuple[Any, ...], text: str, down: Tensor, up: Tensor) -> Tensor:
    """What the packed weight gives for `x`, plus ``x @ down.T @ up.T`` on `x` before it is rounded.

    Args:
        x: [..., i].
        stored: Of the weight, as `ops.linear` takes it between input and part, the bias last.
        text: The part, as `ops.part_text` makes it.
        down: [r, i] in any float dtype.
        up: [o, r] likewise.

    Returns:
        [..., o] in the dtype of `x`, with gradients to `x` and the bias as `ops.linear` has them.
    """
    bias = stored[-1]
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return operators.linear(*(x, *stored, text)) + branch(x, down, up)
    if operators.needs_operator(x, bias):
        return torch.ops.difloat.linear_beside(x, *stored, text, down, up)
    return _run(x, stored, text, down, up)

"""The low-rank branch beside a layer: float products, whatever the layer itself computes in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from difloat.kernels.operators import branch_product


def low_rank(layer: nn.Linear | nn.Conv2d, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``up (down x)`` in the dtype and with the geometry of a layer: what the product of both would give as its weight.

    Args:
        layer: Linear, or a convolution, whose stride, padding, dilation and groups count.
        x: Its input.
        down: [r, i, *k], as a weight of r output channels (of every group).
        up: [o, r].

    Returns:
        What the layer would return for the weight ``up @ down`` [o, i, *k], without bias.
    """
    if isinstance(layer, nn.Linear):
        return branch_product(x, down, up)
    down, up = down.to(x.dtype), up.to(x.dtype)
    low = layer._conv_forward(x, down.repeat(layer.groups, 1, 1, 1), None)
    return F.conv2d(low, up[:, :, None, None], groups=layer.groups)


def product(down: Tensor, up: Tensor) -> Tensor:
    """The weight [o, i, *k] that a pair of `down` [r, i, *k] and `up` [o, r] stands for, in float32."""
    return (up.float() @ down.float().flatten(1)).unflatten(1, down.shape[1:])

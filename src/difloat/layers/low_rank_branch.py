"""The low-rank branch beside a layer, whose two products are computed in float, whatever the layer computes in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from difloat.kernels.operators import branch_product


def low_rank(layer: nn.Linear | nn.Conv2d, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``up (down x)`` in the dtype of the input and with the geometry of a layer.

    >>> from torch import ones
    >>> low_rank(nn.Linear(4, 3), ones(1, 4), down=ones(2, 4), up=ones(3, 2))
    tensor([[8., 8., 8.]])

    Args:
        layer: A linear layer, or a convolution, whose stride, padding, dilation and groups count.
        x: The input of the layer.
        down: The first factor [r, i, *k], a weight with r output channels (of every group).
        up: The second factor [o, r].

    Returns:
        What the layer would return for the weight ``up @ down`` [o, i, *k], without bias.
    """
    if isinstance(layer, nn.Linear):
        return branch_product(x, down, up)
    down, up = down.to(x.dtype), up.to(x.dtype)
    # Every group of channels passes through the same narrow convolution, [b, groups * r, h', w'].
    low = layer._conv_forward(x, down.repeat(layer.groups, 1, 1, 1), None)
    return F.conv2d(low, up[:, :, None, None], groups=layer.groups)


def product(down: Tensor, up: Tensor) -> Tensor:
    """The float32 weight [o, i, *k] that a pair of `down` [r, i, *k] and `up` [o, r] stands for."""
    return (up.float() @ down.float().flatten(1)).unflatten(1, down.shape[1:])

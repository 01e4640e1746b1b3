"""Orthonormal block rotations of a channel axis: signs and a Walsh-Hadamard transform, or the regular Hadamard of ComfyUI.

A weight ``W`` whose inputs are rotated is stored as ``W R^T``, and its input becomes ``R x``: the product stays the same, while
outliers of single channels are spread over a block. Channels are first permuted (where that is asked) and multiplied by signs.
Then every run of `block` of them is transformed:

    R x = H (s * x[p]) / sqrt(block)

Sums are taken in float32 in one order, largest stride first, two numbers at a time, and the factor comes last. So every device
and every number of threads gets the same bits. No row of `R` is constant: a mean of the input is spread like anything else.

>>> x = torch.eye(4)[:1]
>>> rotate(x, block=4, seed=None)
tensor([[ 0.5000,  0.5000,  0.5000, -0.5000]])
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from difloat import torch_modes

_MASK = (1 << 32) - 1
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio; neighbouring seeds begin far from each other


def largest_block(channels: int, most: int = 256) -> int:
    """The largest power of two that divides a number of channels, up to `most`.

    >>> largest_block(1152), largest_block(4096), largest_block(27)
    (128, 256, 1)
    """
    return math.gcd(channels, 1 << (most.bit_length() - 1))


def _mixed(count: int, seed: int) -> list[int]:
    """The 32-bit hashes of 0, 1, ... under a seed: MurmurHash3's finalizer of ``j + 1 + seed * _GOLDEN``."""
    found = []
    for j in range(count):
        h = (j + 1 + seed * _GOLDEN) & _MASK
        h = ((h ^ h >> 16) * 0x85EBCA6B) & _MASK
        h = ((h ^ h >> 13) * 0xC2B2AE35) & _MASK
        found.append(h ^ h >> 16)
    return found


@cache
@torch_modes.plain()
def _signs(channels: int, seed: int, device: torch.device) -> Tensor:
    return torch.tensor([1.0 - 2.0 * (h & 1) for h in _mixed(channels, seed)], device="cpu").to(device)


@cache
@torch_modes.plain()
def _order(channels: int, seed: int, device: torch.device) -> Tensor:
    """Channels by their hash, of which the lowest bit is that of the sign and is left out."""
    return (
        torch.tensor([h >> 1 for h in _mixed(channels, seed)], device="cpu").argsort(stable=True).to(device)
    )


def signs(channels: int, seed: int) -> Tensor:
    """The signs of the channels, float32 [channels]: -1 where the lowest bit of the channel's hash is set.

    >>> signs(4, seed=0)
    tensor([-1.,  1., -1., -1.])
    """
    return _signs(channels, seed, torch.device("cpu")).clone()


def order(channels: int, seed: int) -> Tensor:
    """The permutation of the channels, int64 [channels], which is that of their ascending hashes.

    >>> sorted(order(6, seed=1).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    return _order(channels, seed, torch.device("cpu")).clone()


def rotate(x: Tensor, block: int, seed: int | None, permuted: bool = False) -> Tensor:
    """The rotation of the last axis, in float32.

    Args:
        x: Float [..., channels].
        block: A power of two (of four without a seed) that divides the channels.
        seed: The seed of signs and permutation. None takes the regular Hadamard matrix, which needs no signs.
        permuted: Whether channels are permuted before they are cut into blocks.
    """
    x, channels = x.float(), x.shape[-1]
    if permuted and seed is not None:
        x = x.index_select(-1, _order(channels, seed, x.device))
    if seed is None:
        return _regular(x, block)
    return _walsh(x * _signs(channels, seed, x.device), block)


def rotate_back(x: Tensor, block: int, seed: int | None, permuted: bool = False) -> Tensor:
    """The inverse of `rotate`, up to the rounding of float32.

    >>> x = torch.arange(8.0)[None]
    >>> rotate_back(rotate(x, 8, seed=3, permuted=True), 8, seed=3, permuted=True).round()
    tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])
    """
    x, channels = x.float(), x.shape[-1]
    if seed is None:
        return _regular(x, block)  # symmetric and orthonormal
    x = _walsh(x, block) * _signs(channels, seed, x.device)
    return x.index_select(-1, _order(channels, seed, x.device).argsort()) if permuted else x


def _walsh(x: Tensor, block: int) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of every run of `block` numbers along the last axis."""
    shape, stride = x.shape, block // 2
    while stride:
        low, high = x.reshape(-1, 2, stride).unbind(1)  # [runs, stride]
        x = torch.stack((low + high, low - high), 1)
        stride //= 2
    return x.reshape(shape) * block**-0.5


def _regular(x: Tensor, block: int) -> Tensor:
    """The same with the Kronecker powers of the regular matrix of four, whose rows and columns all have the sum 2."""
    shape, stride = x.shape, block // 4
    while stride:
        a, b, c, d = x.reshape(-1, 4, stride).unbind(1)
        p, q, m, n = a + b, c + d, a - b, c - d
        x = torch.stack((p + n, p - n, q + m, q - m), 1)
        stride //= 4
    return x.reshape(shape) * block**-0.5

"""The geometry of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over a picture; pairs are (vertical, horizontal).

    Attributes:
        stride: Of the kernel.
        padding: Zeros on both sides of an axis.
        dilation: Distance of the taps.
        groups: As for `torch.nn.functional.conv2d`.
    """

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def size(self, picture: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result on a picture (h, w)."""
        height, width = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(picture, kernel, self.stride, self.padding, self.dilation, strict=True)
        ]
        return height, width

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Torch's convolution."""
        pairs = list(self.stride), list(self.padding), list(self.dilation)
        return functional.conv2d(x, weight, bias, *pairs, self.groups)

    def numbers(self) -> list[int]:
        """As one list, which `geometry_of` reads: what an operator takes."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]


def geometry_of(numbers: Sequence[int]) -> Geometry:
    """Inverse of `Geometry.numbers`."""
    return Geometry(
        list(numbers[:2]),
        list(numbers[2:4]),
        list(numbers[4:6]),
        numbers[6],
    )


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Channels last if one of the tensors is."""
    last = torch.channels_last
    for tensor in tensors:
        if tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return last
    return torch.contiguous_format

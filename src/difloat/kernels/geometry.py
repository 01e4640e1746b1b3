"""The geometry of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Geometry:
    """How the kernel of a convolution moves over a picture. Pairs are (vertical, horizontal).

    >>> Geometry(stride=(2, 2), padding=(1, 1)).size(picture=(8, 8), kernel=(3, 3))
    (4, 4)

    Attributes:
        stride: Pixels between neighbouring positions of the kernel.
        padding: Zeros that are added on both sides of an axis.
        dilation: Pixels between neighbouring taps of the kernel.
        groups: Groups of channels that see nothing of each other, as in `torch.nn.functional.conv2d`.
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
        """The convolution [b, o, h', w'] of an input [b, i, h, w], as torch computes it."""
        pairs = list(self.stride), list(self.padding), list(self.dilation)
        return functional.conv2d(x, weight, bias, *pairs, self.groups)

    def numbers(self) -> list[int]:
        """The fields as one list, which operators take and `geometry_of` reads."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]


def geometry_of(numbers: Sequence[int]) -> Geometry:
    """The geometry of a list that `Geometry.numbers` made."""
    return Geometry(
        list(numbers[:2]),
        list(numbers[2:4]),
        list(numbers[4:6]),
        numbers[6],
    )


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Channels last if one of the tensors lies so, else contiguous."""
    last = torch.channels_last
    for tensor in tensors:
        if tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return last
    return torch.contiguous_format

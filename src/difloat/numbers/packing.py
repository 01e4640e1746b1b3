"""Packing codes of any width into bytes along the input-channel axis.

>>> codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
>>> pack(codes, bits=4).tolist()                                      # 2 * 16 + 1, then 3 alone
[[33, 3]]

The codes of one row, which is one output channel at one kernel position, form a little-endian bit stream. Code j occupies the
bits ``j * bits`` to ``(j + 1) * bits - 1``, the lowest bit first, so 4-bit codes put the even element into the low nibble.
Each row ends at a byte border, and the bits left over are zero. Convolution weights keep their four axes:
``[o, bytes, kh, kw]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_channels(channels: int, bits: int) -> int:
    """Bytes that one row of `channels` codes of `bits` bits takes.

    >>> packed_channels(channels=10, bits=3)
    4
    """
    return -(-channels * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along axis 1.

    >>> pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), bits=2).shape
    torch.Size([1, 1])

    Args:
        codes: uint8 [o, i, ...], every code below ``2**bits``.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 [o, ceil(i * bits / 8), ...].
    """
    if bits == 8:
        return codes.contiguous()
    per_word, word_bytes = _word(bits)
    out_channels, channels, *kernel = codes.shape
    packed = codes.new_zeros((out_channels, packed_channels(channels, bits), *kernel))
    for number in range(per_word):
        every = codes[:, number::per_word]  # that code of all words, of which the last may have fewer
        for byte, left in _places(number, bits):
            packed[:, byte::word_bytes][:, : every.shape[1]] |= _shifted(every, left)
    return packed


def unpack(packed: Tensor, bits: int, channels: int) -> Tensor:
    """Undo `pack`.

    >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, channels=3).tolist()
    [[1, 2, 3]]

    Args:
        packed: uint8 [o, bytes, ...] as `pack` returns it.
        bits: Width of a code, 1 to 8.
        channels: How many codes of each row there are.

    Returns:
        uint8 [o, channels, ...].
    """
    if bits == 8:
        return packed[:, :channels]
    per_word, word_bytes = _word(bits)
    codes = packed.new_empty((packed.shape[0], channels, *packed.shape[2:]))
    for number in range(per_word):
        every = codes[:, number::per_word]
        first, *rest = (
            _shifted(packed[:, byte::word_bytes][:, : every.shape[1]], -left)
            for byte, left in _places(number, bits)
        )
        torch.bitwise_and(first | rest[0] if rest else first, 2**bits - 1, out=every)
    return codes


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes those are (at most 7, so a word fits int64)."""
    per_word = 8 // math.gcd(8, bits)
    return per_word, per_word * bits // 8


def _places(number: int, bits: int) -> list[tuple[int, int]]:
    """The bytes of a word that hold bits of one of its codes, and how far to the left the code is shifted into each."""
    first, last = number * bits // 8, (number * bits + bits - 1) // 8
    return [(byte, number * bits - 8 * byte) for byte in range(first, last + 1)]


def _shifted(values: Tensor, left: int) -> Tensor:
    """uint8 values moved to the left, or to the right by a negative number, where bits that leave the byte are lost."""
    return values << left if left >= 0 else values >> -left

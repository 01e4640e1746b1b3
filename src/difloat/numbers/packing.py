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
    if bits in (4, 8):
        return codes.contiguous() if bits == 8 else _nibbles(codes)
    rows = codes.movedim(1, -1)  # [o, ..., i]
    channels = rows.shape[-1]
    per_word, word_bytes = _word(bits)
    padded = torch.nn.functional.pad(rows, (0, -channels % per_word)).unflatten(-1, (-1, per_word)).long()
    words = (padded << _offsets(per_word, bits, codes.device)).sum(-1, keepdim=True)  # [o, ..., w, 1]
    # Every word is split into its bytes, [o, ..., w, bytes of a word], and the padding is cut off again.
    split = (words >> _offsets(word_bytes, 8, codes.device)).bitwise_and(255).to(torch.uint8)
    return split.flatten(-2)[..., : packed_channels(channels, bits)].movedim(-1, 1).contiguous()


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
    if bits in (4, 8):
        return packed[:, :channels] if bits == 8 else _from_nibbles(packed)[:, :channels]
    rows = packed.movedim(1, -1)  # [o, ..., bytes]
    per_word, word_bytes = _word(bits)
    padded = (
        torch.nn.functional.pad(rows, (0, -rows.shape[-1] % word_bytes))
        .unflatten(-1, (-1, word_bytes))
        .long()
    )
    words = (padded << _offsets(word_bytes, 8, packed.device)).sum(-1, keepdim=True)  # [o, ..., w, 1]
    codes = (words >> _offsets(per_word, bits, packed.device)).bitwise_and(2**bits - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :channels].movedim(-1, 1)  # [o, i, ...]


def _nibbles(codes: Tensor) -> Tensor:
    """`pack` at 4 bits, which is the usual width. It is twenty times as fast as packing by words."""
    even, odd = codes[:, 0::2], codes[:, 1::2]  # the last even code may lack a neighbour
    packed = even.clone(memory_format=torch.contiguous_format)
    packed[:, : odd.shape[1]] |= odd << 4
    return packed


def _from_nibbles(packed: Tensor) -> Tensor:
    """`unpack` at 4 bits, which also returns the nibble that is left over in an odd row."""
    codes = packed.new_empty((packed.shape[0], 2 * packed.shape[1], *packed.shape[2:]))
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes those are (at most 7, so a word fits int64)."""
    per_word = 8 // math.gcd(8, bits)
    return per_word, per_word * bits // 8


def _offsets(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * bits

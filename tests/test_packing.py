"""Packing: the identity on every width, and the documented bit layout against a bit stream written in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difloat.numbers.packing import pack, packed_channels, unpack

WIDTHS = range(1, 9)
SHAPES = [(3, 1), (2, 5), (1, 7), (4, 8), (2, 17), (2, 3, 3, 3), (3, 5, 1, 2), (0, 4), (2, 6, 0, 1)]


def random_codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int16).to(torch.uint8)


def stream_of(row: list[int], bits: int) -> list[int]:
    """Bytes of one row: code j at the bits ``j * bits`` and up, lowest bit first."""
    stream = sum(code << (index * bits) for index, code in enumerate(row))
    return list(stream.to_bytes(-(-len(row) * bits // 8), "little"))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(
    shape: tuple[int, ...], bits: int, generator: torch.Generator, device: torch.device
) -> None:
    codes = random_codes(shape, bits, generator).to(device)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], packed_channels(shape[1], bits), *shape[2:])
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_at_every_position(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[:, None].expand(-1, 9)
    assert torch.equal(unpack(pack(codes, bits), bits, 9), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", [1, 3, 8, 11])
def test_layout_is_the_documented_bit_stream(bits: int, channels: int, generator: torch.Generator) -> None:
    codes = random_codes((2, channels, 2, 3), bits, generator)
    packed = pack(codes, bits)
    for o in range(2):
        for y in range(2):
            for x in range(3):
                assert packed[o, :, y, x].tolist() == stream_of(codes[o, :, y, x].tolist(), bits)


def test_even_element_is_in_the_low_nibble() -> None:
    assert pack(torch.tensor([[0x1, 0x2, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_padding_bits_are_zero(bits: int) -> None:
    channels = 3
    codes = torch.full((1, channels), 2**bits - 1, dtype=torch.uint8)
    last = pack(codes, bits)[0, -1].item()
    used = channels * bits - 8 * (packed_channels(channels, bits) - 1)
    assert last == 2**used - 1


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_strided_input_packs_like_its_contiguous_copy(bits: int, generator: torch.Generator) -> None:
    codes = random_codes((7, 6), bits, generator).t()
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    strided = pack(codes, bits).t().contiguous().t()
    assert torch.equal(unpack(strided, bits, 7), codes)


@pytest.mark.parametrize(
    ("channels", "bits", "expected"), [(8, 4, 4), (9, 4, 5), (8, 3, 3), (1, 6, 1), (4, 6, 3), (5, 8, 5)]
)
def test_packed_channels(channels: int, bits: int, expected: int) -> None:
    assert packed_channels(channels, bits) == expected

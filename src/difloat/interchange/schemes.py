"""How other programs store a quantized linear layer: one record per layout, and the arrangements of bits that they differ in.

The sources are the layouts that diffusers' `bfl` backend and ModelOpt read and write (NVFP4, FP8 per row), the OCP Microscaling
Formats v1.0 (e8m0, groups of 32) in ModelOpt's arrangement, ComfyUI's `QUANTIZATION.md`, and cuBLAS' documentation of the
layout of block scaling factors. A layer `L` has the tensors `L.weight` and `L.weight_scale`, and others that the record names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from difloat.numbers import formats
from difloat.numbers.formats import Format

Scales = Literal["float32", "e4m3", "e8m0"]

E8M0_BIAS, E8M0_NAN = 127, 255
_TILE_ROWS, _TILE_COLUMNS, _TILE_STRIPE = 128, 4, 32  # of cuBLAS' block scaling factors


@dataclass(frozen=True)
class Scheme:
    """One layout of a quantized linear layer.

    Attributes:
        name: The name in messages.
        element: The format of the weights.
        scales: The grid of `weight_scale`. "e4m3" comes with a float32 scalar `weight_scale_2` that multiplies all of them.
        group_size: Input channels per scale. 0 stands for one scale per output channel, and None for one of the tensor.
        high_first: Whether the even one of two channels in a byte is in the high nibble.
        tiled: Whether scales lie in cuBLAS' tiles of 128 rows and 4 groups, padded to whole tiles.
        padded_to: The number to a multiple of which rows and columns are padded with zeros.
        input_scale: Whether the reader wants `input_scale`, a float32 scalar for its own quantization of the input.
        comfy_format: The name of the layout in ComfyUI's metadata, or "" for files of other programs.
        rotated: The block of the regular rotation of inputs, or 0 for none.
    """

    name: str
    element: Format
    scales: Scales
    group_size: int | None
    high_first: bool = False
    tiled: bool = False
    padded_to: int = 1
    input_scale: bool = False
    comfy_format: str = ""
    rotated: int = 0

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the stored weight."""
        if self.element.bits == 4:
            return torch.uint8
        if self.element.integer:
            return torch.int8
        return torch.float8_e4m3fn if self.element.mantissa_bits == 3 else torch.float8_e5m2

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the stored scales. e8m0 is stored as bytes, since older readers know no dtype for it."""
        return {"float32": torch.float32, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[self.scales]

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns as stored, before packing."""
        rows, columns = (-(-size // self.padded_to) * self.padded_to for size in shape)
        return rows, columns

    def weight_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the stored weight of a layer [o, i]."""
        rows, columns = self.padded(shape)
        return (rows, columns // 2) if self.element.bits == 4 else (rows, columns)

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of the scales of a layer [o, i], in linear order."""
        rows, columns = self.padded(shape)
        if self.group_size is None:
            return 1, 1
        return (rows, columns // self.group_size) if self.group_size else (rows, 1)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the stored scales of a layer [o, i]."""
        rows, columns = self.groups(shape)
        if self.group_size is None:
            return ()
        if not self.group_size:
            return (rows, 1) if self.element.integer else (rows,)
        return tile_shape(rows, columns) if self.tiled else (rows, columns)


_E2M1, _E4M3, _E5M2 = formats.parse("e2m1"), formats.parse("e4m3fn"), formats.parse("e5m2ieee")
_INT8 = formats.parse("int8")

NVFP4 = Scheme("NVFP4", _E2M1, "e4m3", 16, input_scale=True)
FP8_ROWS = Scheme("FP8 per row", _E4M3, "float32", 0)
MXFP4 = Scheme("MXFP4", _E2M1, "e8m0", 32)
COMFY = (
    Scheme(
        "ComfyUI nvfp4",
        _E2M1,
        "e4m3",
        16,
        high_first=True,
        tiled=True,
        padded_to=16,
        comfy_format="nvfp4",
    ),
    Scheme("ComfyUI float8_e4m3fn", _E4M3, "float32", None, comfy_format="float8_e4m3fn"),
    Scheme("ComfyUI float8_e5m2", _E5M2, "float32", None, comfy_format="float8_e5m2"),
    Scheme("ComfyUI mxfp8", _E4M3, "e8m0", 32, tiled=True, padded_to=32, comfy_format="mxfp8"),
    Scheme("ComfyUI int8", _INT8, "float32", 0, comfy_format="int8_tensorwise"),
    Scheme("ComfyUI int8 rotated", _INT8, "float32", 0, comfy_format="int8_tensorwise", rotated=256),
)

DIALECTS: dict[str, tuple[Scheme, ...]] = {
    "nvfp4": (NVFP4, FP8_ROWS),
    "fp8": (FP8_ROWS,),
    "mxfp4": (MXFP4,),
    "comfy": COMFY,
}
"""The kinds of files, each with the layouts that its layers may have. diffusers' `bfl` backend reads the first two."""


def check_dialect(name: str) -> tuple[Scheme, ...]:
    """The layouts of a kind of file.

    >>> [scheme.name for scheme in check_dialect("nvfp4")]
    ['NVFP4', 'FP8 per row']

    Raises:
        ValueError: if there is no such kind.
    """
    if name not in DIALECTS:
        raise ValueError(f"format must be one of {', '.join(DIALECTS)}, got {name!r}")
    return DIALECTS[name]


def swap_nibbles(packed: Tensor) -> Tensor:
    """Bytes with their halves exchanged.

    >>> swap_nibbles(torch.tensor([0x12], dtype=torch.uint8)).item() == 0x21
    True
    """
    return (packed << 4) | (packed >> 4)


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """The rows and columns of scales, padded to whole tiles."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS, -(-columns // _TILE_COLUMNS) * _TILE_COLUMNS


def _offsets(rows: int, columns: int) -> Tensor:
    """Where cuBLAS keeps the scale of every row and group: tile after tile, each with four stripes of 32 rows side by side."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]  # [rows, 1], [1, groups]
    tiles = tile_shape(rows, columns)[1] // _TILE_COLUMNS
    tile = row // _TILE_ROWS * tiles + column // _TILE_COLUMNS
    stripe = row % _TILE_ROWS // _TILE_STRIPE
    inside = row % _TILE_STRIPE * (_TILE_ROWS // _TILE_STRIPE) * _TILE_COLUMNS
    return tile * _TILE_ROWS * _TILE_COLUMNS + inside + stripe * _TILE_COLUMNS + column % _TILE_COLUMNS


def to_tiles(scales: Tensor) -> Tensor:
    """Scales [rows, groups] of one byte each in the order of cuBLAS' tiles, padded to whole tiles with zeros."""
    shape = tile_shape(*scales.shape)
    tiled = torch.zeros(shape[0] * shape[1], dtype=torch.uint8)
    tiled[_offsets(*scales.shape)] = scales.view(torch.uint8)
    return tiled.reshape(shape).view(scales.dtype)


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """The scales [rows, columns] that `to_tiles` arranged in tiles."""
    return tiled.contiguous().view(torch.uint8).reshape(-1)[_offsets(rows, columns)].view(tiled.dtype)

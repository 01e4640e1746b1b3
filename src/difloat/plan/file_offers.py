"""What kinds of files offer a recipe that chooses a format for every layer, and the bytes that they take for it.

Offers of a layer go from the fewest bits to the most, as every file has a few formats only. Bytes are those of the file and not
of our checkpoint, whose scales are float32. Names and marks of layers are left out of the count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difloat.numbers import formats
from difloat.numbers.scale_grids import ScaleFormat
from difloat.plan.rules import Rule, asymmetric_integers
from difloat.plan.target import Target

LEAST_BITS, MOST_BITS = 4, 8  # of the weights of a file
_GGUF_BLOCK = 32
_NVFP4_GROUP = 16
_OPENVINO_GROUPS = (128, 64, 32)
_SCALE_BYTES: dict[ScaleFormat, int] = {"float32": 4, "float16": 2, "e4m3": 1, "e8m0": 1, "whole": 1}
_LEVELS = 16  # of a table in ComfyUI's files
_TILE_ROWS, _TILE_GROUPS, _PADDED = 128, 4, 16  # of ComfyUI's NVFP4, whose scales lie in tiles


def offers(shape: Sequence[int], inputs: bool, target: Target, tables: bool = True) -> tuple[Rule, ...]:
    """The rules of one format each by which a kind of file holds a weight, from the fewest bits to the most.

    >>> [rule.formats[0].name for rule in offers((64, 64), False, "gguf")]
    ['iq4nl', 'int4', 'uint4', 'int8']

    Args:
        shape: The shape [o, i, *k] of the float weight of a layer that such files hold at all (`target.fit`).
        inputs: Whether the layer rounds its input to 8 bits, which leaves the formats that come with it.
        target: A kind of file. Anything else gives no offers.
        tables: Whether tables of levels are among them.
    """
    if target == "gguf":
        names = ("iq4nl", "int4") if tables else ("int4",)
        return (
            *(Rule((formats.parse(name),), "group", _GGUF_BLOCK, scales="float16") for name in names),
            replace(asymmetric_integers(4, "group", _GGUF_BLOCK), scales="float16"),
            Rule((formats.parse("int8"),), "group", _GGUF_BLOCK, scales="float16"),
        )
    if target == "openvino":
        channels = shape[1]
        sizes = [size for size in _OPENVINO_GROUPS if channels % size == 0 and channels > size]
        groups = [asymmetric_integers(4, "group", size) for size in sizes]
        return (asymmetric_integers(4, "channel"), *groups, asymmetric_integers(8, "channel"))
    if target not in ("comfy", "diffusers"):
        return ()
    wide = Rule((formats.parse("int8" if target == "comfy" else "e4m3fn"),), "channel")
    if inputs or (target == "diffusers" and shape[1] % _NVFP4_GROUP):
        return (wide,)
    return (Rule((formats.parse("e2m1"),), "group", _NVFP4_GROUP, scales="e4m3"), wide)


def file_bytes(shape: Sequence[int], rule: Rule, target: Target, rank: int = 0) -> int:
    """The bytes of a weight's codes, scales and zero points in a kind of file, and of the branch beside it.

    >>> file_bytes((64, 64), offers((64, 64), False, "gguf")[0], "gguf") == 64 * 64 // 32 * 18
    True

    Args:
        shape: The shape [o, i, *k] of the float weight.
        rule: One of its `offers`, or what `target.fit` makes of another one.
        target: The kind of file.
        rank: That of all branches of the file, where there are any.
    """
    rows, columns, *kernel = shape
    spec, taps = rule.spec(rule.formats[0]), math.prod(kernel)
    count, bits = spec.scale_count(rows, columns), rule.formats[0].bits
    if target == "openvino":
        bits = 4 if bits <= 4 else 8  # it has types of these widths
    if target == "comfy" and rule.scales == "e4m3":
        rows, columns = _up(rows, _PADDED), _up(columns, _PADDED)
        assert spec.group_size is not None, "e4m3 scales are those of groups"
        count = _up(rows, _TILE_ROWS) * _up(columns // spec.group_size, _TILE_GROUPS)
    per_group = _SCALE_BYTES[rule.scales] * (2 if spec.zero_point else 1)
    shared = 0
    if rule.scales == "e4m3":  # the scalar that multiplies all scales, and diffusers' scale of the input
        shared = 8 if target == "diffusers" else 4
    if rule.scales == "whole":  # a number per row, and the levels, which are the layer's own
        shared = rows * 4 + _LEVELS * 4
    if target == "vllm":  # bfloat16: the scalar, factors of rows and of inputs, and the branch
        shared = 2 * (1 + (rows + columns) * (1 + rank))
    return -(-rows * columns * taps * bits // 8) + count * per_group + shared


def float_bytes(tensor: Tensor, target: Target) -> int:
    """The bytes of a tensor that is not quantized, in a kind of file or, for other targets, in our checkpoint.

    >>> float_bytes(torch.ones(4, 4), "gguf"), float_bytes(torch.ones(4), "gguf"), float_bytes(torch.ones(4, 4), "any")
    (32, 16, 64)
    """
    if target == "gguf":
        return tensor.numel() * gguf_dtype(tensor).itemsize
    return tensor.numel() * 4 if target == "openvino" and tensor.is_floating_point() else tensor.nbytes


def gguf_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a float tensor in a GGUF file: float16 where that holds every value of several axes, else float32."""
    exact = tensor.float()
    return torch.float16 if tensor.dim() > 1 and torch.equal(exact.half().float(), exact) else torch.float32


def _up(number: int, step: int) -> int:
    return -(-number // step) * step

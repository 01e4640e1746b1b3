"""The native CPU library as Python sees it: finding it, choosing its unit, and the structs of ``csrc/difloat.h``.

The library is plain C behind `ctypes` and needs no torch headers, so one build serves every Python and every torch. Units are
separate shared objects, compiled for different instruction sets. The best one that the machine has is loaded, once.
``DIFLOAT_CPU_ISA=avx2`` (or ``none``) caps the choice, and ``DIFLOAT_NATIVE`` names a folder with another build. torch must be
imported first, so that both share one OpenMP pool.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from difloat.numbers import integer_grids
from difloat.numbers.formats import Format
from difloat.plan.specs import Part

ABI = 9
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNITS = ("amx", "avx512", "avx512vl", "avxvnni", "avx2", "neon")  # from the fastest to the slowest
_VARIABLE = "DIFLOAT_CPU_ISA"
_IMPORTED_IN = os.getpid()  # another process than this one was forked
_SMALL = 1 << 18  # products; fewer are not worth waking a second thread
_FOLDER = Path(os.environ.get("DIFLOAT_NATIVE", Path(__file__).parent))


class Grid(ctypes.Structure):
    """The C struct ``difloat_grid``: the grid that inputs are rounded to."""

    _fields_ = [
        ("minimum", ctypes.c_float),
        ("maximum", ctypes.c_float),
        ("multiplier", ctypes.c_float),
        ("shift", ctypes.c_int32),
        ("uniform", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
    ]


class Input(ctypes.Structure):
    """The C struct ``difloat_input``: the rows of an input, and how they are rounded."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("online", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_float),
        ("grid", Grid),
        ("group", ctypes.c_int64),
    ]


class Weight(ctypes.Structure):
    """The C struct ``difloat_weight``: one packed weight with its scales."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("byte_stride", ctypes.c_int64),
        ("tap_stride", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("minimum", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("unit", ctypes.c_float),
        ("groups", ctypes.c_int64),
        ("group_channels", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
    ]


class Output(ctypes.Structure):
    """The C struct ``difloat_output``: where the result is written, and the bias."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("channel", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    ]


class Geometry(ctypes.Structure):
    """The C struct ``difloat_geometry``: sizes and steps of a convolution."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64 * 2),
        ("kernel", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        ("out", ctypes.c_int64 * 2),
    ]


class Attention(ctypes.Structure):
    """The C struct ``difloat_attention``: the tensors, strides and grids of one attention."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("query_stride", ctypes.c_int64 * 3),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        ("out_stride", ctypes.c_int64 * 3),
        ("mask_stride", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        ("operands", ctypes.c_int32),
        ("grid", Grid),
        ("map_rounded", ctypes.c_int32),
        ("map", Grid),
        ("type", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Codes:
    """A format of weights as the product reads it.

    Attributes:
        table: The integer of every code, less `minimum`, repeated up to 256 entries.
        minimum: The smallest integer.
        unit: The value of the integer 1.
    """

    table: ctypes.Array[ctypes.c_uint8]
    minimum: int
    unit: float


@cache
def grid(format: Format) -> Grid:
    """The C struct of a format of activations that has an `integer_grids.Grid`."""
    found = integer_grids.grid_of(format)
    assert found is not None
    return Grid(
        format.min,
        format.max,
        found.multiplier,
        found.shift,
        format.uniform,
        format.mantissa_bits,
        format.min_exponent,
    )


@cache
def any_grid(format: Format) -> Grid:
    """The C struct of any format of activations, in units of its smallest positive value.

    Its integers may need more than 8 bits.
    """
    multiplier = 1 / min(value for value in format.values if value > 0)
    exponents = format.mantissa_bits, format.min_exponent
    return Grid(format.min, format.max, multiplier, 0, format.uniform, *exponents)


@cache
def attention_grid(format: Format) -> Grid | None:
    """The C struct of a format whose integers have at most 8 significant bits, as bfloat16 holds, or None for other formats."""
    if format.levels:
        return None
    found = any_grid(format)
    largest = max(abs(found.minimum), found.maximum) * found.multiplier
    # A floating-point value has its mantissa bits and the hidden one; trailing zeros cost bfloat16 nothing.
    significant = largest if format.uniform else 2 ** (format.mantissa_bits + 1)
    return found if significant <= 256 and largest < 2**31 else None


@cache
def codes(format: Format) -> Codes:
    """The codes of a format of weights that has an `integer_grids.Grid`."""
    multiplier = format.int8_multiplier()
    assert multiplier is not None
    minimum = int(format.min * multiplier)
    entries = [int(value * multiplier) - minimum for value in format.decode_table]
    table = (ctypes.c_uint8 * 256)(*(entries * (256 // len(entries))))
    return Codes(table, minimum, 1 / multiplier)


@cache
def values(format: Format) -> ctypes.Array[ctypes.c_float]:
    """The value of every code, repeated up to 256 entries."""
    return (ctypes.c_float * 256)(*(format.decode_table * (256 // len(format.decode_table))))


def weight(
    data: int,
    scale: int,
    zero: int | None,
    shape: Sequence[int],
    stride: Sequence[int],
    part: Part,
    codes: Codes | None,
) -> Weight:
    """A packed weight [o, bytes, *k] as the library reads it. The struct holds addresses of memory that must outlive it.

    Args:
        data: Address of the packed codes.
        scale: Address of the float32 scales.
        zero: Address of the float32 zero points, or None.
        shape: Shape of the packed codes.
        stride: Strides of the packed codes in bytes.
        part: Formats and granularities.
        codes: The integers of the codes. None is for a weight that is only decoded.
    """
    taps, tap_stride = 1, 1
    if len(shape) == 4:
        taps = shape[2] * shape[3]
        # torch may give an axis of one entry any stride, so it is taken from the axis that has more.
        tap_stride = stride[3] if shape[3] > 1 else stride[2]
    size = part.weight.group_size or part.channels
    groups = -(-part.channels // size)
    return Weight(
        data,
        shape[0],
        part.channels,
        taps,
        stride[0],
        # The stride of an axis of one entry means nothing.
        1 if shape[1] == 1 else stride[1],
        tap_stride,
        part.weight.format.bits,
        0 if codes is None else codes.minimum,
        None if codes is None else ctypes.addressof(codes.table),
        scale,
        zero,
        1.0 if codes is None else codes.unit,
        groups,
        min(size, part.channels),
        0 if part.weight.granularity == "tensor" else groups,
    )


def built() -> bool:
    """Whether the library was built, so that it lies beside this file."""
    return (_FOLDER / "libdifloat_machine.so").is_file()


@cache
def _machine_library() -> Any:
    """The shared object that says what this machine can run.

    Raises:
        ImportError: if the library has another interface than this module.
    """
    library = ctypes.CDLL(str(_FOLDER / "libdifloat_machine.so"))
    if library.difloat_abi() != ABI:
        raise ImportError(
            f"native library must have interface {ABI}, got {library.difloat_abi()}; build it again with `make native`"
        )
    return library


def tiles_refused() -> bool:
    """Whether the processor has the tiles of AMX, but the operating system does not let this process use them."""
    return built() and bool(_machine_library().difloat_refuses_amx())


@cache
def machine() -> dict[str, bool]:
    """Which units this machine can run and the compiler built, among them ``avx512_bf16`` for attention.

    Raises:
        ImportError: if the library has another interface than this module.
    """
    names = (*UNITS, "avx512_bf16")
    if not built():
        return dict.fromkeys(names, False)
    library = _machine_library()
    files = {name: "attention" if name == "avx512_bf16" else name for name in names}
    there = {name: (_FOLDER / f"libdifloat_{file}.so").is_file() for name, file in files.items()}
    return {name: there[name] and bool(getattr(library, f"difloat_has_{name}")()) for name in names}


@cache
def unit() -> str | None:
    """The best unit that the machine and ``DIFLOAT_CPU_ISA`` allow, or None if there is none.

    Raises:
        ValueError: if the environment variable names no unit.
    """
    cap = os.environ.get(_VARIABLE, UNITS[0])
    if cap not in (*UNITS, "none"):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(UNITS)} or none, got {cap!r}")
    allowed = () if cap == "none" else UNITS[UNITS.index(cap) :]
    return next((name for name in allowed if machine()[name]), None)


@cache
def library() -> Any:
    """The shared object of the unit in use, loaded once."""
    name = unit()
    assert name is not None
    loaded = ctypes.CDLL(str(_FOLDER / f"libdifloat_{name}.so"))
    source, bands, result, geometry = (ctypes.POINTER(kind) for kind in (Input, Weight, Output, Geometry))
    loaded.difloat_linear.argtypes = [source, bands, ctypes.c_int, result, ctypes.c_int]
    loaded.difloat_conv2d.argtypes = [source, bands, ctypes.c_int, result, geometry, ctypes.c_int]
    table, address = ctypes.POINTER(ctypes.c_float), ctypes.c_void_p
    loaded.difloat_decode.argtypes = [bands, table, address, address, ctypes.c_int, ctypes.c_int]
    loaded.difloat_round.argtypes = [source, address, ctypes.c_int]
    loaded.difloat_attend.argtypes = [ctypes.POINTER(Attention), ctypes.c_int]
    loaded.difloat_rotate.argtypes = [
        address,
        address,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_float,
        address,
        address,
        ctypes.c_int,
    ]
    if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
        os.register_at_fork(after_in_child=_compute_alone)
    return loaded


def multiplies_bfloat16() -> bool:
    """Whether attention of bfloat16 tensors has a unit of its own here, which needs AVX-512 with BF16."""
    return unit() in ("amx", "avx512") and machine()["avx512_bf16"]


def attention_library(dtype: torch.dtype) -> Any:
    """The shared object that computes attention of tensors of a dtype: in bfloat16 where that has a unit, else in float32."""
    return _bfloat16_unit() if dtype == torch.bfloat16 and multiplies_bfloat16() else library()


@cache
def _bfloat16_unit() -> Any:
    loaded = ctypes.CDLL(str(_FOLDER / "libdifloat_attention.so"))
    loaded.difloat_attend.argtypes = [ctypes.POINTER(Attention), ctypes.c_int]
    return loaded


def _compute_alone() -> None:
    torch.set_num_threads(1)  # the products of torch share the pool


def threads(products: int = _SMALL) -> int:
    """How many threads a call with so many products uses: as many as torch, or one for a small call.

    In a process made by ``fork`` it is one as well. The pool of the parent does not exist there, and waiting for it would
    never end.
    """
    forked = os.getpid() != _IMPORTED_IN
    return 1 if forked or products < _SMALL else torch.get_num_threads()


def check(status: int) -> None:
    """Raise the error that a function of the library reports.

    Raises:
        MemoryError: if the status is not 0, which means that memory ran out.
    """
    if status:
        raise MemoryError("native library must have memory for its buffers, but there was none; free some")

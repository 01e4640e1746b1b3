"""Formats: published numbers, every code of every format, and agreement with gfloat, ml_dtypes and torch."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

import oracles
from difloat.numbers import rounding
from difloat.numbers.formats import Format, candidates, parse

ALL = oracles.all_names()
FLOATS = [name for name in ALL if "int" not in name]

PUBLISHED = {  # name: max, min, smallest positive value, number of distinct finite values
    "e2m1": (6.0, -6.0, 0.5, 15),
    "e3m0": (16.0, -16.0, 0.25, 15),
    "e1m2": (3.5, -3.5, 0.5, 15),
    "ue2m2": (7.0, 0.0, 0.25, 16),
    "ue1m3": (3.75, 0.0, 0.25, 16),
    "e2m3": (7.5, -7.5, 0.125, 63),
    "e3m2": (28.0, -28.0, 0.0625, 63),
    "e4m3": (480.0, -480.0, 2**-9, 255),
    "e4m3fn": (448.0, -448.0, 2**-9, 253),
    "e4m3ieee": (240.0, -240.0, 2**-9, 239),
    "e5m2": (114688.0, -114688.0, 2**-16, 255),
    "e5m2ieee": (57344.0, -57344.0, 2**-16, 247),
    "e3m4": (31.0, -31.0, 2**-6, 255),
    "e3m4ieee": (15.5, -15.5, 2**-6, 223),
    "int2": (1.0, -2.0, 1.0, 4),
    "int4": (7.0, -8.0, 1.0, 16),
    "int8": (127.0, -128.0, 1.0, 256),
    "uint1": (1.0, 0.0, 1.0, 2),
    "uint4": (15.0, 0.0, 1.0, 16),
    "uint8": (255.0, 0.0, 1.0, 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ranges(name: str) -> None:
    format = parse(name)
    smallest = min(value for value in format.values if value > 0)
    assert (format.max, format.min, smallest, len(format.values)) == PUBLISHED[name]
    assert format.step == smallest


@pytest.mark.parametrize("name", ALL)
def test_every_code_means_what_the_definition_says(name: str) -> None:
    format = parse(name)
    truth = [oracles.decode(code, format) for code in range(2**format.bits)]
    np.testing.assert_array_equal(
        format.decode_table, [float(value) for value in truth]
    )  # NaN equals NaN here
    assert [Fraction(value) for value in format.values] == [
        value for value, _ in oracles.finite_values(format)
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_code_round_trips(name: str) -> None:
    format = parse(name)
    codes = torch.arange(2**format.bits, dtype=torch.uint8)
    values = rounding.decode(codes, format)
    assert values.dtype == torch.float32
    finite = values.isfinite()
    negative_zero = finite & (values == 0) & (codes != 0)
    assert torch.equal(rounding.encode(values, format)[finite], codes.where(~negative_zero, 0)[finite])
    assert negative_zero.sum() == (format.signed and not format.integer)


def test_parse_reads_back_the_name() -> None:
    assert [parse(name).name for name in ALL] == ALL
    assert [parse(f" {name.upper()} ") for name in ALL] == [parse(name) for name in ALL]
    assert len({parse(name) for name in ALL}) == len(ALL)


def test_every_format_has_values_besides_zero() -> None:
    for sign, exponent, mantissa, specials in itertools.product(
        ("", "u"), range(10), range(10), ("", "fn", "ieee")
    ):
        try:
            found = parse(f"{sign}e{exponent}m{mantissa}{specials}")
        except ValueError:
            continue
        assert len(found.values) > 1 and math.isfinite(found.max) and found.max > 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp4",
        "e4m4",
        "ue4m5",
        "e8m0",
        "ue8m0",
        "int9",
        "uint9",
        "int0",
        "int1",
        "uint0",
        "e0m0",
        "ue0m0",
        "e1m1fn",
    ]
    + ["m1e2", "e2", "e4m3fnuz", "e10m1", "-e2m1", "e2m1 e3m0", "uuint4"]
    + ["e0m3ieee", "ue0m8ieee", "e\uff12m1", "int\uff14"],
)
def test_no_such_format(name: str) -> None:
    with pytest.raises(ValueError, match="^format .*got " + repr(name)):
        parse(name)


@pytest.mark.parametrize("name", [name for name in FLOATS if "e0" not in name])
def test_equals_gfloat(name: str) -> None:
    format = parse(name)
    info = gfloat_info(format)
    theirs = [gfloat.decode_float(info, code).fval for code in range(2**format.bits)]
    np.testing.assert_array_equal(format.decode_table, theirs)


def gfloat_info(format: Format) -> gfloat.FormatInfo:
    """The record of gfloat for one of our floating-point formats with an exponent field."""
    return gfloat.FormatInfo(
        format.name,
        format.bits,
        format.mantissa_bits + 1,
        bias=2 ** (format.exponent_bits - 1) - 1,
        is_signed=format.signed,
        domain=gfloat.Domain.Extended if format.specials == "ieee" else gfloat.Domain.Finite,
        has_nz=format.signed,
        num_high_nans={"": 0, "fn": 1, "ieee": 2**format.mantissa_bits - 1}[format.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize(
    ("name", "theirs", "factor"),
    [
        ("e2m1", gfloat.formats.format_info_ocp_e2m1, 1),
        ("e2m3", gfloat.formats.format_info_ocp_e2m3, 1),
        ("e3m2", gfloat.formats.format_info_ocp_e3m2, 1),
        ("e4m3fn", gfloat.formats.format_info_ocp_e4m3, 1),
        ("e5m2ieee", gfloat.formats.format_info_ocp_e5m2, 1),
        ("int8", gfloat.formats.format_info_ocp_int8, 64),  # OCP's int8 has six bits after the point
    ],
)
def test_equals_the_named_formats_of_gfloat(name: str, theirs: gfloat.FormatInfo, factor: int) -> None:
    values = [gfloat.decode_float(theirs, code).fval * factor for code in range(2**theirs.k)]
    np.testing.assert_array_equal(parse(name).decode_table, values)


ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e5m2ieee": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_equals_ml_dtypes(name: str) -> None:
    format = parse(name)
    codes = np.arange(2**format.bits, dtype=np.uint8)
    theirs = codes.view(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(format.decode_table, theirs)
    numbers = ~np.isnan(theirs)  # the sign of NaN means nothing
    np.testing.assert_array_equal(np.signbit(format.decode_table)[numbers], np.signbit(theirs)[numbers])


@pytest.mark.parametrize("name", ["int2", "int4", "uint1", "uint2", "uint4"])
def test_integers_equal_ml_dtypes(name: str) -> None:
    format = parse(name)
    info = ml_dtypes.iinfo(getattr(ml_dtypes, name))
    assert format.values == tuple(range(int(info.min), int(info.max) + 1))
    theirs = np.array(format.values).astype(getattr(ml_dtypes, name)).view(np.uint8) & (2**format.bits - 1)
    np.testing.assert_array_equal(rounding.encode(torch.tensor(format.values), format), theirs)


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2ieee", torch.float8_e5m2)]
)
def test_equals_torch(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    torch.testing.assert_close(torch.tensor(parse(name).decode_table), theirs, rtol=0, atol=0, equal_nan=True)


def test_int8_multiplier_by_brute_force() -> None:
    for format in map(parse, ALL):
        low, high = (-128, 127) if format.signed else (0, 255)
        values = [value for value, _ in oracles.finite_values(format)]
        fitting = (
            power
            for power in (2**exponent for exponent in range(9))
            if all((value * power).denominator == 1 and low <= value * power <= high for value in values)
        )
        expected = None if format.specials else next(fitting, None)
        assert format.int8_multiplier() == expected, format.name


def test_int8_multipliers_in_the_design() -> None:
    expected = {
        "e2m1": 2,
        "e1m2": 2,
        "e3m0": 4,
        "e2m3": 8,
        "ue2m2": 4,
        "int4": 1,
        "uint8": 1,
        "e3m2": None,
        "e4m3": None,
    }
    assert {name: parse(name).int8_multiplier() for name in expected} == expected


@pytest.mark.parametrize("name", [name for name in FLOATS if parse(name).embeds_in_e4m3()])
def test_a_bit_shift_embeds_in_e4m3(name: str) -> None:
    """Exponent to the low end of its 4 bits, mantissa to the high end of its 3, sign on top."""
    format = parse(name)
    factor = Fraction(2) ** (7 - format.bias)
    for value, code in oracles.finite_values(format):
        magnitude = code & (2 ** (format.bits - 1) - 1) if format.signed else code
        sign = code >> (format.bits - 1) if format.signed else 0
        shifted = sign << 7 | magnitude << (3 - format.mantissa_bits)
        hardware = oracles.decode(shifted, parse("e4m3" if name in ("e4m3", "ue4m3") else "e4m3fn"))
        assert hardware * factor == value


def test_what_embeds_in_e4m3() -> None:
    embedded = {name for name in FLOATS if parse(name).embeds_in_e4m3()}
    assert {"e2m1", "e3m0", "e1m2", "e2m3", "e3m2", "e4m3", "e4m3fn", "ue2m2", "ue1m3"} <= embedded
    assert embedded.isdisjoint({"e5m2", "e5m2ieee", "e3m4", "e2m5", "e5m0", "e1m4", "e4m3ieee"})
    assert not parse("int4").embeds_in_e4m3()


def test_one_exponent_bit_is_an_integer_format() -> None:
    steps = [value / parse("e1m2").step for value in parse("e1m2").values]
    assert steps == list(range(-7, 8))
    steps = [value / parse("ue1m3").step for value in parse("ue1m3").values]
    assert steps == list(parse("uint4").values)


def test_uniform_means_evenly_spaced() -> None:
    for format in map(parse, ALL):
        gaps = {high - low for low, high in zip(format.values, format.values[1:], strict=False)}
        if format.uniform:
            assert gaps == {format.step}, format.name
        elif format.exponent_bits > 2 and not format.specials:
            assert len(gaps) > 1, format.name


def test_candidates() -> None:
    assert [f.name for f in candidates(4)] == ["e3m0", "e2m1", "e1m2"]
    assert [f.name for f in candidates(4, signed=False)] == ["ue4m0", "ue3m1", "ue2m2", "ue1m3"]
    assert [f.name for f in candidates(4, integer_grids=False)] == ["e3m0", "e2m1"]
    assert [f.name for f in candidates(8)] == ["e7m0", "e6m1", "e5m2", "e4m3", "e3m4", "e2m5", "e1m6"]
    assert (
        candidates(8, signed=False)[0].name == "ue7m1"
    )  # with 8 exponent bits the largest value is no float32
    assert [f.name for f in candidates(1, signed=False)] == ["ue1m0"]
    assert [f.name for f in candidates(2)] == ["e1m0"] and parse("e1m0").values == (-2, 0, 2)
    assert [f.name for f in candidates(2, signed=False)] == ["ue2m0", "ue1m1"]
    assert [f.name for f in candidates(3)] == ["e2m0", "e1m1"]
    for bits, signed in ((1, True), (0, False), (9, True)):
        with pytest.raises(ValueError, match=f"to 8, got {bits}; choose another width"):
            candidates(bits, signed)
    assert all(f.bits == bits and math.isfinite(f.max) for bits in range(2, 9) for f in candidates(bits))

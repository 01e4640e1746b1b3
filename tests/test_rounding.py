"""Rounding: equal to exact fractions, to ml_dtypes and to gfloat; properties; gradients; binade borders."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from difloat.numbers.formats import Format, parse
from difloat.numbers.rounding import decode, encode, round_straight_through, round_to, step_at
from test_formats import ML_DTYPES, gfloat_info

FORMATS = [parse(name) for name in oracles.all_names()]
MIRRORED = [format for format in FORMATS if format.min == -format.max]
SMALL = [format for format in FORMATS if format.bits <= 5]
EIGHT_BITS = [
    parse(name) for name in ("e4m3", "e4m3fn", "e5m2", "e5m2ieee", "e3m4", "e2m5", "e7m0", "ue7m1", "int8")
]


def interesting(format: Format) -> list[float]:
    """Values, ties, binade borders and their float32 neighbours, ends, zeros, and far too small and large numbers."""
    exact = [float(value) for value, _ in oracles.finite_values(format)] + list(
        map(float, oracles.midpoints(format))
    )
    exact += [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        2.0**-126,
        format.max * 1.01,
        format.max * 2,
        format.min - format.step / 2,
    ]
    centre = np.array(exact, dtype=np.float32)
    beside = [np.nextafter(centre, np.float32(end)) for end in (-np.inf, np.inf)]
    return [*centre.tolist(), *beside[0].tolist(), *beside[1].tolist(), 3e38, -3e38, math.inf, -math.inf]


def truth(values: list[float], format: Format) -> list[float]:
    return [float(oracles.round_exactly(value, format)) for value in values]


@pytest.mark.parametrize("format", SMALL + EIGHT_BITS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_borders_and_neighbours_equal_fractions(format: Format, dtype: torch.dtype) -> None:
    values = interesting(format)
    rounded = round_to(torch.tensor(values, dtype=dtype), format)
    assert rounded.dtype == dtype
    assert rounded.tolist() == truth(values, format)
    assert not rounded.signbit()[rounded == 0].any()  # never negative zero


@st.composite
def formats_and_values(draw: st.DrawFn, formats: list[Format] = FORMATS) -> tuple[Format, list[float]]:
    format = draw(st.sampled_from(formats))
    reach = max(format.max, -format.min)
    inside = st.floats(-1.3, 1.3).map(lambda fraction: fraction * reach)
    small = st.floats(-4, 4).map(lambda steps: steps * format.step)
    tie = st.sampled_from(oracles.midpoints(format)).map(float)
    anything = st.floats(width=32, allow_nan=False)
    values = draw(st.lists(inside | small | tie | anything, min_size=1, max_size=20))
    return format, [float(np.float32(value)) for value in values]


@given(formats_and_values())
@settings(max_examples=100, deadline=None)
def test_random_values_equal_fractions(case: tuple[Format, list[float]]) -> None:
    format, values = case
    assert round_to(torch.tensor(values), format).tolist() == truth(values, format)
    assert round_to(torch.tensor(values, dtype=torch.float64), format).tolist() == truth(values, format)


@given(formats_and_values())
@settings(max_examples=50, deadline=None)
def test_idempotent_and_monotone(case: tuple[Format, list[float]]) -> None:
    format, values = case
    ascending = torch.tensor(sorted(values))
    rounded = round_to(ascending, format)
    assert torch.equal(round_to(rounded, format), rounded)
    assert (rounded.diff() >= 0).all()
    assert torch.equal(decode(encode(ascending, format), format), rounded)


@given(formats_and_values(MIRRORED))
@settings(max_examples=50, deadline=None)
def test_sign_magnitude_formats_are_odd(case: tuple[Format, list[float]]) -> None:
    format, values = case
    x = torch.tensor(values)
    assert torch.equal(round_to(-x, format), -round_to(x, format))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e4m3", "e3m4", "ue2m2", "int4", "e5m2ieee"])
def test_half_precision_input(name: str, dtype: torch.dtype) -> None:
    """Every one of the 65,536 half-precision numbers."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    rounded = round_to(x, parse(name))
    assert rounded.dtype == dtype
    expected = round_to(x.double(), parse(name))
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_and_infinity_saturates(dtype: torch.dtype) -> None:
    for format in FORMATS:
        rounded = round_to(torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype), format)
        assert rounded[0].isnan(), format.name
        assert rounded[1:].tolist() == [format.max, format.min], format.name


def test_shape_strides_and_input_are_kept() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).t()[::2]
    before = x.clone()
    for name in ("e2m1", "e3m0", "int4"):
        rounded = round_to(x, parse(name))
        assert rounded.shape == x.shape and torch.equal(x, before)
        assert torch.equal(rounded, round_to(x.contiguous(), parse(name)))
        assert round_to(x[:0], parse(name)).shape == (0, 6)
        assert round_to(x[0, 0], parse(name)).shape == ()
    with pytest.raises(TypeError, match="floating point"):
        round_to(torch.arange(3), parse("e2m1"))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_equals_ml_dtypes_casts(name: str) -> None:
    format = parse(name)
    x = inside_and_ties(format)
    theirs = x.astype(ML_DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(round_to(torch.from_numpy(x), format).numpy(), theirs)
    codes = encode(torch.from_numpy(x), format).numpy()
    nonzero = theirs != 0  # they keep the sign of zero
    np.testing.assert_array_equal(codes[nonzero], x.astype(ML_DTYPES[name]).view(np.uint8)[nonzero])


@pytest.mark.parametrize("name", ["int2", "int4", "uint2", "uint4"])
def test_equals_ml_dtypes_integers(name: str) -> None:
    format = parse(name)
    x = inside_and_ties(format)
    theirs = np.rint(x).astype(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(round_to(torch.from_numpy(x), format).numpy(), theirs)


def inside_and_ties(format: Format) -> np.ndarray:
    """Numbers in the range of a format: casts of other libraries overflow outside, and need not saturate."""
    x = np.random.default_rng(0).uniform(format.min, format.max, 4000)
    scale = np.random.default_rng(1).uniform(0, 1, 4000) ** 8  # many near zero
    x = np.concatenate([x, x * scale, interesting(format)]).astype(np.float32)
    return x[(x >= format.min) & (x <= format.max)]


@pytest.mark.parametrize(
    "name", ["e2m1", "e3m0", "ue2m2", "e3m2", "e4m3", "e4m3fn", "e5m2ieee", "e2m5", "ue4m0", "e7m0"]
)
def test_equals_gfloat(name: str) -> None:
    format = parse(name)
    values = interesting(format)
    if not format.signed:
        values = [value for value in values if value >= 0]
    info, to_even = gfloat_info(format), gfloat.RoundMode.TiesToEven
    theirs = [gfloat.round_float(info, value, to_even, sat=True) for value in values]
    assert round_to(torch.tensor(values), format).tolist() == theirs


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "ue2m2", "e1m2", "int4", "uint4"])
def test_gradient_is_the_clipped_identity(name: str) -> None:
    format = parse(name)
    edge = [format.min, format.max, 0.0, format.step / 2]
    outside = [format.max * 1.01, format.min - 0.01, math.inf, math.nan]
    x = torch.tensor(edge + outside, requires_grad=True)
    rounded = round_straight_through(x, format)
    torch.testing.assert_close(rounded, round_to(x.detach(), format), rtol=0, atol=0, equal_nan=True)
    upstream = torch.arange(1.0, 9.0)
    (gradient,) = torch.autograd.grad(rounded, x, upstream)
    assert gradient.tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]


def gap_above(x: float, format: Format) -> float:
    """Distance from the value at or below ``|x|``, which is less than the largest, to the next value."""
    values = format.values
    above = bisect_right(values, abs(x))
    return values[above] - values[above - 1]


@pytest.mark.parametrize(
    "format", [f for f in MIRRORED if f.bits in (4, 6)] + EIGHT_BITS[:7], ids=lambda f: f.name
)
def test_step_is_the_distance_of_neighbours(format: Format) -> None:
    x = torch.tensor([*format.values, *map(float, oracles.midpoints(format))])
    x = x[x.abs() < format.max]
    assert step_at(x, format).tolist() == [gap_above(value, format) for value in x.tolist()]
    beyond = torch.tensor([2 * format.max, -math.inf])
    assert torch.equal(step_at(beyond, format), step_at(torch.tensor([format.max, format.max]), format))


def log2_step(x: Tensor, clip: Tensor, format: Format) -> Tensor:
    """The usual formula with a real-valued bias (Kuzmin et al.), in float32, in units of the grid."""
    bias = 2**format.exponent_bits - clip.log2() + math.log2(2 - 2**-format.mantissa_bits) - 1
    biased_exponent = (x.abs().log2() + bias).floor().clamp_min(1)
    return (biased_exponent - format.mantissa_bits - bias).exp2() * format.max / clip


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e2m3", "e4m3"])
def test_no_logarithm_trap_at_binade_borders(name: str) -> None:
    """With a scale that is any real number, the start of a binade must get the step of that binade."""
    format = parse(name)
    clip = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) * 10 + 0.01
    scale = clip / format.max
    first = format.min_exponent
    binades = torch.tensor([2.0**exponent for exponent in range(first, int(math.log2(format.max)) + 1)])
    expected = (binades * 2.0**-format.mantissa_bits).expand(2000, -1)

    x = binades * scale  # what a weight quantized before holds
    assert torch.equal(step_at(x / scale, format), expected)
    assert (~torch.isclose(log2_step(x, clip, format), expected, rtol=0.1)).any(), (
        "the test no longer shows the trap"
    )


@pytest.mark.parametrize("rounding", [round_to, lambda x, format: decode(encode(x, format), format)])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e2m3", "e4m3", "ue2m2", "int4", "uint8"])
def test_quantizing_twice_changes_nothing(name: str, rounding: Callable[[Tensor, Format], Tensor]) -> None:
    format = parse(name)
    scale = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 1e-3
    values = torch.tensor(format.values)
    once = values * scale
    assert torch.equal(rounding(once / scale, format), values.expand(500, -1))

"""The integer contract: operands stand for the values that the reference rounds to, and sums stay inside int32."""

from __future__ import annotations

import pytest
import torch

import oracles
from difloat.kernels import integer_operands, reference
from difloat.numbers import integer_grids
from difloat.numbers.formats import parse
from difloat.plan.specs import Part, QuantSpec

EXACT = ["e2m1", "e1m2", "e3m0", "e2m3", "e1m4", "int4", "int8", "uint4", "uint8", "ue2m2", "ue3m1", "ue1m7"]
INEXACT = ["e3m2", "e4m3", "e5m2", "e2m5", "e4m3fn", "e5m2ieee"]


@pytest.mark.parametrize("name", [name for name in oracles.all_names() if parse(name).bits <= 8])
def test_operands_times_their_step_are_the_values(name: str) -> None:
    format = parse(name)
    grid = integer_grids.grid_of(format)
    if grid is None:
        assert format.int8_multiplier() is None
        return
    for code, operand in enumerate(integer_operands.operand_table(format).tolist()):
        assert oracles.decode(code, format) * grid.multiplier - grid.shift == operand


def test_which_formats_are_integers() -> None:
    assert all(integer_grids.grid_of(parse(name)) for name in EXACT)
    assert not any(integer_grids.grid_of(parse(name)) for name in INEXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_point", [None, -0.4])
@pytest.mark.parametrize("name", EXACT)
def test_rows_are_what_the_reference_rounds_to(name, zero_point, dtype, generator) -> None:
    spec = QuantSpec(parse(name), zero_point=zero_point is not None)
    x = (2 * torch.randn(6, 40, generator=generator)).to(dtype)
    scale = torch.tensor([0.1 if spec.format.max > 20 else 0.4])
    zero = None if zero_point is None else torch.tensor([zero_point])
    rows = integer_operands.quantize_rows(x, spec, scale, zero)
    values = (rows.values.double() + rows.shift) * rows.scale + (
        0.0 if rows.zero_point is None else rows.zero_point
    )
    expected = reference.fake_quantize_input(x.float(), scale, zero, name, False).double()
    assert torch.allclose(values, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert len(rows.values.unique()) > 2


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int8", "e2m3"])
def test_online_rows_are_what_the_reference_rounds_to(name, generator) -> None:
    x = torch.randn(5, 33, generator=generator) * torch.exp2(torch.arange(5.0)[:, None] * 3)
    x[2] = 0
    rows = integer_operands.quantize_rows(x, QuantSpec(parse(name), "token", online=True), None, None)
    expected = reference.fake_quantize_input(x, None, None, name, True)
    multiplier = parse(name).int8_multiplier()
    scale = reference.online_scale(x, parse(name), per_token=True)
    assert torch.equal(rows.values.float() / multiplier * scale, expected)


def test_a_nan_in_a_row_makes_its_scale_nan() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    for spec, scale in [
        (QuantSpec(parse("int8"), "token", online=True), None),
        (QuantSpec(parse("e2m1")), torch.ones(1)),
    ]:
        rows = integer_operands.quantize_rows(x, spec, scale, None)
        assert rows.scale.expand(3, 1).flatten().isnan().tolist() == [False, True, False]


def test_reasons_against() -> None:
    weight, token = QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("int8"), "token", online=True)
    reasons = {
        None: Part(4, weight, token),
        "activations are not quantized": Part(4, weight),
        "e3m2 weights are no int8 integers": Part(4, QuantSpec(parse("e3m2")), token),
        "e4m3 activations are no int8 integers": Part(4, weight, QuantSpec(parse("e4m3"))),
        "kind of activation scale": Part(4, weight, QuantSpec(parse("ue2m2"), "token", online=True)),
    }
    for reason, part in reasons.items():
        assert integer_operands.reason_against(part) == reason


def test_long_sums_do_not_fit() -> None:
    part = Part(4, QuantSpec(parse("uint8")), QuantSpec(parse("int8")))
    longest = (2**31 - 1) // (255 * 128)
    assert integer_operands.sums_fit(part, longest) and not integer_operands.sums_fit(part, longest + 1)


def test_sums_of_two_unsigned_operands_are_counted_in_full() -> None:
    part = Part(4, QuantSpec(parse("uint8")), QuantSpec(parse("uint8")))
    longest = (2**31 - 1) // (255 * 255)
    assert integer_operands.sums_fit(part, longest) and not integer_operands.sums_fit(part, longest + 1)

"""The backend of Apple's GPU by its operations alone, with tensors of the CPU and without the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from difloat.kernels import dispatch, mps, reference, torch_int8
from difloat.kernels.geometry import Geometry
from difloat.numbers.formats import parse
from difloat.plan.encode import join_rows, plan_layer
from difloat.plan.specs import Part, QuantSpec
from test_backends import GEOMETRIES, SHAPES, TOKEN, case, check, parts, stored

TABLE = Part(64, QuantSpec(parse("t4g"), "channel"), TOKEN)
GROUPS = Part(64, QuantSpec(parse("e2m1"), "group", 32), TOKEN)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether torch has an int8 product is asked in the test and after it."""
    torch_int8._largest_exact.cache_clear()
    yield
    torch_int8._largest_exact.cache_clear()


@pytest.mark.parametrize("number", range(len(parts(64))))
def test_linear_layers_of_every_kind(number: int, generator) -> None:
    for rows, channels, out in SHAPES:
        part = parts(channels)[number]
        one = case((out, channels), part, generator)
        weight, inputs = stored(one.tensors, part)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, channels, generator=generator).to(dtype)
            result = mps.linear(x, weight, inputs, one.tensors[5])
            if torch_int8.computes(part, (out, channels), x):
                check(result, x, one)
            else:
                assert torch.equal(result, reference.linear(x, weight, inputs, one.tensors[5]))


@pytest.mark.parametrize("part", [TABLE, GROUPS, parts(64)[0]], ids=["table", "groups", "w4a8"])
def test_convolutions(part: Part, generator) -> None:
    for shape, size, *numbers in GEOMETRIES:
        own = Part(shape[1], part.weight, part.activation)
        one = case(shape, own, generator)
        weight, inputs = stored(one.tensors, own)
        x = torch.randn(2, shape[1], *size, generator=generator)
        result = mps.conv2d(x, weight, inputs, one.tensors[5], Geometry(*numbers))
        if torch_int8.computes(own, shape, x):
            check(result, x, one, *numbers)
        else:
            expected = reference.conv2d(x, weight, inputs, one.tensors[5], Geometry(*numbers))
            assert torch.equal(result, expected)


def test_what_is_multiplied_in_integers() -> None:
    x = torch.zeros(2, 64)
    ways = {part: torch_int8.computes(part, (8, 64), x) for part in (TABLE, GROUPS, parts(64)[0])}
    assert ways == {TABLE: True, GROUPS: False, parts(64)[0]: True}


def test_rows_of_several_widths(generator) -> None:
    def band(name: str) -> object:
        values = torch.randn(8, 64, generator=generator)
        return plan_layer(
            values, [Part(64, QuantSpec(parse(name), "channel"), TOKEN)], [torch.full((8,), 0.1)]
        )

    weight = join_rows([band("int2"), band("t4g")], torch.randperm(16, generator=generator)).weight()
    x = torch.randn(5, 64, generator=generator)
    _, inputs = stored(case((8, 64), TABLE, generator).tensors, TABLE)
    expected = reference.linear(x, weight, inputs, None)
    assert torch.allclose(mps.linear(x, weight, inputs, None), expected, atol=1e-5)


def test_without_an_int8_product_layers_are_decoded(generator, monkeypatch, asked_anew) -> None:
    def missing(*operands: object) -> None:
        raise NotImplementedError("aten::_int_mm is not implemented for the MPS device")

    monkeypatch.setattr(torch, "_int_mm", missing)
    one = case((9, 64), TABLE, generator)
    weight, inputs = stored(one.tensors, TABLE)
    x = torch.randn(5, 64, generator=generator)
    assert torch.equal(mps.linear(x, weight, inputs, None), reference.linear(x, weight, inputs, None))


def test_an_inexact_product_is_found_out(monkeypatch, asked_anew) -> None:
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b).clamp(max=2**15))
    assert torch_int8._largest_exact(torch.device("cpu")) == 64
    wide = Part(64, QuantSpec(parse("int8"), "channel"), TOKEN)
    assert not torch_int8.computes(wide, (8, 64), torch.zeros(2, 64))


def test_it_is_chosen_on_its_device_only(monkeypatch) -> None:
    monkeypatch.setattr(mps, "available", lambda: True)
    dispatch._here.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.empty(2, 64, device="mps")
            assert dispatch.choose(TABLE, (8, 64), x) is mps
            assert dispatch.choose(TABLE, (8, 64), torch.empty(2, 64)) is not mps
        assert not mps.supports(TABLE, (8, 64), torch.zeros(2, 64))
    finally:
        dispatch._here.cache_clear()

"""Rounding by a look-up gives what rounding gives, on borders and next to them, and for rows of several formats."""

from __future__ import annotations

import pytest
import torch

from difloat.numbers import formats, lookup, rounding

NAMES = ["iq4nl", "t2g", "t3g", "int4", "uint5", "uint8", "e2m1", "e1m2", "e3m0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [False, True])
def test_equals_rounding_everywhere(dtype: torch.dtype, together: bool) -> None:
    every = [formats.parse(name) for name in NAMES]
    numbers = [numbers_around(format, dtype) for format in every]
    if not together:
        for format, x in zip(every, numbers, strict=True):
            found = lookup.rounder([format], [1], x)(x.clone()[:, None])[:, 0]
            assert torch.equal(found, rounding.round_(x.clone(), format))
        return
    length = min(map(len, numbers))
    counts = [1 + at % 3 for at in range(len(every))]
    columns = [x[:length, None].expand(-1, n) for x, n in zip(numbers, counts, strict=True)]
    found = lookup.rounder(every, counts, columns[0])(torch.cat(columns, 1))
    wanted = [rounding.round_(x.clone(), format) for x, format in zip(columns, every, strict=True)]
    assert torch.equal(found, torch.cat(wanted, 1))


def test_formats_of_very_many_cells_are_rounded_apart() -> None:
    every = [formats.parse("e5m2"), formats.parse("iq4nl")]
    assert lookup._cells(every[0], torch.zeros(0)) is None
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0)) * 30
    found = lookup.rounder(every, [5, 7], x)(x.clone())
    assert torch.equal(found[..., :5], rounding.round_to(x[..., :5], every[0]))
    assert torch.equal(found[..., 5:], rounding.round_to(x[..., 5:], every[1]))


def numbers_around(format: formats.Format, dtype: torch.dtype) -> torch.Tensor:
    """Borders of a format, the numbers next to them, its values, and others as far as large ones."""
    values = torch.tensor(format.values, dtype=dtype)
    borders = (values[1:] + values[:-1]) / 2
    near = [borders.nextafter(torch.full_like(borders, end)) for end in (-torch.inf, torch.inf)]
    draw = torch.Generator().manual_seed(1)
    others = torch.randn(1000, generator=draw, dtype=dtype) * values.abs().max()
    return torch.cat([others, borders, *near, values, torch.tensor([1e30, -1e30, 0.0], dtype=dtype)])

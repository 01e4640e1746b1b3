"""Attention of every unit of the native library that this machine runs, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from difloat.kernels import attention as kernels
from difloat.kernels import native_library
from difloat.layers import attention
from difloat.numbers.formats import parse
from difloat.numbers.rounding import round_
from difloat.plan.specs import AttentionPlan

HERE = [name for name in native_library.UNITS if native_library.machine()[name]]
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 7, 8, 9, 24, 40, 64, 72, 80, 160]
QUERIES, KEYS = [1, 11, 12, 13, 100, 250], [1, 15, 16, 17, 77, 256, 257, 600]


@pytest.fixture(params=HERE)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The native library on one unit."""
    caches = (native_library.unit, native_library.library)
    monkeypatch.setenv("DIFLOAT_CPU_ISA", request.param)
    for found in caches:
        found.cache_clear()
    yield request.param
    monkeypatch.undo()
    for found in caches:
        found.cache_clear()


def heads(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Query, key and value [b, h, t, d], as the projections of a layer leave them in memory."""
    batch, count, queries, keys, width = shape
    return tuple(
        torch.randn(batch, tokens, count, width, generator=generator).to(dtype).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )


def mask_of(number: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """No mask, one of keys, one that is added, or one whose last axis is not dense."""
    batch, count, queries, keys, _ = shape
    return (
        None,
        torch.rand(batch, 1, 1, keys, generator=generator) > 0.3,
        torch.randn(queries, keys, generator=generator),
        torch.randn(1, count, keys, queries, generator=generator).transpose(2, 3),
    )[number % 4]


def exactly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The result in float64, and what it would be if all values were positive."""
    scores = query.double() @ key.double().transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e29)  # a query without keys gets the mean of the values
    elif mask is not None:
        scores = scores + mask.double()
    weights = scores.softmax(-1)
    return weights @ value.double(), weights @ value.double().abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_float64(unit: str, dtype: torch.dtype, generator) -> None:
    """The rounding of the result to its dtype, that of the unit of bfloat16, and float32's of some hundred sums."""
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    for number in range(40):
        width, queries = WIDTHS[number % len(WIDTHS)], QUERIES[number % len(QUERIES)]
        shape = (1 + number % 2, 1 + number % 3, queries, KEYS[number % len(KEYS)], width)
        query, key, value = heads(shape, dtype, generator)
        mask, scale = mask_of(number // 2, shape, generator), (width**-0.5, -0.2)[number % 2]
        if number % 3 == 0:
            query, value = query.contiguous(), value.transpose(2, 3).contiguous().transpose(2, 3)
        exact, reach = exactly(query, key, value, mask, scale)
        result = torch.ops.difloat.attention(query, key, value, mask, scale)
        assert result.dtype == dtype and result.shape == exact.shape
        error = (result.double() - exact).abs()
        assert (error <= rounding * (exact.abs() + reach) + 3e-6 * reach + 1e-30).all(), (shape, error.max())


def test_float32_is_as_near_as_torch(unit: str, generator) -> None:
    """Over more keys than a block, where sums shrink again and again."""
    query, key, value = heads((1, 2, 60, 1500, 64), torch.float32, generator)
    exact, _ = exactly(query, 3 * key, value, None, 1.0)
    ours = torch.ops.difloat.attention(query, 3 * key, value, None, 1.0)
    torchs = torch.nn.functional.scaled_dot_product_attention(query, 3 * key, value, scale=1.0)
    error, allowed = ((x - exact).pow(2).mean().sqrt() for x in (ours.double(), torchs.double()))
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_far_behind_or_missing(unit: str, dtype: torch.dtype, generator) -> None:
    query, key, value = heads((1, 2, 13, 300, 16), dtype, generator)
    winner = torch.ops.difloat.attention(100 * query, 100 * key, value, None, 1.0)
    best = ((100 * query).double() @ (100 * key).double().transpose(2, 3)).argmax(-1)
    assert torch.allclose(winner, value.gather(2, best[..., None].expand(-1, -1, -1, 16)), rtol=5e-7, atol=0)
    blind = torch.ops.difloat.attention(query, key, value, torch.zeros(13, 300, dtype=torch.bool), 1.0)
    assert torch.allclose(
        blind.float(), value.float().mean(2, keepdim=True).expand(-1, -1, 13, -1), atol=1e-3
    )
    late = torch.zeros(13, 300, dtype=torch.bool)
    late[:, 299] = True  # the whole first block is masked
    only = torch.ops.difloat.attention(query, key, value, late, 1.0)
    assert torch.allclose(only, value[:, :, 299:].expand(-1, -1, 13, -1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_spoils_what_it_reaches(unit: str, where: int, generator) -> None:
    tensors = heads((1, 2, 20, 300, 24), torch.float32, generator)
    tensors[where][0, 1, 4, 5] = torch.nan
    broken = torch.ops.difloat.attention(*tensors, None, 0.2).isnan()
    assert not broken[0, 0].any()
    if where == 0:
        assert broken[0, 1, 4].all() and not broken[0, 1, 5].any()
    else:
        assert broken[0, 1, :, 5].all()


def on_grid(x: Tensor, name: str) -> Tensor:
    """Float64 values of a grid, one float32 scale per token and head."""
    scale = x.abs().amax(-1, keepdim=True) / parse(name).max
    return round_((x / scale).contiguous(), parse(name)).double() * scale.double()


@pytest.mark.parametrize(
    ("operand", "softmax"),
    [("int8", ""), ("e2m1", ""), ("e3m4", ""), ("", "uint8"), ("int8", "uint8"), ("e2m3", "ue4m4")],
)
def test_grids_of_a_plan(unit: str, operand: str, softmax: str, generator) -> None:
    """A probability within float32's error of the middle between two points of the map's grid may take either."""
    plan = AttentionPlan(*(parse(name) if name else None for name in (operand, softmax)))
    query, key, value = heads((2, 2, 40, 300, 72), torch.float32, generator)
    mask = torch.randn(40, 300, generator=generator)
    assert kernels.carries_out(plan, query, key, value, mask)
    result = attention.attend(plan, query, key, value, mask)
    if operand:
        query, key, value = (on_grid(x, operand) for x in (query, key, value))
    weights = (query.double() @ key.double().transpose(2, 3) * 72**-0.5 + mask.double()).softmax(-1)
    room = torch.zeros(1, dtype=torch.float64)
    if softmax:
        top = plan.softmax.max
        low, weights, high = (
            round_((weights * top * (1 + e)).float().contiguous(), plan.softmax).double() / top
            for e in (-1e-5, 0, 1e-5)
        )
        room = (high - low) @ value.double().abs()
    exact, reach = weights @ value.double(), weights @ value.double().abs()
    assert ((result.double() - exact).abs() <= 3e-6 * reach + room).all()


def test_threads_share_heads_and_queries(unit: str, generator) -> None:
    before = torch.get_num_threads()
    query, key, value = heads((1, 1, 500, 300, 40), torch.float32, generator)
    alone = torch.ops.difloat.attention(query, key, value, None, 0.2)
    try:
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.difloat.attention(query, key, value, None, 0.2), alone)
    finally:
        torch.set_num_threads(before)

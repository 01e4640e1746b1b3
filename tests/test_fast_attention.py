"""Attention kernels against float64, and the way they get into diffusers models."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from difloat.kernels import attention as kernels
from difloat.kernels import dispatch, native_library
from difloat.layers import attention
from difloat.numbers.formats import parse
from difloat.numbers.rounding import round_
from difloat.plan.specs import AttentionPlan

NAMES = ["torch", *(["cpu"] if native_library.unit() else [])]
SHAPES = [  # batch, heads, queries, keys, dimensions
    (1, 2, 7, 5, 8),
    (2, 3, 33, 130, 72),
    (1, 1, 3, 3, 7),
    (1, 2, 65, 64, 160),
    (2, 1, 1, 1, 1),
    (1, 2, 13, 77, 40),
]
MASKS = {
    "none": lambda g, shape: None,
    "keys": lambda g, shape: torch.rand(shape[0], 1, 1, shape[3], generator=g) > 0.4,
    "added": lambda g, shape: torch.randn(shape[2], shape[3], generator=g),
    "per head": lambda g, shape: torch.randn(1, shape[1], 1, 1, generator=g).bfloat16(),
    "strided": lambda g, shape: torch.randn(1, 1, shape[3], shape[2], generator=g).transpose(2, 3),
}


def heads(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, queries, keys, width = shape
    return tuple(
        torch.randn(batch, tokens, count, width, generator=generator).bfloat16().transpose(1, 2)
        for tokens in (queries, keys, keys)
    )


@pytest.mark.parametrize("build", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_close_to_float64_as_torch_is(name, shape, build, generator) -> None:
    query, key, value = heads(shape, generator)
    mask = build(generator, shape)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), exact_mask)
    with dispatch.use_backend(name):
        result = torch.ops.difloat.attention(query, key, value, mask, shape[-1] ** -0.5)
    plain = (query.float() @ key.float().transpose(2, 3) * shape[-1] ** -0.5).bfloat16().float()
    if exact_mask is not None:
        plain = (
            plain.masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else plain + mask.float().bfloat16()
        )
    plain = (plain.softmax(-1).bfloat16() @ value).double()  # every step rounded to bfloat16
    assert result.shape == exact.shape and result.dtype == torch.bfloat16
    error, allowed = ((x - exact).pow(2).mean().sqrt() for x in (result.double(), plain))
    assert error <= 2 * allowed + 2.0**-9 * exact.pow(2).mean().sqrt()


@pytest.mark.parametrize("name", NAMES)
def test_large_scores_do_not_overflow(name, generator) -> None:
    query, key, value = heads((1, 1, 5, 70, 16), generator)
    with dispatch.use_backend(name):
        result = torch.ops.difloat.attention(100 * query, 100 * key, value, None, 1.0)
        blind = torch.ops.difloat.attention(query, key, value, torch.zeros(5, 70, dtype=torch.bool), 1.0)
    winners = (query.float() @ key.float().transpose(2, 3)).argmax(-1)
    if name == "cpu":  # torch rounds such scores to bfloat16, where several are equal
        assert torch.equal(result[0, 0], value[0, 0, winners[0, 0]])
    assert result.isfinite().all()
    assert torch.allclose(blind.float(), value.float().mean(2, keepdim=True).expand_as(blind), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_legal(name, generator) -> None:
    query, key, value = heads((2, 2, 6, 9, 8), generator)
    with dispatch.use_backend(name):
        for mask in (None, torch.rand(2, 1, 1, 9, generator=generator) > 0.3):
            torch.library.opcheck(torch.ops.difloat.attention.default, (query, key, value, mask, 0.3))


def test_what_is_left_to_torch(generator) -> None:
    query, key, value = heads((1, 2, 4, 4, 8), generator)
    assert kernels.supports(query, key, value, None)
    assert not kernels.supports(query.double(), key.double(), value.double(), None)
    assert not kernels.supports(query, key.float(), value.float(), None)
    assert not kernels.supports(query, key[:, :1], value[:, :1], None)
    assert not kernels.supports(query, key[:, :, :0], value[:, :, :0], None)
    assert not kernels.supports(query.clone().requires_grad_(), key, value, None)
    with dispatch.use_backend("reference"):
        assert not kernels.supports(query, key, value, None)
    with dispatch.use_backend("torch"):
        assert not kernels.supports(query.float(), key.float(), value.float(), None)


@pytest.mark.parametrize("build", [tiny.tiny_pixart, tiny.tiny_unet])
def test_a_model_gives_the_same_pictures_through_its_own_processors(build, generator, monkeypatch) -> None:
    pipeline = build()
    model = (pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet).bfloat16()
    text = 16
    call = {
        "hidden_states" if hasattr(pipeline, "transformer") else "sample": torch.randn(
            2, 4, 8, 8, generator=generator
        ).bfloat16(),
        "timestep": torch.tensor([3, 3]),
        "encoder_hidden_states": torch.randn(2, 5, text, generator=generator).bfloat16(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    if hasattr(pipeline, "transformer"):
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    used = []
    real = kernels._bias
    monkeypatch.setattr(kernels, "_bias", lambda mask, shape: (used.append(mask), real(mask, shape))[1])
    with torch.no_grad():
        before = model(**call, return_dict=False)[0]
        signature = inspect.signature(next(iter(model.attn_processors.values())).__call__)
        count = attention.accelerate(model)
        assert count == len(model.attn_processors) > 1 and attention.accelerate(model) == 0
        processor = next(iter(model.attn_processors.values()))
        assert inspect.signature(processor.__call__) == signature
        after = model(**call, return_dict=False)[0]
        assert len(used) == count and any(mask is not None for mask in used)
        assert torch.equal(copy.deepcopy(model)(**call, return_dict=False)[0], after)
        attention.undo_acceleration(model)
        assert torch.equal(model(**call, return_dict=False)[0], before)
    assert len(used) == 2 * count
    # bfloat16 keeps 8 bits; a dozen layers add up their roundings.
    assert (after - before).float().pow(2).mean() <= (2.0**-6) ** 2 * before.float().pow(2).mean()


needs_unit = pytest.mark.skipif(not native_library.unit(), reason="no native attention on this machine")


def plan(operand: str, softmax: str) -> AttentionPlan:
    return AttentionPlan(*(parse(name) if name else None for name in (operand, softmax)))


def on_grid(x: Tensor, name: str) -> Tensor:
    """Float64, one float32 scale per token and head."""
    scale = x.float().abs().amax(-1, keepdim=True) / parse(name).max
    scale = torch.where(scale > 0, scale, 1.0)
    return round_((x.float() / scale).contiguous(), parse(name)).double() * scale.double()


def map_and_values(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, mask, scale: float):
    if plan.operand:
        query, key, value = (on_grid(x, plan.operand.name) for x in (query, key, value))
    scores = query.double() @ key.double().transpose(2, 3) * scale
    return (scores if mask is None else scores + mask.double()).softmax(-1), value.double()


@needs_unit
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softmax", ["", "uint8", "ue4m4", "ue2m2"])
@pytest.mark.parametrize("operand", ["", "int8", "e2m1", "e2m3", "e3m0", "e3m4", "e4m3"])
def test_grids_of_a_plan_against_float64(operand, softmax, shape, generator) -> None:
    """Roundings to bfloat16 of the values and of the result; of the map, where no grid rounds it; and the steps of the map.

    A probability that lies within float32's error of the middle between two points of the grid may take either.
    """
    if not operand and not softmax:
        return
    asked = plan(operand, softmax)
    query, key, value = heads(shape, generator)
    mask = torch.randn(shape[2], shape[3], generator=generator) if shape[2] % 2 else None
    assert kernels.carries_out(asked, query, key, value, mask)
    weights, values = map_and_values(asked, query, key, value, mask, 0.3)
    room = torch.zeros(1, dtype=torch.float64)
    if softmax:
        top = asked.softmax.max
        low, weights, high = (
            round_((weights * top * (1 + e)).float().contiguous(), asked.softmax).double() / top
            for e in (-1e-5, 0, 1e-5)
        )
        room = (high - low) @ values.abs()
    exact, reach = weights @ values, weights @ values.abs()
    result = attention.attend(asked, query, key, value, mask, scale=0.3)
    assert result.shape == exact.shape and result.dtype == torch.bfloat16
    assert (
        (result.double() - exact).abs() <= 2.0**-8 * (exact.abs() + 2 * reach) + 1e-5 * reach + room
    ).all()


@needs_unit
def test_what_the_unit_does_not_round_is_left_to_torch(generator, monkeypatch) -> None:
    query, key, value = heads((1, 2, 4, 4, 8), generator)
    assert not kernels.carries_out(plan("e5m2", ""), query, key, value, None)
    assert not kernels.carries_out(plan("ue2m2", ""), query, key, value, None)
    assert not kernels.carries_out(plan("int8", ""), query.double(), key.double(), value.double(), None)
    monkeypatch.setattr(kernels, "_native", None)
    for arguments in ({"is_causal": True}, {"dropout_p": 0.0}):
        name = "e5m2" if arguments == {"dropout_p": 0.0} else "int8"
        attention.attend(plan(name, ""), query, key, value, **arguments)


@needs_unit
def test_the_operator_with_grids_is_legal(generator) -> None:
    query, key, value = heads((2, 2, 6, 9, 8), generator)
    mask = torch.rand(2, 1, 1, 9, generator=generator) > 0.3
    operator = torch.ops.difloat.attention_on_grids.default
    torch.library.opcheck(operator, (query, key, value, mask, 0.3, "e2m3", "uint8"))


@needs_unit
@pytest.mark.parametrize("operand", ["", "int8", "e3m4"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_is_not_lost(where, operand, generator) -> None:
    tensors = dict(zip(("query", "key", "value"), heads((1, 2, 9, 70, 24), generator), strict=True))
    tensors[where][0, 1, 4, 5] = torch.nan
    broken = attention.attend(plan(operand, "uint8"), **tensors).isnan()
    if not operand:
        assert torch.equal(broken, torch.ops.difloat.attention(*tensors.values(), None, 24**-0.5).isnan())
    assert not broken[0, 0].any()
    if where == "query":
        assert broken[0, 1, 4].all() and not broken[0, 1, 5].any()
    else:
        assert broken[0, 1, :, 5].all()


@needs_unit
def test_a_planned_model_runs_on_the_unit(generator, monkeypatch) -> None:
    model = tiny.tiny_pixart().transformer.bfloat16()
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator).bfloat16(),
        "timestep": torch.tensor([3, 3]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator).bfloat16(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    names = [name for name, module in model.named_modules() if attention.has_processor(module)]
    attention.install(model, dict.fromkeys(names, plan("e2m3", "ue4m4")))
    calls = []
    real = kernels._native
    monkeypatch.setattr(kernels, "_native", lambda *a: (calls.append(a[-2:]), real(*a))[1])
    with torch.no_grad():
        fast = model(**call, return_dict=False)[0].float()
        assert calls == [("e2m3", "ue4m4")] * len(names)
        with dispatch.use_backend("reference"):
            slow = model(**call, return_dict=False)[0].float()
    assert len(calls) == len(names)
    assert (fast - slow).pow(2).mean() <= (2.0**-5) ** 2 * slow.pow(2).mean()


@torch.no_grad()
@pytest.mark.parametrize("fast_first", [True, False])
def test_one_processor_is_fast_and_quantized_in_any_order(fast_first, generator, monkeypatch) -> None:
    model = tiny.tiny_pixart().transformer.bfloat16()
    name, module = next((n, m) for n, m in model.named_modules() if attention.has_processor(m))
    before = type(module.processor)
    grids = plan("e5m2", "")  # on no unit: operands are rounded, and the rest is left to whoever is around
    if fast_first:
        attention.accelerate(model)
    attention.install(model, {name: grids})
    if not fast_first:
        attention.accelerate(model)
    calls = []
    real = attention._fast
    monkeypatch.setattr(attention, "_fast", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    tokens = torch.randn(2, 16, module.query_dim, generator=generator).bfloat16()
    both = module(tokens)
    assert calls == [1] and attention.plan_of(module) is grids
    pickled = pickle.loads(pickle.dumps(module.processor))
    assert pickled.difloat_fast and pickled.difloat_attention == grids
    module.set_processor(
        before()
    )  # what a user sets is quantized at the next call, and fast only if asked for
    planned = module(tokens)
    assert calls == [1] and not torch.equal(planned, torch.zeros_like(planned))
    attention.accelerate(model)
    assert torch.equal(module(tokens), both) and calls == [1, 1]
    attention.undo_acceleration(model)
    assert torch.equal(module(tokens), planned) and calls == [1, 1]
    attention.accelerate(model)
    attention.restore(model)
    assert attention.plan_of(module) is None and module.processor.difloat_fast
    assert not torch.equal(module(tokens), both) and calls == [1, 1, 1]
    attention.undo_acceleration(model)
    assert type(module.processor) is before and vars(module.processor) == vars(before())

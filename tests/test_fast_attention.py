"""Attention kernels against float64, and the way they get into diffusers models."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from difloat import fast_attention
from difloat.kernels import attention as kernels
from difloat.kernels import backends, native

NAMES = ["torch", *(["cpu"] if native.attention_unit() else [])]
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
    with backends.use_backend(name):
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
    with backends.use_backend(name):
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
    with backends.use_backend(name):
        for mask in (None, torch.rand(2, 1, 1, 9, generator=generator) > 0.3):
            torch.library.opcheck(torch.ops.difloat.attention.default, (query, key, value, mask, 0.3))


def test_what_is_left_to_torch(generator) -> None:
    query, key, value = heads((1, 2, 4, 4, 8), generator)
    assert kernels.supports(query, key, value, None)
    assert not kernels.supports(query.float(), key.float(), value.float(), None)
    assert not kernels.supports(query, key[:, :1], value[:, :1], None)
    assert not kernels.supports(query, key[:, :, :0], value[:, :, :0], None)
    assert not kernels.supports(query.clone().requires_grad_(), key, value, None)
    with backends.use_backend("reference"):
        assert not kernels.supports(query, key, value, None)


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
        count = fast_attention.accelerate(model)
        assert count == len(model.attn_processors) > 1 and fast_attention.accelerate(model) == 0
        processor = next(iter(model.attn_processors.values()))
        assert inspect.signature(processor.__call__) == signature
        after = model(**call, return_dict=False)[0]
        assert len(used) == count and any(mask is not None for mask in used)
        assert torch.equal(copy.deepcopy(model)(**call, return_dict=False)[0], after)
        fast_attention.restore(model)
        assert torch.equal(model(**call, return_dict=False)[0], before)
    assert len(used) == 2 * count
    # bfloat16 keeps 8 bits; a dozen layers add up their roundings.
    assert (after - before).float().pow(2).mean() <= (2.0**-6) ** 2 * before.float().pow(2).mean()

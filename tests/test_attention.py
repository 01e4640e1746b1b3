"""Quantized attention: what the plan says happens to query, key, value and map, in every processor, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difloat.kernels import dispatch
from difloat.layers import attention
from difloat.numbers.formats import parse
from difloat.plan.scales import fake_quantize
from difloat.plan.specs import AttentionPlan
from difloat.plan.validation import read
from tiny import tiny_pixart

OPERANDS, MAP = AttentionPlan(parse("e2m3")), AttentionPlan(None, parse("ue4m4"))


def heads(generator, queries: int = 5, keys: int = 7, count: int = 3) -> tuple:
    shapes = [(2, count, queries, 8), (2, count, keys, 8), (2, count, keys, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def per_token(x: torch.Tensor, name: str) -> torch.Tensor:
    return fake_quantize(x, parse(name), x.abs().amax(-1, keepdim=True) / parse(name).max)


def test_operands_have_one_scale_per_token_and_head(generator) -> None:
    query, key, value = heads(generator)
    expected = F.scaled_dot_product_attention(*(per_token(x, "e2m3") for x in (query, key, value)))
    with dispatch.use_backend("reference"):
        assert torch.equal(attention.attend(OPERANDS, query, key, value), expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_a_quantized_map_is_the_rounded_softmax(mask, generator, monkeypatch) -> None:
    query, key, value = heads(generator)
    masks = {
        "bool": torch.rand(2, 1, 5, 7, generator=generator) > 0.3,
        "float": torch.randn(2, 1, 5, 7, generator=generator),
    }
    masks["bool"][..., 0] = True
    scores = query @ key.transpose(-2, -1) * 0.5
    if mask == "bool":
        scores = scores.masked_fill(~masks["bool"], -torch.inf)
    elif mask == "float":
        scores = scores + masks["float"]
    elif mask == "causal":
        scores = scores.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(), -torch.inf)
    top = torch.tensor(1 / parse("ue4m4").max)
    expected = fake_quantize(scores.softmax(-1), parse("ue4m4"), top) @ value
    for values in (1 << 24, 40):  # all heads at once; one head at a time
        monkeypatch.setattr(attention, "_MAP_VALUES", values)
        for backend in ("reference", "auto"):
            with dispatch.use_backend(backend):
                result = attention.attend(
                    MAP, query, key, value, attn_mask=masks.get(mask), is_causal=mask == "causal", scale=0.5
                )
            torch.testing.assert_close(result, expected)


def test_grouped_queries_share_keys(generator) -> None:
    query, _, _ = heads(generator, count=4)
    _, key, value = heads(generator, count=2)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = attention.attend(MAP, query, *repeated)
    assert torch.equal(attention.attend(MAP, query, key, value, enable_gqa=True), expected)


def denoiser_and_call() -> tuple[nn.Module, dict]:
    model = tiny_pixart().transformer.eval()
    g = torch.Generator().manual_seed(0)
    size = model.config.sample_size
    call = {
        "hidden_states": torch.randn(2, model.config.in_channels, size, size, generator=g),
        "encoder_hidden_states": torch.randn(2, 4, model.config.caption_channels, generator=g),
        "timestep": torch.tensor([5, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, call


@torch.no_grad()
def test_every_processor_is_reached_copied_and_given_back() -> None:
    model, call = denoiser_and_call()
    names = [name for name, module in model.named_modules() if attention.has_processor(module)]
    exact = model(**call).sample
    processors = {name: model.get_submodule(name).processor for name in names}
    results = []
    for plan in (OPERANDS, MAP, AttentionPlan(parse("e2m1"), parse("uint4"))):
        attention.install(model, dict.fromkeys(names, plan))
        results.append(model(**call).sample)
        assert all(attention.plan_of(model.get_submodule(name)) == plan for name in names)
        assert torch.equal(copy.deepcopy(model)(**call).sample, results[-1])
    assert len(names) == 4 and not any(torch.equal(result, exact) for result in results)
    attention.restore(model)
    assert torch.equal(model(**call).sample, exact)
    assert all(type(model.get_submodule(n).processor) is type(old) for n, old in processors.items())


def test_a_processor_that_computes_otherwise_is_refused_not_ignored() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, call = denoiser_and_call()
    name = next(name for name, module in model.named_modules() if attention.has_processor(module))
    model.get_submodule(name).set_processor(AttnProcessor())
    attention.install(model, {name: OPERANDS})
    with pytest.raises(RuntimeError, match="must compute by torch's scaled_dot_product_attention"):
        model(**call)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="got neither"):
        AttentionPlan()
    with pytest.raises(ValueError, match="must be unsigned, got e2m1"):
        AttentionPlan(None, parse("e2m1"))
    with pytest.raises(ValueError, match="and no others, got"):
        read(AttentionPlan, {"operands": "e2m3"})
    with pytest.raises(ValueError, match="'proj_out' is no attention"):
        attention.install(tiny_pixart().transformer, {"proj_out": OPERANDS})
    with pytest.raises(ValueError, match="dropout must be 0"):
        attention.attend(MAP, *heads(torch.Generator()), dropout_p=0.1)

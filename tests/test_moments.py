"""Moments of inputs against all vectors in float64, and what shares, fits and is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difloat.kernels.reference import fake_quantize_input
from difloat.layers.packed import quantizable
from difloat.methods import moments
from difloat.methods.moments import Moments, MomentSettings, Source, gather, sources
from difloat.methods.second_order import SecondOrderSettings, round_second_order
from difloat.numbers import formats
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import asymmetric_integers, draft_layer
from difloat.plan.specs import QuantSpec
from tiny import tiny_pixart, tiny_unet

INT8 = formats.parse("int8")
ONLINE = QuantSpec(INT8, "token", online=True)
STATIC = QuantSpec(INT8)
ALL = MomentSettings(fewest=1 << 20, most=1 << 20)


class Several(nn.Module):
    """Pictures through convolutions of all kinds and projections, two of which share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(12, 6, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.pointwise = nn.Conv2d(12, 6, 1)
        self.query, self.key = nn.Linear(6, 5), nn.Linear(6, 7)
        self.changed, self.value = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.grouped(self.strided(sample).relu())
        x = self.dilated(x) + self.pointwise(x)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        both = self.query(tokens).sum() + self.key(tokens).sum() + self.changed(tokens.clone()).sum()
        tokens.mul_(2)
        return both + self.value(tokens)


def model_and_calls(count: int = 3) -> tuple[Several, list[Any]]:
    draw = torch.Generator().manual_seed(0)
    model = Several()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return model, [((torch.randn(2, 4, 10, 10, generator=draw),), {}) for _ in range(count)]


def plans_of(model: nn.Module, spec: QuantSpec | None, scale: float = 0.05) -> dict[str, LayerPlan]:
    """Weights of 4 bits, inputs as `spec` says, all static scales the same."""
    plans = {}
    for name, layer in quantizable(model).items():
        plan = draft_layer(layer.weight, [layer.weight.shape[1]], asymmetric_integers(4, "channel")).plan()
        stored = {} if spec is None or spec.online else {"input_scale": torch.tensor([scale])}
        parts = tuple(replace(part, activation=spec) for part in plan.parts)
        plans[name] = replace(plan, parts=parts, tensors={**plan.tensors, **stored})
    return plans


def oracle(model: nn.Module, calls: list[Any], name: str, spec: QuantSpec | None, patches: bool) -> Tensor:
    """Mean of ``x x^T`` over all vectors, float64 [groups, n, n]."""
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for args, kwargs in calls:
        with torch.no_grad():
            model(*args, **kwargs)
    handle.remove()
    vectors = []
    for x in seen:
        if spec is not None:
            scale = None if spec.online else torch.tensor([0.05])
            x = fake_quantize_input(x, scale, None, spec.format.name, spec.online)
        x = x.double()
        if not isinstance(layer, nn.Conv2d):
            vectors.append(x.reshape(1, -1, x.shape[-1]))
            continue
        if patches:
            x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        x = x.flatten(2)  # [b, i * taps, places]
        vectors.append(x.transpose(1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1))
    every = torch.cat(vectors, dim=1)
    return every.mT @ every / every.shape[1]


def by_name(found: list[Moments]) -> dict[str, Moments]:
    return {name: one for one in found for name in one.source.names}


@pytest.mark.parametrize("patch_bytes", [1 << 26, 0])
@pytest.mark.parametrize("spec", [None, ONLINE, STATIC], ids=["float", "online", "static"])
def test_all_vectors_give_the_moments_in_float64(spec: QuantSpec | None, patch_bytes: int) -> None:
    model, calls = model_and_calls()
    found = by_name(list(gather(model, calls, plans_of(model, spec), replace(ALL, patch_bytes=patch_bytes))))
    assert list(found) == ["strided", "grouped", "dilated", "pointwise", "query", "key", "changed", "value"]
    for name, one in found.items():
        expected = oracle(model, calls, name, spec, patches=patch_bytes > 0)
        assert one.matrix.shape == expected.shape and one.matrix.dtype == torch.float32
        torch.testing.assert_close(
            one.matrix.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    assert found["strided"].source.patches == (patch_bytes > 0) and not found["pointwise"].source.patches
    assert found["query"].vectors == 3 * 2 * 25 and found["strided"].vectors == 3 * 2 * (
        25 if patch_bytes else 100
    )


def test_layers_share_where_they_read_and_round_the_same_tensor() -> None:
    model, calls = model_and_calls()

    def shared(plans: dict[str, LayerPlan]) -> list[tuple[str, ...]]:
        return [source.names for source in sources(model, calls[0], plans, ALL) if len(source.names) > 1]

    plans = plans_of(model, STATIC)
    assert shared(plans) == [
        ("query", "key")
    ]  # a copy is another tensor, and one that was changed in place is too
    other = {"input_scale": torch.tensor([0.06])}
    assert not shared(plans | {"key": replace(plans["key"], tensors={**plans["key"].tensors, **other})})


def test_query_key_and_value_of_a_transformer_share() -> None:
    model = tiny_pixart().transformer
    draw = torch.Generator().manual_seed(0)
    call: Any = (
        (torch.randn(2, 4, 8, 8, generator=draw),),
        {
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
            "timestep": torch.tensor([3, 3]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )
    names = {source.names for source in sources(model, call, plans_of(model, ONLINE), ALL)}
    own, text = (f"transformer_blocks.1.attn{n}.to_" for n in (1, 2))
    assert {(f"{own}q", f"{own}k", f"{own}v"), (f"{text}q",)} <= names
    assert sum(len(some) for some in names) == len(quantizable(model))
    assert any({f"{text}k", f"{text}v"} <= set(some) for some in names)


def unet_call() -> tuple[nn.Module, Any]:
    draw = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    return tiny_unet().unet, ((sample, torch.tensor([3, 3])), {"encoder_hidden_states": text})


def test_memory_decides_passes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = unet_call()
    plans, settings = plans_of(model, ONLINE), MomentSettings(fewest=40, most=60)
    calls = [call, call]
    once = list(gather(model, calls, plans, settings))
    found = [one.source for one in once]
    tight = replace(settings, memory_bytes=200_000)
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    apart = list(gather(model, calls, plans, tight, found))
    handle.remove()
    told = moments.cost(found, tight)
    assert len(ran) == 2 and told["passes"] > 3  # every call waits where matrices are used, and runs once
    assert moments.cost(found, settings)["passes"] == 1
    assert told["bytes"] == sum(one.matrix.nbytes for one in once) and told["layers"] == len(plans)
    assert told["bytes_at_once"] <= max(200_000, *(source.nbytes for source in found))
    for one, other in zip(once, apart, strict=True):
        assert one.source == other.source and torch.equal(one.matrix, other.matrix)
    # In pieces of few vectors: others are drawn, and as many.
    monkeypatch.setattr(moments, "_PIECE_BYTES", 4000)
    pieces = list(gather(model, calls, plans, settings))
    assert [one.vectors for one in pieces] == [one.vectors for one in once]


def test_calls_wait_where_they_hold_least() -> None:
    def source(name: str, columns: int, held: int) -> Source:
        return Source((name,), 1, columns, False, 8, held)

    found = [source(f"{n}", 10, held) for n, held in enumerate((9, 9, 1, 5, 3, 3, 9, 9))]
    ends = [[int(s.names[0]) for s in some][-1] for some in moments.passes(found, 4 * 400)]
    assert ends == [
        2,
        5,
        7,
    ]  # of the longest, 0 to 3, the end 2 holds least; then 4 and 5, of which 5 is longer
    assert [len(some) for some in moments.passes([source("a", 100, 1)] * 3, 400)] == [1, 1, 1]
    model, call = unet_call()
    held = [one.held for one in moments.sources(model, call, plans_of(model, ONLINE), MomentSettings())]
    assert held[0] < max(held) and min(held) > 0  # skip connections wait in the middle


def test_vectors_are_drawn_evenly_from_all_calls() -> None:
    model, calls = model_and_calls(4)
    found = by_name(list(gather(model, calls, plans_of(model, None), MomentSettings(fewest=100, most=100))))
    assert all(one.vectors == 100 for one in found.values())
    again = by_name(list(gather(model, calls, plans_of(model, None), MomentSettings(fewest=100, most=100))))
    other = by_name(list(gather(model, calls, plans_of(model, None), MomentSettings(100, 100, seed=1))))
    assert torch.equal(found["strided"].matrix, again["strided"].matrix)
    assert not torch.equal(found["strided"].matrix, other["strided"].matrix)
    expected = oracle(model, calls, "query", None, patches=True)
    assert (found["query"].matrix - expected).norm() < 0.5 * expected.norm()


def test_moments_serve_second_order_rounding_of_every_layer() -> None:
    model, call = unet_call()
    plans = plans_of(model, ONLINE)
    for patch_bytes in (1 << 26, 0):
        settings = MomentSettings(patch_bytes=patch_bytes)
        for one in gather(model, [call], plans, settings):
            for name in one.source.names:
                weight = model.get_submodule(name).weight
                draft = draft_layer(weight, [weight.shape[1]], asymmetric_integers(3, "channel"))
                found = round_second_order(draft, one.matrix, SecondOrderSettings())
                assert found.row_error.sum() < found.nearest_error.sum()


def test_bad_input_is_refused_by_name() -> None:
    model, calls = model_and_calls()
    plans = plans_of(model, None)
    with pytest.raises(ValueError, match="at least one calibration row"):
        next(gather(model, [], plans, ALL))
    model.add_module("unused", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'unused' must be called"):
        sources(model, calls[0], plans_of(model, None), ALL)
    smoothed = replace(plans["key"], smoothed=True)
    with pytest.raises(ValueError, match="layer 'key' must be rounded alike"):
        sources(model, calls[0], plans | {"key": smoothed}, ALL)
    model.pointwise.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="got NaN or Inf in layer 'query'"):
        list(gather(model, calls, plans, ALL))

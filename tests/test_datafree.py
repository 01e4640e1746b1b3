"""Quantization without data: what is chosen, what is left out, and that the search is the one of the recipes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difloat.checkpoint import data_free
from difloat.layers import packed, quantizable
from difloat.numbers.search import search
from difloat.plan.encode import dequantize
from difloat.plan.rules import block_rotation
from difloat.plan.scales import rows_of
from tiny import tiny_pixart, tiny_unet, tiny_vae


def settings(**values):
    return data_free.settings(values)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet().unet


@pytest.mark.parametrize(
    "values, message",
    [
        ({"weights": "e4m3", "bits": "w4a8"}, "bits must fit weights='e4m3'"),
        ({"activations": "e2m1", "bits": "w4a8"}, "bits must fit activations='e2m1'"),
        ({"weights": "uint4"}, "formats must be signed"),
        ({"weights": "four"}, "format must be"),
        ({"bits": "four"}, "bits must look like"),
        ({"outside": "drop"}, "option outside must be one of keep, 8bit"),
        ({"colour": "red"}, "options must be among"),
        ({"group_size": -1}, "must not be negative"),
        ({"target": "moon"}, "target must be one of"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(values, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings(**values)
    assert "\n" not in str(caught.value)


def test_widths_follow_from_formats() -> None:
    assert (settings().widths.weight, settings().widths.activation) == (4, 8)
    found = settings(weights="e3m2", activations="e2m3").widths
    assert (found.weight, found.activation) == (6, 6)
    assert settings(bits="w3a16").widths.activation is None


def test_blocks_are_quantized_and_what_a_model_has_once_is_kept(unet) -> None:
    decision = data_free.decide(unet, settings())
    kinds = {type(unet.get_submodule(name)) for name in decision.layers}
    assert kinds == {nn.Linear, nn.Conv2d}
    assert decision.layers.keys() | decision.skipped.keys() == packed.quantizable(
        unet
    ).keys() | quantizable.staying_float(unet)
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= decision.skipped.keys()
    everything = data_free.decide(unet, settings(outside="8bit"))
    assert everything.layers.keys() == packed.quantizable(unet).keys()
    plan = everything.layers["conv_in"](unet.conv_in.weight.detach())
    assert plan.parts[0].weight.format.bits == 8 and plan.parts[0].activation.online


def test_exclusion_by_name_part_and_pattern(unet) -> None:
    decision = data_free.decide(
        unet, settings(exclude=["resnets", "*.to_q", "mid_block.attentions.0.proj_in"])
    )
    excluded = {name for name, reason in decision.skipped.items() if reason == "excluded"}
    assert excluded == {
        name for name in packed.quantizable(unet)
        if "resnets" in name.split(".") or name.endswith(".to_q") or name == "mid_block.attentions.0.proj_in"
    }  # fmt: skip
    with pytest.raises(ValueError, match="must have a layer to quantize"):
        data_free.decide(unet, settings(exclude=["*"]))


def test_modules_of_float32_and_shared_weights_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    decision = data_free.decide(model, settings(), ["3"])
    assert list(decision.layers) == ["0"]
    assert decision.skipped["1"] == decision.skipped["2"] == "weight is shared with another module"
    assert decision.skipped["3"] == "kept in float32 by the model"


def test_the_plan_is_the_exact_search_and_beats_every_single_format() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) ** 3
    model = nn.Sequential(nn.Linear(20, 6))
    model[0].weight = nn.Parameter(weight)
    wanted = settings(group_size=8)
    plan = data_free.plan(model, wanted, progress=False)
    layer = plan.layers["0"]
    spec = layer.parts[0].weight
    best = search(rows_of(weight, spec), [spec.format])
    assert float((dequantize(layer) - weight).square().sum()) == pytest.approx(
        float(best.error.sum()), rel=1e-5
    )
    for name in ("e3m0", "e2m1", "e1m2"):
        single = data_free.plan(model, settings(weights=name, group_size=8), progress=False).layers["0"]
        assert single.parts[0].weight.format.name == name
        assert float((dequantize(single) - weight).square().sum()) >= float(best.error.sum()) * (1 - 1e-5)
    assert (plan.recipe, plan.bits, plan.options["group_size"]) == (data_free.RECIPE, "w4a8", 8)


def test_on_a_cpu_every_format_is_computed_in_integers() -> None:
    plan = data_free.plan(tiny_vae(), settings(target="cpu", bits="w8a8"), progress=False)
    for layer in plan.layers.values():
        assert (
            layer.parts[0].activation.format.int8_multiplier() or layer.parts[0].activation.format.bits == 8
        )
        assert layer.parts[0].activation.format.name == "e1m6"


def test_a_weight_that_is_not_finite_names_its_layer() -> None:
    model = tiny_pixart().transformer
    model.transformer_blocks[0].attn1.to_q.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1.to_q"):
        data_free.plan(model, settings(), progress=False)


def test_rotated_layers_are_those_of_the_blocks_and_stay_near_their_weights() -> None:
    model = tiny_pixart().transformer
    plain, turned = (
        data_free.plan(model, settings(bits="w4a4", outside="8bit", **more), progress=False)
        for more in ({}, {"rotate": True})
    )
    inside = set(packed.inside_blocks(model))
    for name, layer in turned.layers.items():
        shape = tuple(packed.weight_of(model, name).shape)
        wanted = block_rotation(shape) if name in inside else None
        assert layer.rotation == wanted and plain.layers[name].rotation is None
        weight = packed.weight_of(model, name).detach()
        assert (dequantize(layer) - weight).square().sum() < 0.03 * weight.square().sum()
        assert layer.nbytes == plain.layers[name].nbytes
    assert any(layer.rotation is not None for layer in turned.layers.values())

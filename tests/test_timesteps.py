"""Layers whose weight depends on the timestep: the right one is taken, stored, verified and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import install, layers
from difloat.formats import parse
from difloat.quantizer import LayerPlan, Plan, dequantize, join_variants, plan_layer
from difloat.specs import Part, QuantSpec
from difloat.timesteps import Clock

GRID = (0.0, 100.0, 500.0, 900.0)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(sample), self.conv(sample[:, :3, None, None].expand(-1, -1, 4, 4))


def stretched(weight: Tensor, factors: Tensor, schedule: tuple[int, ...]) -> LayerPlan:
    part = Part(
        weight.shape[1], QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("int8"), "token", online=True)
    )
    plans = []
    for factor in factors:
        divided = weight / factor.reshape(1, -1, *[1] * (weight.dim() - 2))
        plans.append(plan_layer(divided, [part], [divided.flatten(1).abs().amax(1) / 6]))
    return join_variants(plans, schedule, factors)


def quantized() -> tuple[Denoiser, Plan, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Denoiser()
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("proj", "conv")}
    entries = {
        "proj": stretched(weights["proj"], torch.rand(3, 6) + 0.5, (0, 1, 1, 2)),
        "conv": stretched(weights["conv"], torch.rand(1, 3) + 0.5, ()),
    }
    plan = Plan("test", "w4a8", entries, timesteps=GRID)
    difloat.apply(model, plan)
    return model, plan, weights


def by_hand(layer: LayerPlan, number: int, x: Tensor, bias: Tensor) -> Tensor:
    one = layer.variant(number)
    factor = one.tensors["input_factor"]
    x = x * factor
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    return rounded @ (dequantize(one) / factor).T + bias


@pytest.mark.parametrize(
    ("timestep", "number"), [(0.0, 0), (40.0, 0), (60.0, 1), (600.0, 1), (800.0, 2), (2000.0, 2)]
)
def test_the_nearest_timestep_chooses_the_weight(timestep, number, generator) -> None:
    model, plan, _ = quantized()
    x = torch.randn(5, 6, generator=generator)
    expected = by_hand(plan.layers["proj"], number, x, model.proj.bias)
    for value in (timestep, torch.tensor(timestep), torch.full((5,), timestep)):
        torch.testing.assert_close(model(x, value)[0], expected)
    torch.testing.assert_close(model(timestep=torch.tensor([timestep]), sample=x)[0], expected)


def test_smoothing_undoes_itself(generator) -> None:
    model, plan, weights = quantized()
    for name, layer in plan.layers.items():
        for number in range(layer.variants):
            error = (dequantize(layer.variant(number)) - weights[name]).norm() / weights[name].norm()
            assert float(error) < 0.2
    x = torch.randn(5, 6, generator=generator)
    plain = Denoiser()
    biases = {f"{name}.bias": getattr(model, name).bias for name in weights}
    plain.load_state_dict({**{f"{name}.weight": weight for name, weight in weights.items()}, **biases})
    with torch.no_grad():
        results = list(zip(model(x, 0.0), plain(x, 0.0), strict=True))
    for got, exact in results:
        assert float((got - exact).norm() / exact.norm()) < 0.3


def test_save_verify_load_give_the_same_bits(tmp_path, generator) -> None:
    model, plan, _ = quantized()
    difloat.save(model, tmp_path / "a")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "a"))
    loaded = difloat.load(tmp_path / "a", into=Denoiser())
    x = torch.randn(5, 6, generator=generator)
    for timestep in GRID:
        for got, expected in zip(loaded(x, timestep), model(x, timestep), strict=True):
            assert torch.equal(got, expected)
    difloat.save(loaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_a_shadow_has_a_clock_of_its_own(generator) -> None:
    model, plan, _ = quantized()
    twin = install.shadow(model)
    x = torch.randn(5, 6, generator=generator)
    model(x, 0.0)
    twin(x, 900.0)
    torch.testing.assert_close(model.proj(x), by_hand(plan.layers["proj"], 0, x, model.proj.bias))


def test_what_cannot_be_done_is_said(generator) -> None:
    model, plan, _ = quantized()
    x = torch.randn(2, 6, generator=generator)
    with pytest.raises(RuntimeError, match="must be called by its denoiser"):
        model.proj(x)
    with pytest.raises(ValueError, match="all rows of a call must have one timestep"):
        model(x, torch.tensor([0.0, 900.0]))
    with pytest.raises(ValueError, match="'proj' has one per stretch"):
        difloat.restore(model)
    assert isinstance(model.proj, layers.QuantLinear)
    with pytest.raises(ValueError, match="forward of Linear must have a parameter called timestep"):
        Clock(nn.Linear(2, 2), GRID)
    with pytest.raises(ValueError, match="an entry for each of the 3 timesteps"):
        Plan("test", "w4a8", plan.layers, timesteps=GRID[:3])

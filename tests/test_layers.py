"""Quantized layers: which layers, which blocks, and that a packed layer computes what its fake-quantized twin computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from difloat.kernels.dispatch import use_backend
from difloat.layers import install, packed
from difloat.layers.packed import QuantConv2d, QuantLinear
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.scales import fake_quantize
from difloat.plan.specs import Part, QuantSpec

E2M1 = QuantSpec(parse("e2m1"), "channel")
STATIC = QuantSpec(parse("e4m3"))


def rounded(weight: Tensor, parts: tuple[Part, ...]) -> LayerPlan:
    """A layer plan with plain largest-magnitude scales; static inputs get 0.01 and -0.5 as scale and zero point."""
    pieces = weight.detach().split([part.channels for part in parts], dim=1)
    scales = []
    for piece, part in zip(pieces, parts, strict=True):
        largest = piece.abs().max() if part.weight.granularity == "tensor" else piece.flatten(1).abs().amax(1)
        scales.append(largest / part.weight.format.max)
    static = [part.activation is not None and not part.activation.online for part in parts]
    shifted = [part.activation is not None and part.activation.zero_point for part in parts]
    return plan_layer(
        weight.detach(),
        parts,
        scales,
        input_scales=[torch.tensor(0.01) if there else None for there in static],
        input_zero_points=[
            torch.tensor(-0.5) if a and b else None for a, b in zip(static, shifted, strict=True)
        ],
    )


def plan_of(model: nn.Module, activation: QuantSpec | None = STATIC) -> Plan:
    found = packed.quantizable(model)
    return Plan(
        "test",
        "w4a8",
        {n: rounded(m.weight, (Part(m.weight.shape[1], E2M1, activation),)) for n, m in found.items()},
    )


@pytest.fixture
def on_reference():
    """The definition computes, whose results are those of fake quantization bit for bit."""
    with use_backend("reference"):
        yield


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(6 * 16, 5),
            nn.Linear(5, 4, bias=False),
        )


@pytest.fixture
def picture(generator) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=generator)


def test_quantizable_takes_plain_layers_only() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "renamed": Renamed(2, 2),
            "scaled": Scaled(2, 2),
            "conv": nn.Conv2d(2, 2, 1),
            "transposed": nn.ConvTranspose2d(2, 2, 1),
            "one_dimensional": nn.Conv1d(2, 2, 1),
            "norm": nn.LayerNorm(2),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    assert list(packed.quantizable(model)) == ["linear", "renamed", "conv"]


@pytest.mark.parametrize("build", [tiny.tiny_unet, tiny.tiny_ddim, tiny.tiny_pixart])
def test_blocks_partition_the_layers_of_a_denoiser(build) -> None:
    pipeline = build()
    denoiser = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    units = packed.blocks(denoiser)
    assert [name for names in units.values() for name in names] != []
    assert sorted(name for names in units.values() for name in names) == sorted(packed.quantizable(denoiser))
    assert any(len(names) >= 4 for names in units.values())
    for unit, names in units.items():
        assert names == [unit] or all(name.startswith(unit + ".") for name in names)


def test_blocks_of_known_families() -> None:
    pixart = packed.blocks(tiny.tiny_pixart().transformer)
    assert {"transformer_blocks.0", "transformer_blocks.1"} <= set(pixart)
    assert {name.removeprefix("transformer_blocks.0.") for name in pixart["transformer_blocks.0"]} >= {
        "attn1.to_q",
        "attn2.to_v",
        "ff.net.2",
    }
    unet = packed.blocks(tiny.tiny_unet().unet)
    assert set(unet["down_blocks.0.resnets.0"]) == {
        f"down_blocks.0.resnets.0.{n}" for n in ("conv1", "time_emb_proj", "conv2")
    }
    assert unet["conv_in"] == ["conv_in"]


def test_shadow_shares_storage_and_leaves_the_original(model, picture) -> None:
    before = model(picture)
    shadow = install.shadow(model)
    assert [p.data_ptr() for p in shadow.parameters()] == [p.data_ptr() for p in model.parameters()]
    install.apply(shadow, plan_of(shadow))
    assert isinstance(shadow[3], QuantLinear) and type(model[3]) is nn.Linear
    assert shadow[3].bias is model[3].bias
    assert torch.equal(model(picture), before) and not torch.equal(shadow(picture), before)


def test_apply_then_restore_gives_plain_layers_with_rounded_weights(model, picture) -> None:
    plan = plan_of(model, activation=None)
    quantized = install.apply(copy.deepcopy(model), plan)(picture)
    restored = install.restore(install.apply(model, plan))
    assert [type(m) for m in restored] == [nn.Conv2d, nn.SiLU, nn.Flatten, nn.Linear, nn.Linear]
    assert torch.equal(restored[3].weight, dequantize(plan.layers["3"]))
    assert torch.equal(restored(picture), quantized)
    assert list(restored.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias", "4.weight"]


def test_restore_in_half_precision_runs(model, picture) -> None:
    restored = install.restore(install.apply(model, plan_of(model)), torch.bfloat16)
    assert {p.dtype for p in restored.parameters()} == {torch.bfloat16}
    assert restored(picture.bfloat16()).isfinite().all()


def test_plan_of_another_model_is_refused_and_changes_nothing(model, picture) -> None:
    before, good = model(picture), plan_of(model)
    misfits = {"9": good.layers["0"], "4": good.layers["3"]}
    for name, layer in misfits.items():
        wrong = Plan("test", "w4a8", {"0": good.layers["0"], name: layer})
        with pytest.raises(ValueError, match=f"plan must fit the model, but '{name}'"):
            install.apply(model, wrong)
        assert not any(isinstance(m, packed.QuantizedLayer) for m in model.modules())
    assert torch.equal(model(picture), before)
    install.apply(model, good)
    with pytest.raises(ValueError, match="not yet quantized"):
        install.apply(model, good)


def test_install_refuses_what_is_no_such_layer(model) -> None:
    plan = plan_of(model)
    with pytest.raises(ValueError, match="got '1'"):
        install.install(model, "1", plan.layers["0"])
    with pytest.raises(ValueError, match=r"layer '4' must have the planned shape \(5, 96\), got \(4, 5\)"):
        install.install(model, "4", plan.layers["3"])


def twin_input(x: Tensor, part: Part) -> Tensor:
    """What the part's activation spec says, by `fake_quantize`."""
    spec = part.activation
    if spec is None:
        return x
    if spec.granularity == "group":
        axis = -1 if x.dim() < 4 else 1
        token = Part(part.channels, part.weight, replace(spec, granularity="token", group_size=None))
        return torch.cat([twin_input(group, token) for group in x.split(spec.group_size, axis)], axis)
    if spec.online:
        axes = tuple(range(x.dim())) if spec.granularity == "tensor" else (-1,) if x.dim() < 4 else (1, 2, 3)
        if spec.zero_point:
            low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
            return fake_quantize(x, spec.format, (high - low) / spec.format.max, low)
        return fake_quantize(x, spec.format, x.abs().amax(axes, keepdim=True) / spec.format.max)
    return fake_quantize(
        x, spec.format, torch.tensor([0.01]), torch.tensor([-0.5]) if spec.zero_point else None
    )


ACTIVATIONS = {
    "none": None,
    "static": STATIC,
    "shifted": QuantSpec(parse("ue4m3"), zero_point=True),
    "online": QuantSpec(parse("int8"), online=True),
    "token": QuantSpec(parse("e3m2"), "token", online=True),
    "asymmetric token": QuantSpec(parse("uint8"), "token", online=True, zero_point=True),
    "groups": QuantSpec(parse("e2m3"), "group", 4, online=True),
    "asymmetric groups": QuantSpec(parse("uint4"), "group", 4, online=True, zero_point=True),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_linear_equals_its_fake_quantized_twin(activation, bias, on_reference, generator) -> None:
    plain = nn.Linear(11, 5, bias=bias)
    part = Part(11, E2M1, activation)
    model = nn.Sequential(plain)
    install.install(model, "0", rounded(plain.weight, (part,)))
    for shape in [(7, 11), (2, 3, 11), (1, 11)]:
        x = torch.randn(shape, generator=generator)
        assert torch.equal(model(x), F.linear(twin_input(x, part), dequantize(model[0].plan()), plain.bias))


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"stride": 2}, {"padding": 1, "padding_mode": "circular"}, {"groups": 2}],
    ids=str,
)
def test_convolution_equals_its_fake_quantized_twin(options, activation, on_reference, generator) -> None:
    plain = nn.Conv2d(6, 4, 3, **options)
    part = Part(plain.weight.shape[1], E2M1, activation)
    model = nn.Sequential(plain)
    install.install(model, "0", rounded(plain.weight, (part,)))
    twin = copy.deepcopy(plain)
    twin.weight.data = dequantize(model[0].plan())
    x = torch.randn(2, 6, 5, 5, generator=generator)
    assert isinstance(model[0], QuantConv2d)
    assert torch.equal(model(x), twin(twin_input(x, part)))


@pytest.mark.parametrize("kernel", [None, 3])
def test_parts_are_rounded_each_on_its_own(kernel, generator) -> None:
    parts = (
        Part(3, E2M1, ACTIVATIONS["shifted"]),
        Part(4, QuantSpec(parse("int6")), ACTIVATIONS["none"]),
        Part(2, QuantSpec(parse("e3m0"), "channel"), ACTIVATIONS["static"]),
    )
    plain = nn.Linear(9, 5) if kernel is None else nn.Conv2d(9, 5, kernel)
    x = (
        torch.randn(4, 9, generator=generator)
        if kernel is None
        else torch.randn(2, 9, 4, 4, generator=generator)
    )
    model = nn.Sequential(plain)
    install.install(model, "0", rounded(plain.weight, parts))
    split = x.split([3, 4, 2], dim=1)
    twin = copy.deepcopy(plain)
    twin.weight.data = dequantize(model[0].plan())
    expected = twin(torch.cat([twin_input(*pair) for pair in zip(split, parts, strict=True)], dim=1))
    # One sum over all channels against one per part: a few roundings of float32.
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))


def test_state_survives_deepcopy_state_dict_and_plan(model, picture) -> None:
    plan = plan_of(model, ACTIVATIONS["shifted"])
    install.apply(model, plan)
    expected = model(picture)
    other = copy.deepcopy(model)
    assert torch.equal(other(picture), expected)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.zero_()
    assert other.load_state_dict(model.state_dict()) and torch.equal(other(picture), expected)
    for name, layer in plan.layers.items():
        again = model.get_submodule(name).plan()
        assert (again.kind, again.shape, again.parts) == (layer.kind, layer.shape, layer.parts)
        assert all(torch.equal(again.tensors[key], layer.tensors[key]) for key in layer.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_float32_when_the_model_changes_dtype(model, picture, dtype) -> None:
    install.apply(model, plan_of(model, ACTIVATIONS["shifted"]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    assert model[0].weight.dtype == torch.uint8 and model[0].bias.dtype == dtype
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name
    assert model(picture.to(dtype)).dtype == dtype
    assert {buffer.device.type for buffer in model.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_at_most_twice_as_far_off_as_the_plain_product(dtype, generator) -> None:
    plain = nn.Linear(64, 16)
    model = nn.Sequential(plain)
    install.install(model, "0", rounded(plain.weight, (Part(64, E2M1, None),)))
    x, weight = torch.randn(32, 64, generator=generator).to(dtype), dequantize(model[0].plan())
    exact = F.linear(x.double(), weight.double(), plain.bias.double())
    half = F.linear(x, weight.to(dtype), plain.bias.to(dtype))
    assert model(x).dtype == dtype
    assert (model(x) - exact).abs().max() <= 2 * (half - exact).abs().max()


def test_input_gradient_is_straight_through(generator) -> None:
    plain = nn.Linear(6, 3)
    model = nn.Sequential(plain)
    install.install(model, "0", rounded(plain.weight, (Part(6, E2M1, STATIC),)))
    x = (10 * torch.randn(4, 6, generator=generator)).requires_grad_()  # the input scale clips at 4.8
    model(x).sum().backward()
    inside = (x.detach().abs() / 0.01 <= 480).float()
    assert 0 < inside.mean() < 1
    assert torch.allclose(x.grad, dequantize(model[0].plan()).sum(0) * inside)

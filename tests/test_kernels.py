"""Operators: legal for `torch.compile`, and the reference equals `scales.fake_quantize` bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from difloat.kernels import operators, reference
from difloat.layers import install
from difloat.layers import packed as layers
from difloat.numbers.formats import parse
from difloat.numbers.packing import pack
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.scales import fake_quantize
from difloat.plan.specs import Part, QuantSpec


def packed(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    return pack(
        torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int16).to(torch.uint8), bits
    )


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["e2m1", "e3m2"])
def test_dequantize_is_a_legal_operator(name, shape, device, generator) -> None:
    weight = packed(shape, parse(name).bits, generator).to(device)
    torch.library.opcheck(
        operators.dequantize, (weight, torch.ones(1, device=device), None, name, shape[1], 0)
    )
    groups = torch.rand(shape[0] * -(-shape[1] // 2), generator=generator).to(device)
    torch.library.opcheck(operators.dequantize, (weight, groups, groups - 0.5, name, shape[1], 2))


INPUTS = {
    "tokens": lambda g: torch.randn(2, 5, 7, generator=g),
    "one token": lambda g: torch.randn(1, 7, generator=g),
    "picture": lambda g: torch.randn(2, 3, 4, 4, generator=g),
    "channels last": lambda g: torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
    "transposed": lambda g: torch.randn(7, 5, generator=g).t(),
    "half": lambda g: torch.randn(3, 7, generator=g).half(),
    "with gradient": lambda g: torch.randn(3, 7, generator=g).requires_grad_(),
}


@pytest.mark.parametrize("build", INPUTS.values(), ids=INPUTS)
def test_fake_quantize_input_is_a_legal_operator(build, device, generator) -> None:
    x = build(generator).detach().to(device).requires_grad_(build(generator).requires_grad)
    scale, zero_point = torch.tensor([0.3], device=device), torch.tensor([-0.7], device=device)
    shifted, token = (scale, zero_point, "ue2m2", False), (None, None, "int8", True)
    for arguments in (shifted, token):
        torch.library.opcheck(operators.fake_quantize_input, (x, *arguments))


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e2m3", "e4m3", "int3", "int8", "ue1m3"])
@pytest.mark.parametrize("shape", [(4, 9), (3, 9, 3, 3)], ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("channel", None), ("group", 4)])
def test_dequantize_equals_the_plan(granularity, group_size, shape, name, device, generator) -> None:
    spec = QuantSpec(parse(name), granularity, group_size, zero_point=True)
    count = spec.scale_count(*shape[:2])
    scale, zero = torch.rand(count, generator=generator) + 0.1, torch.randn(count, generator=generator)
    weight = torch.randn(shape, generator=generator)
    layer = plan_layer(weight, [Part(9, spec)], [scale], weight_zero_points=[zero])
    stored = [layer.tensors[key].to(device) for key in ("weight", "weight_scale", "weight_zero_point")]
    assert torch.equal(operators.dequantize(*stored, name, 9, group_size or 0).cpu(), dequantize(layer))


@pytest.mark.parametrize("zero_point", [None, -0.4])
@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "e4m3", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_input_equals_fake_quantize(dtype, name, zero_point, device, generator, monkeypatch) -> None:
    x = (3 * torch.randn(3, 50, generator=generator)).to(device, dtype)
    scale = torch.tensor([0.23], device=device)
    zero = None if zero_point is None else torch.tensor([zero_point], device=device)
    expected = fake_quantize(x.float(), parse(name), scale, zero).to(dtype)
    assert torch.equal(operators.fake_quantize_input(x, scale, zero, name, False), expected)
    monkeypatch.setattr(reference, "_CHUNK_VALUES", 16)  # 150 values: nine whole chunks and a rest
    assert torch.equal(operators.fake_quantize_input(x, scale, zero, name, False), expected)


def test_more_than_one_chunk_of_the_real_size(generator) -> None:
    x, scale = torch.randn(reference._CHUNK_VALUES + 3, generator=generator), torch.tensor([0.1])
    assert torch.equal(
        operators.fake_quantize_input(x, scale, None, "e4m3", False), fake_quantize(x, parse("e4m3"), scale)
    )


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 6), (1, 1, 6)], ids=str)
def test_every_token_has_its_own_online_scale(shape, generator) -> None:
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.arange(shape[-2])[:, None] * 3.0)
    scale = x.abs().amax(-1, keepdim=True) / 6
    assert torch.equal(
        operators.fake_quantize_input(x, None, None, "e2m1", True), fake_quantize(x, parse("e2m1"), scale)
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_is_one_token_of_a_convolution(batch, generator) -> None:
    x = (
        torch.randn(batch, 2, 4, 4, generator=generator)
        * torch.tensor([1.0, 50.0, 0.1])[:batch, None, None, None]
    )
    scale = x.abs().amax((1, 2, 3), keepdim=True) / 127
    assert torch.equal(
        operators.fake_quantize_input(x, None, None, "int8", True), fake_quantize(x, parse("int8"), scale)
    )


def test_online_scale_of_the_tensor_reaches_its_largest_value(generator) -> None:
    x = torch.randn(5, 6, generator=generator)
    rounded = operators.fake_quantize_input(x, None, None, "e4m3", False)
    assert rounded.abs().max() == x.abs().max()


@pytest.mark.parametrize("name", ["uint4", "ue2m2", "int4"])
def test_an_asymmetric_online_grid_reaches_both_ends_of_every_token(name, generator) -> None:
    x = 5 + torch.randn(7, 20, generator=generator) * torch.exp2(torch.arange(7)[:, None] * 2.0)
    x[3] = 2.5  # all equal: comes back as it is
    rounded = operators.fake_quantize_input(x, None, None, name, True, 0, True)
    torch.testing.assert_close(rounded.amin(1), x.amin(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded.amax(1), x.amax(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(rounded[3], x[3])
    step = (
        (x.amax(1) - x.amin(1))
        / (parse(name).max - parse(name).min)
        * max(b - a for a, b in pairwise(parse(name).values))
    )
    assert bool(((rounded - x).abs() <= step[:, None] / 2 * 1.001).all())


def test_every_group_of_a_token_has_its_own_online_scale(generator) -> None:
    x = torch.randn(3, 10, generator=generator) * torch.exp2(torch.arange(10.0))
    rounded = operators.fake_quantize_input(x, None, None, "e2m1", True, 4)
    pieces = [operators.fake_quantize_input(piece, None, None, "e2m1", True) for piece in x.split(4, 1)]
    assert torch.equal(rounded, torch.cat(pieces, 1))
    assert not torch.equal(rounded, operators.fake_quantize_input(x, None, None, "e2m1", True))


@pytest.mark.parametrize("per_token", [True, False])
def test_zeros_stay_zero(per_token) -> None:
    x = torch.zeros(3, 4)
    x[1] = torch.tensor([1.0, -2.0, 0.0, 6.0])
    rounded = operators.fake_quantize_input(x, None, None, "e2m1", per_token)
    assert torch.equal(rounded, x)
    assert torch.equal(
        operators.fake_quantize_input(torch.zeros(3, 4), None, None, "e2m1", per_token), torch.zeros(3, 4)
    )


def test_input_is_left_as_it_was(generator) -> None:
    x = torch.randn(4, 6, generator=generator)
    kept = x.clone()
    for scale, per_token in [(torch.tensor([0.5]), False), (None, False), (None, True)]:
        operators.fake_quantize_input(x, scale, None, "e2m1", per_token)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "activation", [QuantSpec(parse("e4m3")), QuantSpec(parse("int8"), "token", online=True)]
)
def test_compiled_layers_have_no_graph_break_and_the_same_result(activation, generator) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 6)
    )
    for name, module in layers.quantizable(model).items():
        cut = module.weight.shape[1] // 2
        parts = [
            Part(cut, QuantSpec(parse("e2m1")), activation),
            Part(module.weight.shape[1] - cut, QuantSpec(parse("int6")), activation),
        ]
        scales = [torch.tensor([0.1])] * 2
        install.install(
            model,
            name,
            plan_layer(
                module.weight.detach(),
                parts,
                scales,
                input_scales=[None if activation.online else s for s in scales],
            ),
        )
    x = torch.randn(2, 3, 4, 4, generator=generator)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))

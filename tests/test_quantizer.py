"""Scales, shapes, codes: what a plan stores is what fake quantization computes, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from difloat.checkpoint.plan_config import quantization_config
from difloat.numbers import formats, rounding
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan, LayerSpec, Plan
from difloat.plan.scales import expand_scale, fake_quantize, rows_of
from difloat.plan.specs import Part, QuantSpec, layer_tensor_shapes
from difloat.plan.validation import plain, read

FORMATS = [
    "e2m1",
    "e3m0",
    "e1m2",
    "e4m3",
    "e5m2",
    "e4m3fn",
    "e3m2",
    "ue2m2",
    "ue1m3",
    "int4",
    "int8",
    "int3",
    "uint4",
    "uint1",
]
LAYOUTS = [("tensor", None), ("channel", None), ("group", 4), ("group", 1), ("group", 64)]
SHAPES = [(5, 10), (1, 1), (4, 6, 3, 3), (3, 7, 1, 1)]


def scales_for(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Plausible scales and zero points: the largest magnitude of each row on the largest value, rows shifted if asked."""
    rows = rows_of(weight, spec)
    zero = rows.amin(1) if spec.zero_point else torch.zeros(len(rows))
    largest = (rows - zero[:, None]).abs().amax(1)
    return torch.where(largest > 0, largest / spec.format.max, 1.0), zero


def planned(weight: Tensor, parts: Sequence[Part]) -> tuple[LayerPlan, Tensor]:
    """A layer plan, and the same weight by fake quantization of each part."""
    pieces = weight.split([part.channels for part in parts], dim=1)
    found = [scales_for(piece, part.weight) for piece, part in zip(pieces, parts, strict=True)]
    layer = plan_layer(weight, parts, [s for s, _ in found], weight_zero_points=[z for _, z in found])
    twins = []
    for piece, part, (scale, zero) in zip(pieces, parts, found, strict=True):
        scale_here, zero_here = (expand_scale(v, part.weight, piece.shape) for v in (scale, zero))
        twins.append(
            fake_quantize(
                piece, part.weight.format, scale_here, zero_here if part.weight.zero_point else None
            )
        )
    return layer, torch.cat(twins, dim=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_packed_weight_equals_fake_quantization(name, granularity, group_size, shape, generator) -> None:
    format = parse(name)
    spec = QuantSpec(format, granularity, group_size, zero_point=not format.signed)
    weight = torch.randn(shape, generator=generator)
    layer, twin = planned(weight, [Part(shape[1], spec)])
    assert torch.equal(dequantize(layer), twin)
    assert layer.kind == ("linear" if len(shape) == 2 else "conv2d")


@pytest.mark.parametrize("shape", [(4, 11), (3, 11, 3, 3)], ids=str)
def test_parts_have_their_own_formats(shape, generator) -> None:
    parts = [
        Part(4, QuantSpec(parse("e2m1"), "channel")),
        Part(5, QuantSpec(parse("ue2m1"), "group", 2, zero_point=True)),
        Part(2, QuantSpec(parse("int6"), "tensor", zero_point=True)),
    ]
    layer, twin = planned(torch.randn(shape, generator=generator), parts)
    assert torch.equal(dequantize(layer), twin)
    assert [tuple(codes.shape[:2]) for codes in layer.codes()] == [
        (shape[0], 4),
        (shape[0], 5),
        (shape[0], 2),
    ]
    kernel = 9 if len(shape) == 4 else 1
    assert (
        layer.tensors["weight"].numel() == shape[0] * (2 + 2 + 2) * kernel
    )  # 4 x 4 bits, 5 x 3 bits, 2 x 6 bits
    assert layer.nbytes == layer.tensors["weight"].nbytes + 4 * (shape[0] + 3 * shape[0] + 1) + 4 * (
        3 * shape[0] + 1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_planned_in_float32(dtype, generator) -> None:
    weight = torch.randn(4, 8, generator=generator).to(dtype)
    spec = QuantSpec(parse("e2m1"), "channel")
    layer, _ = planned(weight, [Part(8, spec)])
    other, _ = planned(weight.float(), [Part(8, spec)])
    assert torch.equal(layer.tensors["weight"], other.tensors["weight"])


def test_planning_again_from_the_dequantized_weight_changes_nothing(generator) -> None:
    spec = QuantSpec(parse("e2m1"), "group", 3)
    weight = torch.randn(4, 7, generator=generator)
    scale, _ = scales_for(weight, spec)
    scale = torch.exp2(scale.log2().ceil())  # a power of two: the division gives the value on the grid back
    first = plan_layer(weight, [Part(7, spec)], [scale])
    second = plan_layer(dequantize(first), [Part(7, spec)], [scale])
    assert torch.equal(first.tensors["weight"], second.tensors["weight"])


@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_half_a_step(name, generator) -> None:
    format, scale = parse(name), torch.tensor(0.37)
    x = (torch.rand(2000, generator=generator) * (format.max - format.min) + format.min) * scale
    error = (fake_quantize(x, format, scale) - x).abs()
    half_step = (
        torch.tensor(format.values).diff()[
            torch.bucketize(x / scale, torch.tensor(format.values)).sub(1).clamp_min(0)
        ]
        / 2
    )
    assert (error <= half_step * scale * (1 + 1e-5) + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("exponent", [-3, 1, 10])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int4", "ue2m2"])
def test_scaling_by_a_power_of_two_scales_the_result(name, exponent, generator) -> None:
    x, scale = torch.randn(300, generator=generator), torch.tensor(0.21)
    plain = fake_quantize(x, parse(name), scale)
    assert torch.equal(
        fake_quantize(x * 2.0**exponent, parse(name), scale * 2.0**exponent), plain * 2.0**exponent
    )


def test_zero_point_moves_the_grid() -> None:
    x = torch.tensor([-1.0, -0.9, 0.0, 0.55, 9.0])
    result = fake_quantize(x, parse("uint2"), torch.tensor(0.5), torch.tensor(-1.0))
    assert result.tolist() == [-1.0, -1.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "int4"])
def test_gradient_to_the_input_is_the_clipped_identity(name) -> None:
    format = parse(name)
    low, high = format.min * 0.5, format.max * 0.5
    x = torch.tensor([low - 1, low, low / 2 + high / 3, high, high + 1], requires_grad=True)
    fake_quantize(x, format, torch.tensor(0.5)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "ue2m2", "int4"])
def test_gradient_to_the_scale_is_that_of_lsq(name, generator) -> None:
    format = parse(name)
    x = 8 * torch.randn(200, generator=generator, dtype=torch.float64)
    scale = torch.full((200,), 0.7, dtype=torch.float64, requires_grad=True)
    fake_quantize(x, format, scale).sum().backward()
    grid = x / 0.7
    inside = (grid >= format.min) & (grid <= format.max)
    rounded = rounding.round_to(grid, format)
    assert torch.allclose(scale.grad, torch.where(inside, rounded - grid, rounded))  # arXiv:1902.08153 Eq. 3


def test_gradient_to_the_scale_equals_finite_differences_where_the_input_is_clipped() -> None:
    x = torch.tensor([9.0, -20.0], dtype=torch.float64)
    scale, step = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True), 1e-4
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    (fake_quantize(x, parse("e2m1"), scale) * weights).sum().backward()
    plain = scale.detach()
    upper, lower = (fake_quantize(x, parse("e2m1"), plain + d) * weights for d in (step, -step))
    assert torch.allclose(scale.grad, (upper - lower) / (2 * step))


def test_gradient_to_the_zero_point_is_one_where_the_input_is_clipped() -> None:
    zero = torch.zeros(3, requires_grad=True)
    fake_quantize(torch.tensor([-4.0, 1.2, 40.0]), parse("uint4"), torch.tensor(1.0), zero).sum().backward()
    assert zero.grad is not None and zero.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), ()], ids=str)
def test_empty_and_one_element_input(shape) -> None:
    result = fake_quantize(torch.full(shape, 0.9), parse("e2m1"), torch.tensor(1.0))
    assert torch.equal(result, torch.ones(shape))


def test_non_contiguous_input_keeps_its_values(generator) -> None:
    x = torch.randn(6, 4, generator=generator)
    scale = torch.tensor(0.3)
    assert torch.equal(fake_quantize(x.t(), parse("e3m2"), scale), fake_quantize(x, parse("e3m2"), scale).t())
    spec = QuantSpec(parse("e3m2"), "channel")
    strided, plain = (planned(w, [Part(6, spec)])[0].tensors["weight"] for w in (x.t(), x.t().contiguous()))
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), LAYOUTS)
def test_rows_and_scales_agree_on_what_shares_a_scale(granularity, group_size, shape) -> None:
    spec = QuantSpec(parse("e2m1"), granularity, group_size)
    count = spec.scale_count(*shape[:2])
    owner = expand_scale(torch.arange(1.0, count + 1), spec, shape).expand(shape)
    rows = rows_of(owner, spec)
    assert len(rows) == count
    for index, row in enumerate(rows, start=1):
        assert set(row.tolist()) <= {0.0, float(index)}  # zero is the padding of the last group
        assert (row == index).sum() == (owner == index).sum()


ACTIVATIONS = [
    None,
    QuantSpec(parse("e4m3")),
    QuantSpec(parse("ue4m3"), zero_point=True),
    QuantSpec(parse("int8"), online=True),
    QuantSpec(parse("int8"), "token", online=True),
    QuantSpec(parse("uint8"), "token", online=True, zero_point=True),
    QuantSpec(parse("uint8"), "group", 4, online=True, zero_point=True),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("granularity", "group_size"), LAYOUTS)
def test_specs_and_parts_survive_json(granularity, group_size, activation) -> None:
    part = Part(12, QuantSpec(parse("ue2m2"), granularity, group_size, zero_point=True), activation)
    assert read(Part, json.loads(json.dumps(plain(part)))) == part


def test_layer_plan_survives_json(generator) -> None:
    parts = (
        Part(4, QuantSpec(parse("e2m1"), "channel"), ACTIVATIONS[2]),
        Part(3, QuantSpec(parse("int8")), ACTIVATIONS[1]),
    )
    layer = plan_layer(
        torch.randn(2, 7, generator=generator),
        parts,
        [torch.ones(2), torch.ones(1)],
        input_scales=[torch.tensor(0.5), torch.tensor(2.0)],
        input_zero_points=[torch.tensor(-1.0), None],
    )
    assert {name: tuple(t.shape) for name, t in layer.tensors.items()} == layer_tensor_shapes((2, 7), parts)
    again = read(LayerSpec, json.loads(json.dumps(plain(layer)))).with_tensors(layer.tensors)
    assert (again.kind, again.shape, again.parts) == (layer.kind, layer.shape, layer.parts)
    plan = Plan("lbfp", "w4a8", {"proj": layer}, {"out": "last layer"}, {"steps": 20})
    data = json.loads(json.dumps(quantization_config(plan)))
    assert data["layers"]["proj"]["shape"] == [2, 7]
    assert (data["recipe"], data["bits"], data["skipped"], data["options"]) == (
        "lbfp",
        "w4a8",
        {"out": "last layer"},
        {"steps": 20},
    )


E2M1 = parse("e2m1")
REFUSALS = [
    (lambda: QuantSpec(E2M1, "row"), "granularity must be one of"),
    (lambda: QuantSpec(E2M1, "group"), "group_size must be given exactly"),
    (lambda: QuantSpec(E2M1, "tensor", 8), "group_size must be given exactly"),
    (lambda: QuantSpec(E2M1, "group", 0), "group_size must be a whole number from 1 to 65536, got 0"),
    (lambda: QuantSpec(E2M1, "token"), "'token' must be online"),
    (lambda: read(QuantSpec, {"format": "e2m1", "scale": 1}), "and no others, got"),
    (lambda: read(QuantSpec, {"granularity": "tensor"}), "must have the fields format"),
    (lambda: read(QuantSpec, {"format": "fp4"}), "format must be eXmY"),
    (
        lambda: Part(0, QuantSpec(E2M1)),
        "channels of a part must be a whole number from 1 to 1099511627776, got 0",
    ),
    (lambda: Part(4, QuantSpec(E2M1, "token", online=True)), "weight scales must be stored"),
    (
        lambda: Part(4, QuantSpec(E2M1), QuantSpec(E2M1, "channel")),
        "must be 'tensor', 'token' or 'group', got 'channel'",
    ),
    (lambda: Part(4, QuantSpec(E2M1), QuantSpec(E2M1, "group", 2)), "'group' must be online"),
    (lambda: read(Part, {"channels": 4}), "must have the fields channels, weight"),
    (
        lambda: read(Part, {"channels": 4, "weight": {"format": "e2m1"}, "x": 1}),
        "must have the fields channels, weight",
    ),
    (
        lambda: read(LayerSpec, {"kind": "conv1d", "shape": [1, 1], "parts": []}),
        "kind of a layer must be linear or conv2d",
    ),
    (
        lambda: layer_tensor_shapes((4, 9), [Part(4, QuantSpec(E2M1))]),
        r"add up to 9 input channels, got \[4\]",
    ),
    (
        lambda: plan_layer(
            torch.ones(4, 9), [Part(9, QuantSpec(E2M1, "channel"))], [torch.ones(4), torch.ones(1)]
        ),
        "zip",
    ),
    (
        lambda: plan_layer(torch.ones(4, 9), [Part(9, QuantSpec(E2M1), QuantSpec(E2M1))], [torch.ones(1)]),
        "scales must fit the parts",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence"), REFUSALS, ids=[sentence for _, sentence in REFUSALS])
def test_bad_plans_are_refused_in_one_sentence(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_tensors_of_other_shapes_are_refused() -> None:
    layer = plan_layer(torch.ones(2, 4), [Part(4, QuantSpec(E2M1, "channel"))], [torch.ones(2)])
    for name, wrong in {
        "weight": torch.zeros(2, 3, dtype=torch.uint8),
        "weight_scale": torch.ones(1),
        "extra": torch.ones(1),
    }.items():
        with pytest.raises(ValueError, match="tensors of a layer must have the shapes"):
            read(LayerSpec, plain(layer)).with_tensors({**layer.tensors, name: wrong})


def test_every_searchable_format_can_be_stored() -> None:
    for bits in range(1, 9):
        for format in (
            *(formats.candidates(bits) if bits > 1 else ()),
            *formats.candidates(bits, signed=False),
        ):
            weight = torch.tensor([format.values])
            layer = plan_layer(weight, [Part(len(format.values), QuantSpec(format))], [torch.ones(1)])
            assert torch.equal(dequantize(layer), weight), format.name

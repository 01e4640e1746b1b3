"""Changing a packed weight: nothing lost that the grid can hold, never worse than the old scales, every variant alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from difloat.numbers import formats
from difloat.numbers.rounding import round_to
from difloat.plan.add_delta import add_to_weight
from difloat.plan.encode import dequantize, join_variants, plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import expand_scale, rows_of
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.validation import plain
from mixed_rows import mixed, spec_of

SHAPES = [(6, 16), (6, 16, 3, 3)]
SPECS = {
    "tensor": QuantSpec(formats.parse("e2m1"), "tensor"),
    "channel": QuantSpec(formats.parse("e2m1"), "channel"),
    "group": QuantSpec(formats.parse("int4"), "group", 5),
    "zero point": QuantSpec(formats.parse("ue2m2"), "channel", zero_point=True),
    "asymmetric": QuantSpec(formats.parse("uint3"), "group", 5, zero_point=True),
    "odd": QuantSpec(formats.parse("e2m1"), "channel", zero_point=True),
    "unsigned": QuantSpec(formats.parse("ue2m2"), "channel"),
}


def layer_of(weight: Tensor, *specs: QuantSpec, activation: QuantSpec | None = None) -> LayerPlan:
    """The weight in as many equal parts as there are specs, scales by the largest magnitude."""
    width = weight.shape[1] // len(specs)
    parts = [Part(width, spec, activation) for spec in specs]
    scales, zeros = [], []
    for piece, spec in zip(weight.split(width, dim=1), specs, strict=True):
        rows = rows_of(piece, spec)
        zero = rows.amin(1) if spec.zero_point else torch.zeros(len(rows))
        scales.append(((rows - zero[:, None]).abs().amax(1) / spec.format.max).clamp_min(1e-3))
        zeros.append(zero)
    inputs = [torch.ones(1)] * len(parts) if activation is not None else []
    return plan_layer(weight, parts, scales, weight_zero_points=zeros, input_scales=inputs)


@pytest.fixture(params=SHAPES, ids=["linear", "conv2d"])
def weight(request, generator) -> Tensor:
    return torch.randn(request.param, generator=generator)


@pytest.fixture
def change(weight, generator) -> Tensor:
    return 0.4 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_change_of_zero_changes_nothing(weight, spec):
    layer = layer_of(weight.abs() if spec is SPECS["unsigned"] else weight, spec)
    changed = add_to_weight(layer, torch.zeros_like(weight))
    torch.testing.assert_close(dequantize(changed.layer), dequantize(layer), rtol=0, atol=1e-6)
    assert changed.share == 1 and changed.layer.parts == layer.parts


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_error_is_at_most_that_of_the_old_scales_and_the_share_is_what_is_left(weight, change, spec):
    layer = layer_of(weight.abs() if spec is SPECS["unsigned"] else weight, spec)
    target = dequantize(layer) + change
    scale = expand_scale(layer.tensors["weight_scale"], spec, weight.shape)
    zero = layer.tensors.get("weight_zero_point", torch.zeros_like(layer.tensors["weight_scale"]))
    zero = expand_scale(zero, spec, weight.shape)
    old = round_to((target - zero) / scale, spec.format) * scale + zero
    changed = add_to_weight(layer, change)
    error = (dequantize(changed.layer) - target).double().square().sum()
    # Rows are searched as squares in float64 and scales stored in float32: equal up to its rounding.
    assert error <= (old - target).double().square().sum() * (1 + 1e-6)
    assert changed.share == pytest.approx(float(1 - error / change.double().square().sum()), abs=1e-5)


def test_a_change_that_clips_at_the_old_scale_gets_a_new_one(weight):
    spec = SPECS["channel"]
    changed = add_to_weight(layer_of(weight, spec), 5 * weight)
    old = layer_of(weight, spec).tensors["weight_scale"]
    assert (changed.layer.tensors["weight_scale"] > 2 * old).all() and changed.share > 0.95


def test_what_stays_on_the_grid_arrives_exactly(weight):
    layer = layer_of(weight, SPECS["channel"])
    doubled = add_to_weight(layer, dequantize(layer))  # powers of two stay on any floating-point grid
    assert torch.equal(dequantize(doubled.layer), 2 * dequantize(layer)) and doubled.share == 1


def test_a_change_below_half_a_step_does_not_arrive_and_says_so(weight):
    layer = layer_of(weight, QuantSpec(formats.parse("int4"), "channel"))
    changed = add_to_weight(layer, torch.full_like(weight, 1e-4))
    assert changed.share < 0.5


def test_parts_change_each_with_their_own_formats(weight, change):
    layer = layer_of(weight, SPECS["group"], SPECS["asymmetric"])
    changed = add_to_weight(layer, change)
    alone = [
        add_to_weight(layer_of(half, spec), part).layer
        for half, spec, part in zip(
            weight.split(8, 1), (SPECS["group"], SPECS["asymmetric"]), change.split(8, 1), strict=True
        )
    ]
    assert torch.equal(dequantize(changed.layer), torch.cat([dequantize(one) for one in alone], 1))


def test_every_variant_and_every_smoothing_gets_the_change(weight, change, generator):
    static = QuantSpec(formats.parse("e4m3"), "tensor")
    ones = [1] * (weight.dim() - 2)
    factors = 0.5 + torch.rand(2, 16, generator=generator)
    variants = [layer_of(w, SPECS["channel"], activation=static) for w in (weight, weight.flip(0))]
    layer = join_variants(variants, (0, 1, 1), factors)
    changed = add_to_weight(layer, change).layer
    assert (changed.schedule, changed.smoothed, changed.parts) == (layer.schedule, True, layer.parts)
    assert torch.equal(changed.tensors["input_scale"], layer.tensors["input_scale"])
    assert torch.equal(changed.tensors["input_factor"], layer.tensors["input_factor"])
    for number, (variant, factor) in enumerate(zip(variants, factors, strict=True)):
        alone = add_to_weight(variant, change / factor.reshape(1, -1, *ones)).layer
        got = changed.variant(number)
        assert all(torch.equal(alone.tensors[n], got.tensors[n]) for n in ("weight", "weight_scale"))
        # The step of an FP4 row is at most a third of its largest magnitude, so an error is at most a sixth and clipping.
        torch.testing.assert_close(
            dequantize(got),
            dequantize(layer.variant(number)) + change,
            rtol=0,
            atol=float(weight.abs().max()) / 2,
        )


@pytest.mark.parametrize(
    ("bad", "words"),
    [(torch.zeros(3, 16), "shape of the weight"), (torch.full((6, 16), torch.nan), "must be finite")],
)
def test_foreign_and_broken_changes_are_refused(bad, words, generator):
    layer = layer_of(torch.randn(6, 16, generator=generator), SPECS["channel"])
    with pytest.raises(ValueError, match=words):
        add_to_weight(layer, bad)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("smoothed", [False, True])
def test_rows_of_several_widths_change_like_the_layers_of_their_bands(smoothed, kernel, generator):
    specs, counts = [spec_of("uint1"), spec_of("e2m1", "group", 3), spec_of("int5")], (2, 3, 4)
    factors = torch.rand(8, generator=generator) + 0.5 if smoothed else None
    one = mixed((9, 8, *kernel), specs, counts, generator, channels=(3, 5), factors=factors)
    change = 0.4 * torch.randn(one.joined.shape, generator=generator)
    changed = add_to_weight(one.joined, change)
    weight = dequantize(changed.layer)
    for band, rows in zip(one.bands, one.order.split(counts), strict=True):
        assert torch.equal(weight[rows], dequantize(add_to_weight(band, change[rows]).layer))
    assert plain(changed.layer) == plain(one.joined) and 0.5 < changed.share < 1
    twice = join_variants([one.joined, one.joined], [0, 1])
    again = add_to_weight(replace(twice, smoothed=smoothed), change).layer
    assert torch.equal(dequantize(again.variant(1)), weight)

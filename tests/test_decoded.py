"""Backend "decoded": the reference's results, bit for bit, wherever a product in integers does not exist."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import mixed_rows
from difloat.cli import kernel_summary
from difloat.kernels import dispatch, native_decode, reference
from difloat.layers import install
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs
from test_backends import compute

pytestmark = pytest.mark.skipif(
    "decoded" not in dispatch.available(), reason="no unit of the native library here"
)

ACTIVATIONS = {
    "none": None,
    "token": QuantSpec(parse("e3m4"), "token", online=True),
    "e4m3fn": QuantSpec(parse("e4m3fn"), "token", online=True),
    "tensor": QuantSpec(parse("e2m5"), online=True),
    "static": QuantSpec(parse("e4m3")),
    "e5m2": QuantSpec(parse("e5m2")),
    "shifted": QuantSpec(parse("ue4m4"), zero_point=True),
    "integers": QuantSpec(parse("int8"), "token", online=True),
    "powers": QuantSpec(parse("e4m0"), "token", online=True),
    "groups": QuantSpec(parse("e3m4"), "group", 16, online=True),
    "ranged": QuantSpec(parse("ue4m4"), "token", online=True, zero_point=True),
    "ranged groups": QuantSpec(parse("e3m4"), "group", 16, online=True, zero_point=True),
}
WEIGHTS = [
    QuantSpec(parse("e2m1"), "channel"),
    QuantSpec(parse("uint4"), "group", 32, zero_point=True),
    QuantSpec(parse("e4m3"), "channel"),
    QuantSpec(parse("e3m2"), "tensor"),
    QuantSpec(parse("int3"), "group", 16),
    QuantSpec(parse("e5m2ieee"), "channel", zero_point=True),
    QuantSpec(parse("e2m2"), "channel"),
    QuantSpec(parse("e3m3"), "group", 48),
    QuantSpec(parse("uint1"), "tensor"),
    QuantSpec(parse("e1m0"), "channel"),
]


def arguments(shape: tuple[int, ...], part: Part, generator: torch.Generator) -> list:
    """What an operator takes after its input."""
    count = part.weight.scale_count(*shape[:2])
    scale = (torch.rand(count, generator=generator) + 0.5) * (0.7 / part.weight.format.max)
    zero = torch.randn(count, generator=generator) * 0.2
    spec = part.activation
    static = spec is not None and not spec.online
    stored = plan_layer(
        torch.randn(shape, generator=generator) * 0.3,
        [part],
        [scale],
        weight_zero_points=[zero] if part.weight.zero_point else None,
        input_scales=[torch.tensor([2.5 / spec.format.max])] if static else [],
        input_zero_points=[torch.tensor([-0.3])] if static and spec.zero_point else [],
    ).tensors
    names = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    bias = torch.randn(shape[0], generator=generator)
    return [[*(stored.get(name) for name in names), bias], part]


def both(operator, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    results = []
    for name in ("reference", "decoded"):
        with dispatch.use_backend(name):
            results.append(operator(x, *rest))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_linear_is_the_reference(activation, dtype, generator) -> None:
    ran = 0
    for number, weight in enumerate(WEIGHTS):
        for rows, channels, out in [(3, 48, 70), (1, 80, 5), (33, 145, 64), (2, 7, 1)]:
            part = Part(channels, weight, activation)
            x = torch.randn(2, rows, channels + number, generator=generator).to(dtype)[..., number:]
            if native_decode.supports(part, (out, channels), x):
                one, other = both(compute, x, *arguments((out, channels), part, generator))
                assert torch.equal(one, other), (weight, rows, channels)
                ran += 1
    assert ran >= 10


GEOMETRIES = [  # weight, picture, stride, padding, dilation, groups
    ((70, 33, 3, 3), (9, 7), (2, 2), (1, 1), (1, 1), 1),
    ((5, 48, 1, 1), (4, 6), (1, 1), (0, 0), (1, 1), 1),
    ((8, 4, 3, 2), (6, 7), (1, 2), (2, 1), (2, 1), 2),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("activation", ["none", "token", "tensor", "static", "shifted"])
def test_convolution_is_the_reference(activation, geometry, last, generator) -> None:
    shape, size, *rest = geometry
    channels = shape[1] * rest[-1]
    for weight in (WEIGHTS[0], WEIGHTS[2], WEIGHTS[5], WEIGHTS[6]):
        x = torch.randn(2, channels, *size, generator=generator)
        found = arguments(shape, Part(shape[1], weight, ACTIVATIONS[activation]), generator)
        if last:
            x, found[0][0] = (t.to(memory_format=torch.channels_last) for t in (x, found[0][0]))
        one, other = both(compute, x, *found, *rest)
        assert one.shape == other.shape
        # torch adds in another order for another memory layout of the weight
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_group_scales_of_a_convolution(generator) -> None:
    part = Part(32, QuantSpec(parse("e2m1"), "group", 16), ACTIVATIONS["integers"])
    x = torch.randn(1, 32, 5, 5, generator=generator)
    found = arguments((6, 32, 3, 3), part, generator)
    one, other = both(compute, x, *found, (1, 1), (1, 1), (1, 1), 1)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_nan_and_inf_stay_in_their_tokens(generator) -> None:
    for name in ("token", "static"):
        x = torch.randn(5, 48, generator=generator)
        x[1, 7], x[3, 40] = torch.nan, torch.inf
        found = arguments((8, 48), Part(48, WEIGHTS[0], ACTIVATIONS[name]), generator)
        one, other = both(compute, x, *found)
        assert torch.equal(one[[0, 2, 4]], other[[0, 2, 4]]) and other[1].isnan().all()
        assert torch.equal(one[3], other[3]) or not other[3].isfinite().any()


def test_two_layers_share_the_buffer_but_no_results(generator) -> None:
    found = [arguments((64, 48), Part(48, WEIGHTS[0], None), generator) for _ in range(2)]
    x = torch.randn(4, 48, generator=generator)
    with dispatch.use_backend("decoded"):
        first, second = (compute(x, *f) for f in found)
        assert torch.equal(first, compute(x, *found[0])) and not torch.equal(first, second)


def test_what_it_leaves_alone() -> None:
    x = torch.zeros(2, 48)
    part = Part(48, WEIGHTS[0], ACTIVATIONS["token"])
    assert native_decode.supports(part, (8, 48), x)
    assert not native_decode.supports(part, (8, 48), x.double())
    assert not native_decode.supports(part, (8, 48), x.to("meta"))
    odd = QuantSpec(parse("e2m1"), "group", 24)
    assert not native_decode.supports(Part(48, odd, None), (8, 48), x)
    ranged = QuantSpec(parse("e3m4"), "tensor", online=True, zero_point=True)
    assert not native_decode.supports(Part(48, WEIGHTS[0], ranged), (8, 48), x)


def test_chosen_by_itself_and_named() -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    part = Part(48, WEIGHTS[0], ACTIVATIONS["token"])
    weight = model[0].weight.detach()
    install.install(model, "0", plan_layer(weight, [part], [weight.abs().amax(1) / 6]))
    with dispatch.use_backend("auto"):
        assert kernel_summary.layers(model) == [
            "1 x e2m1 x e3m4: decoded to floats, backend decoded (e3m4 activations are no int8 integers)"
        ]


@pytest.fixture
def allowed(monkeypatch):
    """Sets how many megabytes of decoded weights are kept."""

    def allow(text: str) -> None:
        monkeypatch.setenv("DIFLOAT_DECODED_MB", text)
        native_decode.allowed_bytes.cache_clear()

    yield allow
    monkeypatch.undo()
    native_decode.allowed_bytes.cache_clear()


def installed(spec: QuantSpec, generator: torch.Generator) -> nn.Module:
    """A layer of 500 to 300 channels whose inputs stay floats: 600,000 bytes decoded."""
    model, part = nn.Sequential(nn.Linear(500, 300)), Part(500, spec)
    weight = torch.randn(300, 500, generator=generator)
    install.install(model, "0", plan_layer(weight, [part], [weight.abs().amax(1) / spec.format.max]))
    return model


def both_layers(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    results = []
    with torch.no_grad():
        for name in ("reference", "decoded", "decoded"):
            with dispatch.use_backend(name):
                results.append(model(x))
                model(x)  # prepared now
                results.append(model(x))
    assert torch.equal(results[1], results[0]) and torch.equal(results[3], results[5])
    return results[0], results[3]


def test_decoded_weights_are_kept_as_far_as_allowed(allowed, generator) -> None:
    before = native_decode.kept_bytes()
    allowed("1")
    first, second = installed(WEIGHTS[2], generator), installed(WEIGHTS[2], generator)
    x, kept = torch.randn(4, 500, generator=generator), []
    with torch.no_grad(), dispatch.use_backend("decoded"):
        for model in (first, second, first):
            result = model(x)
            kept.append(native_decode.kept_bytes() - before)
            assert torch.equal(result, model(x))
    assert kept == [600_000] * 3  # the second had no room
    with torch.no_grad():
        for model in (first, second):
            one, other = both_layers(model, x)
            assert torch.equal(one, other)
        first[0].weight.random_(generator=generator)  # loaded again in place
        one, other = both_layers(first, x)
        assert torch.equal(one, other)
    del first, second, model
    gc.collect()
    assert native_decode.kept_bytes() == before


def test_a_kept_weight_is_decoded_once(allowed, generator, monkeypatch) -> None:
    allowed("1")
    model, x, calls = installed(WEIGHTS[0], generator), torch.randn(4, 500, generator=generator), []
    decoding = native_decode._decoding

    def counted(*arguments: object) -> object:
        decode = decoding(*arguments)
        return lambda: (calls.append(1), decode())[1]

    monkeypatch.setattr(native_decode, "_decoding", counted)
    with torch.no_grad(), dispatch.use_backend("decoded"):
        for _ in range(5):
            model(x)
        assert len(calls) == 1
        model[0].weight_scale.mul_(2)
        twice = model(x)
    assert len(calls) == 2
    with torch.no_grad(), dispatch.use_backend("reference"):
        assert torch.equal(model(x), twice)


def test_kept_rows_of_several_widths_are_the_reference(allowed, generator) -> None:
    allowed("10")
    specs = [mixed_rows.spec_of("e2m1"), mixed_rows.spec_of("e4m3")]
    weight = mixed_rows.mixed((24, 48), specs, (10, 14), generator, activation=None).joined.weight()
    x, before = torch.randn(3, 48, generator=generator), native_decode.kept_bytes()
    expected = reference.linear(x, weight, Inputs(), None)
    call = native_decode.prepared_linear(weight, torch.float32)
    for _ in range(2):
        assert torch.equal(call(x, None, None, None), expected)
    assert native_decode.kept_bytes() - before == 24 * 48 * 4


def test_a_limit_that_is_no_number_is_refused(allowed) -> None:
    allowed("half")
    with pytest.raises(
        ValueError, match="DIFLOAT_DECODED_MB must be a whole number of megabytes, got 'half'"
    ):
        native_decode.allowed_bytes()

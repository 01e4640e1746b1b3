"""Every backend against one float64 truth; operators legal for `torch.compile`; who computes what."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difloat.kernels import dispatch, operators, reference
from difloat.kernels.geometry import Geometry
from difloat.layers import install
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.validation import plain
from difloat.plan.weight import Inputs, PackedWeight, Weight

# Triton has tests of its own, small enough for its interpreter.
FAST = [name for name in dispatch.available() if name not in ("reference", "decoded", "triton")]
TOKEN = QuantSpec(parse("int8"), "token", online=True)


def stored(tensors: tuple[Tensor | None, ...], part: Part) -> tuple[Weight, Inputs]:
    """A weight of one part, and what is stored of its input."""
    packed, scale, zero, input_scale, input_zero = tensors[:5]
    return Weight(((PackedWeight(packed, scale, zero, part),),)), Inputs(input_scale, input_zero)


def compute(x: Tensor, tensors: tuple[Tensor | None, ...], part: Part, *geometry: object) -> Tensor:
    """The layer with these tensors (the bias last) by the operators."""
    weight, inputs = stored(tensors, part)
    if geometry:
        return operators.conv2d(x, weight, [inputs], tensors[5], Geometry(*geometry))
    return operators.linear(x, weight, [inputs], tensors[5])


def operator_arguments(x: Tensor, tensors: tuple[Tensor | None, ...], part: Part, last: object) -> tuple:
    """What `torch.ops.difloat.linear` or `conv2d` take."""
    weight, inputs = stored(tensors, part)
    return x, *operators._lists(weight, inputs), None, tensors[5], last, weight.text


@dataclass(frozen=True)
class Case:
    """A layer with random weights, and the tensors an operator takes."""

    part: Part
    tensors: tuple[Tensor | None, ...]
    weight: Tensor

    def call(self, x: Tensor, *geometry: object) -> Tensor:
        return compute(x, self.tensors, self.part, *geometry)


def case(
    shape: tuple[int, ...], part: Part, generator: torch.Generator, *, bias: bool = True, reach: float = 3.0
) -> Case:
    """A layer whose static input grid reaches to about `reach`."""
    weight = torch.randn(shape, generator=generator) * 0.3
    spec = part.weight
    count = spec.scale_count(*shape[:2])
    scale = (torch.rand(count, generator=generator) + 0.5) * (0.7 / spec.format.max)
    zero = torch.randn(count, generator=generator) * 0.2 if spec.zero_point else None
    static = part.activation is not None and not part.activation.online
    layer = plan_layer(
        weight,
        [part],
        [scale],
        weight_zero_points=None if zero is None else [zero],
        input_scales=[torch.tensor([reach / part.activation.format.max])] if static else [],
        input_zero_points=[torch.tensor([-0.3])] if static and part.activation.zero_point else [],
    )
    names = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    vectors = tuple(layer.tensors.get(name) for name in names)
    shift = torch.randn(shape[0], generator=generator) if bias else None
    return Case(part, (layer.tensors["weight"], *vectors, shift), dequantize(layer))


def rounded(x: Tensor, one: Case, picture: bool) -> Tensor:
    """The input on its grid, without the rounding to the input's dtype."""
    spec, x = one.part.activation, x.float()
    flat = x if picture else x.reshape(-1, x.shape[-1])
    per_token = spec.granularity in ("token", "group")
    ranged = spec.online and spec.zero_point
    grid = spec.format.name, per_token, spec.group_size or 0, ranged
    return reference.fake_quantize_input(flat, one.tensors[3], one.tensors[4], *grid).reshape(x.shape)


def check(result: Tensor, x: Tensor, one: Case, *geometry: object) -> None:
    """At most a rounding to the dtype and a few float32 roundings of terms away from float64.

    The zero points' terms cancel partly, so roundings are measured against the sum of magnitudes.
    """
    bias = one.tensors[5]

    def product(values: Tensor, weight: Tensor) -> Tensor:
        if geometry:
            return F.conv2d(values, weight, None, *geometry)
        return F.linear(values, weight)

    values = rounded(x, one, bool(geometry)).double()
    shift = 0.0 if bias is None else bias.double().reshape((-1, 1, 1) if geometry else (-1,))
    exact = product(values, one.weight.double()) + shift
    spec = one.part.activation
    largest = values.abs() + (0.0 if spec.online else abs(float(one.tensors[3])) * spec.format.max)
    reach = one.weight.double().abs() + (
        2 * one.weight.abs().max() if one.part.weight.zero_point or not one.part.weight.format.signed else 0
    )
    magnitude = product(largest + 1, reach).abs().max() if exact.numel() else torch.zeros(())
    tolerance = torch.finfo(result.dtype).eps / 2 * exact.abs() * 1.01 + 4 * 2.0**-24 * magnitude
    assert result.dtype == x.dtype and result.shape == exact.shape
    assert ((result.double() - exact).abs() <= tolerance).all(), float((result.double() - exact).abs().max())


def supported(name: str, part: Part, weight: Tensor, x: Tensor) -> bool:
    return dispatch.BACKENDS[name].supports(part, tuple(weight.shape), x)


FORMATS = [
    ("e2m1", "channel", False, TOKEN),
    ("e2m1", "channel", False, QuantSpec(parse("e2m1"), "token", online=True)),
    ("e3m0", "tensor", False, QuantSpec(parse("e2m3"), "token", online=True)),
    ("e1m2", "channel", False, QuantSpec(parse("e3m0"), "token", online=True)),
    ("int4", "channel", False, QuantSpec(parse("int8"), online=True)),
    ("uint4", "channel", True, QuantSpec(parse("uint8"), zero_point=True)),
    ("int8", "channel", False, QuantSpec(parse("int8"))),
    ("uint8", "channel", True, QuantSpec(parse("e1m4"))),
    ("e2m3", "channel", False, QuantSpec(parse("ue2m2"), zero_point=True)),
    ("int6", "channel", True, TOKEN),
    ("int3", "channel", False, TOKEN),
    ("uint2", "channel", True, TOKEN),
    ("e1m3", "channel", False, TOKEN),
    ("int7", "tensor", True, QuantSpec(parse("ue3m1"))),
    ("e1m6", "channel", False, TOKEN),
    ("ue1m7", "channel", True, TOKEN),
]
GROUPED = [("e2m1", 32, False, TOKEN), ("int4", 64, True, TOKEN), ("e2m3", 128, False, TOKEN)]
RANGED = QuantSpec(parse("uint4"), "group", 32, online=True, zero_point=True)
STEPPED = [  # inputs whose groups of channels have steps of their own
    ("int4", None, True, RANGED),
    ("iq4nl", None, False, RANGED),
    ("int8", None, False, RANGED),
    ("t3g", 64, False, RANGED),
    ("e2m1", 32, True, RANGED),
    ("e2m1", None, False, QuantSpec(parse("int4"), "group", 16, online=True)),
    ("int6", 32, False, QuantSpec(parse("e2m1"), "group", 32, online=True)),
    ("uint4", None, True, QuantSpec(parse("uint4"), "token", online=True, zero_point=True)),
    ("int4", None, False, QuantSpec(parse("int4"), "group", 48, online=True, zero_point=True)),
]


def parts(channels: int) -> list[Part]:
    plain = [Part(channels, QuantSpec(parse(f), g, None, False, z), a) for f, g, z, a in FORMATS]
    grouped = [Part(channels, QuantSpec(parse(f), "group", g, False, z), a) for f, g, z, a in GROUPED]
    stepped = [
        Part(channels, QuantSpec(parse(f), "group" if g else "channel", g, False, z), a)
        for f, g, z, a in STEPPED
    ]
    return plain + grouped + stepped


SHAPES = [
    (5, 7, 3),
    (1, 64, 64),
    (37, 130, 65),
    (300, 96, 17),
    (6, 257, 129),
    (2, 1, 1),
    (4, 1, 5),
    (4, 300, 200),
]


@pytest.mark.parametrize("number", range(len(FORMATS) + len(GROUPED) + len(STEPPED)))
@pytest.mark.parametrize("name", FAST)
def test_linear_is_as_close_to_float64_as_float32_sums_are(name, number, generator) -> None:
    ran = 0
    for rows, channels, out in SHAPES:
        part = parts(channels)[number]
        one = case((out, channels), part, generator)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, channels, generator=generator).to(dtype)
            if supported(name, part, one.weight, x):
                with dispatch.use_backend(name):
                    check(one.call(x), x, one)
                ran += 1
    if ran == 0:
        pytest.skip(f"{name} leaves {plain(part)} to the reference")


GEOMETRIES = [  # shape of the weight, size of the picture, stride, padding, dilation
    ((5, 4, 3, 3), (6, 5), (1, 1), (1, 1), (1, 1)),
    ((70, 33, 3, 3), (9, 7), (2, 2), (1, 1), (1, 1)),
    ((16, 64, 1, 1), (5, 6), (1, 1), (0, 0), (1, 1)),
    ((3, 20, 2, 3), (8, 9), (1, 2), (2, 0), (2, 1)),
    ((8, 3, 4, 4), (8, 8), (4, 4), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("number", range(len(FORMATS) + len(GROUPED) + len(STEPPED)))
@pytest.mark.parametrize("name", FAST)
def test_convolution_is_as_close_to_float64_as_float32_sums_are(name, number, generator) -> None:
    ran = 0
    for shape, size, *geometry in GEOMETRIES:
        part = parts(shape[1])[number]
        one = case(shape, part, generator)
        for dtype, layout in (
            (torch.float32, torch.contiguous_format),
            (torch.bfloat16, torch.channels_last),
        ):
            x = torch.randn(2, shape[1], *size, generator=generator).to(dtype).to(memory_format=layout)
            if supported(name, part, one.weight, x):
                with dispatch.use_backend(name):
                    result = one.call(x, *geometry, 1)
                check(result, x, one, *geometry)
                assert result.is_contiguous(memory_format=layout) or shape[1] == 1
                ran += 1
    if ran == 0:
        pytest.skip(f"{name} leaves {plain(part)} to the reference")


@pytest.mark.parametrize("name", FAST)
def test_inputs_of_every_layout_and_size(name, generator) -> None:
    one = case((6, 10), Part(10, QuantSpec(parse("e2m1"), "channel"), TOKEN), generator, bias=False)
    wide = torch.randn(4, 30, generator=generator)
    layouts = {
        "transposed": torch.randn(10, 5, generator=generator).t(),
        "sliced": wide[:, 3:13],
        "every third": wide[:, ::3],
        "expanded": torch.randn(1, 10, generator=generator).expand(3, 10),
        "one token": torch.randn(10, generator=generator),
        "four axes": torch.randn(2, 3, 2, 10, generator=generator),
        "half": torch.randn(3, 10, generator=generator).half(),
        "empty": torch.zeros(0, 10),
        "empty batch": torch.zeros(2, 0, 10),
        "unaligned": torch.randn(31, generator=generator)[1:].view(3, 10),
    }
    with dispatch.use_backend(name):
        for x in layouts.values():
            check(one.call(x), x, one)


@pytest.mark.parametrize("name", FAST)
def test_empty_batch_of_pictures(name, generator) -> None:
    one = case((6, 4, 3, 3), Part(4, QuantSpec(parse("e2m1"), "channel"), TOKEN), generator)
    with dispatch.use_backend(name):
        assert one.call(torch.zeros(0, 4, 8, 8), (1, 1), (1, 1), (1, 1), 1).shape == (0, 6, 8, 8)


@pytest.mark.parametrize("name", FAST)
def test_nan_spoils_its_token_or_picture_only(name, generator) -> None:
    for activation in (TOKEN, QuantSpec(parse("e2m1")), RANGED):
        part = Part(4, QuantSpec(parse("e2m1"), "channel"), activation)
        x, picture = torch.randn(3, 4, generator=generator), torch.randn(3, 4, 5, 5, generator=generator)
        x[1, 2] = picture[1, 2, 3, 3] = math.nan
        with dispatch.use_backend(name):
            tokens = case((6, 4), part, generator).call(x)
            pictures = case((6, 4, 1, 1), part, generator).call(picture, (1, 1), (0, 0), (1, 1), 1)
        for result in (tokens, pictures.flatten(1)):
            assert result[1].isnan().all()
            assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("activation", [TOKEN, QuantSpec(parse("e2m1")), None], ids=str)
def test_operators_are_legal(activation, name, generator) -> None:
    part = Part(6, QuantSpec(parse("e2m1"), "channel"), activation)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with dispatch.use_backend(name):
        one = case((4, 6), part, generator)
        for x in (torch.randn(2, 3, 6, generator=generator), torch.randn(6).requires_grad_()):
            arguments = operator_arguments(x, one.tensors, part, [])
            torch.library.opcheck(torch.ops.difloat.linear.default, arguments, test_utils=tests)
        one = case((4, 6, 3, 3), part, generator)
        geometry = [2, 1, 1, 1, 1, 1, 1]
        x = torch.randn(2, 6, 5, 5, generator=generator)
        for picture in (x, x.to(memory_format=torch.channels_last).requires_grad_()):
            arguments = operator_arguments(picture, one.tensors, part, geometry)
            torch.library.opcheck(torch.ops.difloat.conv2d.default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kernel", [None, 3])
def test_gradients_are_those_of_the_reference(kernel, name, generator) -> None:
    part = Part(6, QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("e2m1")))
    shape = (4, 6) if kernel is None else (4, 6, kernel, kernel)
    one = case(shape, part, generator, reach=1.5)  # clips some of the input
    geometry = () if kernel is None else ((1, 1), (1, 1), (1, 1), 1)
    inputs = torch.randn((5, 6) if kernel is None else (2, 6, 5, 5), generator=generator)
    upstream = None
    found = []
    for backend in ("reference", name):
        x, bias = inputs.clone().requires_grad_(), one.tensors[5].clone().requires_grad_()
        with dispatch.use_backend(backend):
            out = Case(part, (*one.tensors[:5], bias), one.weight).call(x, *geometry)
        upstream = torch.randn(out.shape, generator=generator) if upstream is None else upstream
        out.backward(upstream)
        found.append((x.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    x = inputs.clone().requires_grad_()
    values = x * (x.abs() <= 1.5)
    truth = F.linear(values, one.weight) if kernel is None else F.conv2d(values, one.weight, padding=1)
    truth.backward(upstream)
    assert torch.allclose(found[0][0], x.grad, atol=1e-5)
    assert 0 < (found[0][0] == 0).float().mean() < 0.9


@pytest.mark.parametrize("name", FAST)
def test_a_weight_that_changes_in_place_is_derived_again(name, generator) -> None:
    part = Part(8, QuantSpec(parse("int4"), "channel", zero_point=True), QuantSpec(parse("uint8")))
    first, second = (case((6, 8), part, generator) for _ in range(2))
    x = torch.rand(3, 8, generator=generator)
    with dispatch.use_backend(name):
        expected = second.call(x)
        assert not torch.equal(first.call(x), expected)
        for mine, other in zip(first.tensors, second.tensors, strict=True):
            if mine is not None:
                mine.copy_(other)
        assert torch.equal(first.call(x), expected)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": "valid"}, {"padding_mode": "reflect", "padding": 1}], ids=str
)
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_paddings_that_have_names(kernel, options, generator) -> None:
    plain = nn.Conv2d(4, 6, kernel, **options)
    part = Part(4, QuantSpec(parse("int8"), "channel"), QuantSpec(parse("uint8"), zero_point=True))
    scale = plain.weight.detach().flatten(1).abs().amax(1) / 127
    vectors = {"input_scales": [torch.tensor([0.02])], "input_zero_points": [torch.tensor([-2.0])]}
    model = nn.Sequential(plain)
    install.install(model, "0", plan_layer(plain.weight.detach(), [part], [scale], **vectors))
    x = torch.randn(2, 4, 7, 6, generator=generator)
    truth = nn.Conv2d(4, 6, kernel, **options)
    truth.weight.data, truth.bias = dequantize(model[0].plan()), plain.bias
    rounded = reference.fake_quantize_input(x, torch.tensor([0.02]), torch.tensor([-2.0]), "uint8", False)
    for name in ["reference", *FAST]:
        with dispatch.use_backend(name), torch.no_grad():
            assert torch.allclose(model(x), truth(rounded), atol=1e-4)


def test_names_of_backends(monkeypatch) -> None:
    assert dispatch.available()[0] == "reference" and "torch" in FAST
    with dispatch.use_backend("torch"):
        assert dispatch.backend() == "torch"
    assert dispatch.backend() == "auto"
    monkeypatch.setenv("DIFLOAT_BACKEND", "reference")
    dispatch.set_backend(None)
    assert dispatch.backend() == "reference"
    monkeypatch.setenv("DIFLOAT_BACKEND", "magic")
    dispatch.set_backend(None)
    with pytest.raises(
        ValueError, match="DIFLOAT_BACKEND must be one of auto, reference, torch.*got 'magic'"
    ):
        dispatch.backend()
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        dispatch.set_backend("cuda")


def test_what_no_backend_supports_goes_to_the_reference(generator) -> None:
    float8 = Part(8, QuantSpec(parse("e2m1")), QuantSpec(parse("e4m3")))
    exact = Part(8, QuantSpec(parse("e2m1")), TOKEN)
    x = torch.randn(2, 8)
    for name in FAST:
        with dispatch.use_backend(name):
            assert dispatch.choose(float8, (4, 8), x) is reference
            assert dispatch.choose(exact, (4, 8), x.double()) is reference
            assert dispatch.choose(exact, (4, 8), x) is not reference
            assert (
                dispatch.choose(exact, (4, 4, 3, 3), x[..., None, None]) is reference
            )  # two groups of channels
    decoded = next((dispatch.BACKENDS[n] for n in dispatch.available() if n == "decoded"), reference)
    with dispatch.use_backend("auto"):
        assert dispatch.choose(float8, (4, 8), x) is decoded
        assert dispatch.choose(exact, (4, 8), x.double()) is reference
        assert dispatch.choose(exact, (4, 4, 3, 3), x[..., None, None]) is decoded

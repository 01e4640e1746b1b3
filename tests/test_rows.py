"""Rows of several widths: joining and splitting, and every backend against the ordinary layers of the bands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from difloat.cli import kernel_summary
from difloat.kernels import derived, dispatch, operators, reference, torch_int8
from difloat.kernels.geometry import Geometry
from difloat.layers import install
from difloat.numbers import formats, integer_grids
from difloat.numbers.formats import parse
from difloat.numbers.packing import packed_channels
from difloat.plan.encode import dequantize, join_rows, join_variants
from difloat.plan.plan import LayerPlan, LayerSpec, Plan
from difloat.plan.scales import row_places
from difloat.plan.specs import Band, QuantSpec
from difloat.plan.validation import plain, read
from difloat.report import build
from mixed_rows import STATIC, TOKEN, Mixed, mixed, spec_of

FAST = [name for name in dispatch.available() if name not in ("reference", "triton")]
WIDTHS = ("uint1", "uint2", "e2m0", "e2m1", "int5")  # 1 to 5 bits
COUNTS = (3, 4, 1, 5, 2)
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


def installed(plan: LayerPlan, bias: Tensor | None = None) -> nn.Module:
    """A quantized layer that carries the plan out; convolutions are padded by one."""
    out_channels, in_channels, *kernel = plan.shape
    plain = (
        nn.Conv2d(in_channels, out_channels, kernel, padding=1)
        if kernel
        else nn.Linear(in_channels, out_channels)
    )
    plain.bias = None if bias is None else nn.Parameter(bias)
    model = nn.Sequential(plain)
    install.install(model, "0", plan)
    return model[0]


def some_input(plan: LayerPlan, generator: torch.Generator) -> Tensor:
    shape = (2, plan.shape[1], 5, 4) if plan.kind == "conv2d" else (7, plan.shape[1])
    return torch.randn(shape, generator=generator)


def by_rows(one: Mixed, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the ordinary layers of the bands compute, row for row."""
    counts = [band.shape[0] for band in one.bands]
    shifts = [None] * len(counts) if bias is None else bias[one.order].split(counts)
    results = [installed(band, shift)(x) for band, shift in zip(one.bands, shifts, strict=True)]
    axis = 1 if one.joined.kind == "conv2d" else -1
    return torch.cat(results, axis).index_select(axis, one.order.argsort())


def shape_of(kernel: int | None) -> tuple[int, ...]:
    return (sum(COUNTS), 11, *([kernel] * 2 if kernel else []))


# Joining


@st.composite
def layers_of_bands(draw: st.DrawFn) -> Mixed:
    names = st.sampled_from(
        ["uint1", "ue1m0", "e1m0", "uint2", "ue2m0", "int3", "e2m0", "e2m1", "int5", "ue2m3"]
    )
    channels = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    layouts = st.sampled_from([("tensor", None), ("channel", None), ("group", 2), ("group", 16)])
    specs = [spec_of(name, *draw(layouts)) for name in draw(st.lists(names, min_size=1, max_size=4))]
    counts = [draw(st.integers(1, 4)) for _ in specs]
    kernel = draw(st.sampled_from([(), (1, 1), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    factors = torch.rand(sum(channels), generator=generator) + 0.5 if draw(st.booleans()) else None
    return mixed(
        (sum(counts), sum(channels), *kernel),
        specs,
        counts,
        generator,
        channels=channels,
        activation=draw(st.sampled_from([None, TOKEN, STATIC])),
        factors=factors,
    )


@settings(max_examples=150, deadline=None)
@given(layers_of_bands())
def test_rows_come_back_as_the_bands_have_them(one: Mixed) -> None:
    joined = one.joined
    stored = torch.cat([dequantize(band) for band in one.bands])
    assert torch.equal(dequantize(joined)[one.order], stored)
    bands = joined.split_rows()
    assert [band.parts for band in bands] == [band.parts for band in one.bands]
    assert [band.shape for band in bands] == [band.shape for band in one.bands]
    order = torch.arange(len(one.order))
    if joined.bands:
        assert torch.equal(row_places(joined.tensors["row_band"])[one.order].sort().values, order)
        order = joined.tensors["row_band"].argsort(stable=True)
    again = join_rows(bands, order)
    assert again.bands == joined.bands and again.tensors.keys() == joined.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in joined.tensors.items())
    assert plain(read(LayerSpec, plain(joined)).with_tensors(joined.tensors)) == plain(joined)
    # Nothing but codes, the bands' scales, a byte per row and what belongs to the input is stored.
    own = sum(
        sum(t.nbytes for n, t in band.tensors.items() if not n.startswith("input")) for band in one.bands
    )
    shared = sum(t.nbytes for n, t in joined.tensors.items() if n.startswith("input"))
    assert joined.nbytes == own + shared + (len(one.order) if joined.bands else 0)


@settings(max_examples=60, deadline=None)
@given(layers_of_bands(), st.booleans())
def test_a_layer_computes_what_the_layers_of_its_bands_compute(one: Mixed, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, out_channels = some_input(one.joined, generator), one.joined.shape[0]
    bias = torch.randn(out_channels, generator=generator) if with_bias else None
    with torch.no_grad():
        for name in FAST:
            with dispatch.use_backend(name):
                got, expected = installed(one.joined, bias)(x), by_rows(one, x, bias)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
                whole = {_who(band, x) for band in one.bands} == {dispatch.BACKENDS[name].__name__}
                if whole and name != "decoded":  # sums in float depend on how many there are
                    assert torch.equal(got, expected), name
        with dispatch.use_backend("reference"):
            got = installed(one.joined, bias)(x)
            torch.testing.assert_close(got, by_rows(one, x, bias), rtol=1e-4, atol=1e-4)


def _who(band: LayerPlan, x: Tensor) -> str:
    """The backend that computes all parts of a layer, "several" if there are more."""
    pieces = x.split([part.channels for part in band.parts], dim=1)
    shapes = [(band.shape[0], part.channels, *band.shape[2:]) for part in band.parts]
    chosen = zip(band.parts, shapes, pieces, strict=True)
    names = {dispatch.choose(part, shape, piece).__name__ for part, shape, piece in chosen}
    return names.pop() if len(names) == 1 else "several"


def test_bits_on_disk_are_the_mean_of_the_widths() -> None:
    one = mixed(
        (30, 64),
        [spec_of(name, "tensor") for name in ("uint1", "uint2", "uint3")],
        (3, 24, 3),
        torch.Generator(),
    )
    weight = one.joined.tensors["weight"]
    assert weight.shape == (1, 3 * 8 + 24 * 16 + 3 * 24) and weight.nbytes * 8 == 2 * 30 * 64


def test_one_band_is_an_ordinary_layer_in_the_given_order(generator) -> None:
    one = mixed((6, 9), [spec_of("e2m1", "group", 4)], (6,), generator)
    assert not one.joined.bands and "row_band" not in one.joined.tensors
    assert torch.equal(dequantize(one.joined)[one.order], dequantize(one.bands[0]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_every_format_of_few_bits_can_be_a_band(bits, generator) -> None:
    signed = formats.candidates(bits) if bits > 1 else ()
    names = [f.name for f in (*signed, *formats.candidates(bits, signed=False))] + [f"uint{bits}"]
    assert len(names) >= 2
    for name in names:
        one = mixed((5, 7), [spec_of(name), spec_of("e2m1")], (3, 2), generator)
        assert torch.equal(dequantize(one.joined)[one.order[:3]], dequantize(one.bands[0]))
        assert one.joined.codes()[0].max() < 2**bits
        assert one.joined.tensors["weight"].shape == (1, 3 * packed_channels(7, bits) + 2 * 4)


def test_a_row_of_other_bands_does_not_change_a_row(generator) -> None:
    one = mixed((6, 8), [spec_of("uint2"), spec_of("int4")], (3, 3), generator)
    tensors = dict(one.joined.tensors)
    tensors["weight"] = tensors["weight"].clone()
    tensors["weight"][0, : 3 * 2] = 0  # the first band
    changed = dequantize(replace(one.joined, tensors=tensors)) != dequantize(one.joined)
    assert set(changed.any(1).nonzero().flatten().tolist()) <= set(one.order[:3].tolist())
    assert changed.any()


def test_what_does_not_belong_together_is_refused(generator) -> None:
    def bands(**changes: object) -> list[LayerPlan]:
        return mixed((4, 6), [spec_of("uint1"), spec_of("e2m1")], (2, 2), generator, **changes).bands

    first, second = bands(activation=STATIC)
    order = torch.arange(4)
    other_scale = replace(second, tensors={**second.tensors, "input_scale": torch.tensor([9.0])})
    joined = join_rows([first, second], order)
    for wrong, sentence in (
        ([first, bands()[1]], "must read the same input"),
        ([first, other_scale], "must read the same input"),
        ([first, bands(activation=STATIC, factors=torch.ones(6))[1]], "must read the same input"),
        ([first, bands(activation=STATIC, channels=(2, 4))[1]], "must read the same input"),
        ([joined, first], "one weight of equal rows each"),
        ([first, join_variants([second, second], [0, 1])], "one weight of equal rows each"),
    ):
        rows = torch.arange(sum(band.shape[0] for band in wrong))
        with pytest.raises(ValueError, match=sentence):
            join_rows(wrong, rows)
    for not_a_permutation in ([0, 1, 2, 2], [0, 1, 2, 4], [-1, 0, 1, 2], [0, 1, 2], [[0, 1, 2, 3]]):
        with pytest.raises(ValueError, match="order must be a permutation of the 4 rows"):
            join_rows([first, second], torch.tensor(not_a_permutation))
    with pytest.raises(ValueError, match="rows in the same bands"):
        join_variants([joined, join_rows([first, second], order.flip(0))], [0, 1])
    with pytest.raises(ValueError, match="2 to 256 bands"):
        join_rows([mixed((1, 1), [spec_of("e2m1")], (1,), generator).joined] * 257, torch.arange(257))
    with pytest.raises(
        ValueError, match="rows of a band must be a whole number from 1 to 1099511627776, got 0"
    ):
        Band(0, (spec_of("e2m1"),))


# Computing


@pytest.mark.parametrize("kernel", [None, 3])
def test_operands_and_sums_are_those_of_the_codes(kernel, generator) -> None:
    """The integers that go into the product, and its sums, are exactly those that the formats define."""
    one = mixed(shape_of(kernel), [spec_of(name) for name in WIDTHS], COUNTS, generator)
    weight = torch_int8._operands(one.joined.weight())
    expected = []
    for codes, name in zip(one.joined.codes(), WIDTHS, strict=True):
        grid, values = integer_grids.grid_of(parse(name)), torch.tensor(parse(name).decode_table)
        expected.append((values[codes.int()] * grid.multiplier - grid.shift).movedim(1, -1).flatten(1))
    stored = torch.cat(expected)
    assert torch.equal(weight.operand.long(), stored[row_places(one.joined.tensors["row_band"])].long())
    rows = torch.randint(-128, 128, (20, stored.shape[1]), generator=generator).to(torch.int8)
    exact = rows.long() @ weight.operand.long().t()
    assert torch.equal(torch._int_mm(rows, weight.operand.t()).long(), exact)


@pytest.mark.parametrize(
    "activation", [TOKEN, STATIC, QuantSpec(parse("e4m3")), None], ids=["online", "static", "float8", "none"]
)
@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("name", ["auto", "reference", *FAST])
def test_every_backend_is_close_to_float64(name, kernel, activation, generator) -> None:
    one = mixed(shape_of(kernel), [spec_of(n) for n in WIDTHS], COUNTS, generator, activation=activation)
    bias, x = torch.randn(sum(COUNTS), generator=generator), some_input(one.joined, generator)
    scales = [one.joined.tensors.get(key) for key in ("input_scale", "input_zero_point")]
    values = reference.round_input(x, *scales, one.joined.parts[0]).double()
    weight = dequantize(one.joined).double()
    operator = F.linear if kernel is None else lambda v, w, b: F.conv2d(v, w, b, padding=1)
    exact = operator(values, weight, bias.double())
    # Float32 roundings of the terms, whose magnitudes with zero points are at most twice those of the weight's range.
    magnitude = operator(
        values.abs() + 3, 3 * weight.abs().amax().expand_as(weight), bias.double().abs()
    ).max()
    with dispatch.use_backend(name), torch.no_grad():
        for dtype, eps in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-8)):
            if dtype == torch.bfloat16 and (name in ("reference", "decoded") or not integer_path(one, x)):
                continue
            got = installed(one.joined, bias)(x.to(dtype))
            truth = exact
            if dtype == torch.bfloat16:
                rounded = reference.round_input(x.to(dtype).float(), *scales, one.joined.parts[0]).double()
                truth = operator(rounded, weight, bias.double())
            assert got.dtype == dtype and got.shape == truth.shape
            assert ((got.double() - truth).abs() <= eps * truth.abs() + 4 * 2.0**-24 * magnitude).all()


def integer_path(one: Mixed, x: Tensor) -> bool:
    """Whether a backend computes the layer in integers."""
    bands = one.joined.split_rows()
    chosen = dispatch.choose_rows([band.parts[0] for band in bands], [band.shape for band in bands], x)
    return chosen not in (reference, dispatch.BACKENDS["decoded"])


@pytest.mark.parametrize("kernel", [None, 3])
def test_rows_of_several_widths_are_computed_in_integers(kernel, generator) -> None:
    one = mixed(shape_of(kernel), [spec_of(n) for n in WIDTHS], COUNTS, generator)
    x = some_input(one.joined, generator)
    for name in ("auto", *(name for name in FAST if name != "decoded")):
        with dispatch.use_backend(name):
            assert integer_path(one, x)
    odd = mixed(shape_of(kernel), [spec_of("e2m1"), spec_of("e4m3")], (3, 12), generator)  # e4m3 is no int8
    assert not integer_path(odd, x)


@pytest.mark.skipif("triton" not in dispatch.available(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("kernel", "activation"), [(None, TOKEN), (None, None), (3, STATIC), (3, QuantSpec(parse("e4m3fn")))]
)
def test_triton_computes_rows_of_several_widths(kernel, activation, device, generator) -> None:
    shape, names = (7, 20, *([kernel] * 2 if kernel else [])), ("uint1", "uint3", "e2m0")
    one = mixed(shape, [spec_of(name) for name in names], (2, 4, 1), generator, activation=activation)
    dtype = (
        torch.bfloat16 if activation is None else torch.float32
    )  # half precision hits ties of the input's grid
    x = some_input(one.joined, generator).to(device, dtype)
    layer = installed(one.joined, torch.randn(7, generator=generator)).to(device)
    with torch.no_grad():
        with dispatch.use_backend("reference"):
            expected = layer(x.float())
        with dispatch.use_backend("triton"):
            assert integer_path(one, x)
            got = layer(x)
    assert got.dtype == dtype and got.shape == expected.shape
    rounding, largest = torch.finfo(dtype).eps, float(expected.abs().max())
    torch.testing.assert_close(got.float(), expected, rtol=rounding, atol=max(rounding, 2.0**-17) * largest)


def test_half_precision_and_inputs_of_every_layout(generator) -> None:
    one = mixed((6, 10), [spec_of("uint1"), spec_of("e2m1")], (2, 4), generator)
    layer = installed(one.joined, torch.randn(6, generator=generator))
    wide = torch.randn(4, 30, generator=generator)
    for x in (
        torch.randn(10, 5, generator=generator).t(),
        wide[:, ::3],
        torch.randn(10, generator=generator),
        torch.randn(2, 3, 2, 10, generator=generator),
        torch.randn(3, 10, generator=generator).half(),
        torch.zeros(0, 10),
        torch.zeros(2, 0, 10),
    ):
        with dispatch.use_backend("reference"), torch.no_grad():
            expected = layer(x.float())
        for name in FAST:
            with dispatch.use_backend(name), torch.no_grad():
                got = layer(x)
            assert got.dtype == x.dtype and got.shape == expected.shape == (*x.shape[:-1], 6)
            torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("groups", "counts"), [(1, (2, 4)), (2, (2, 4)), (2, (1, 5))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_every_layout_and_in_groups(layout, groups, counts, generator) -> None:
    one = mixed((6, 4 // groups, 3, 3), [spec_of("uint2"), spec_of("int3")], counts, generator)
    plain = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=groups)
    x = torch.randn(2, 4, 7, 6, generator=generator)
    model = nn.Sequential(plain)
    install.install(model, "0", one.joined)
    rounded = reference.round_input(x, None, None, one.joined.parts[0])
    expected = F.conv2d(rounded, dequantize(one.joined), plain.bias, (2, 1), 1, 1, groups)
    assert model[0].weight.dim() == 4
    model.to(memory_format=layout)
    for name in ("reference", *FAST):
        with dispatch.use_backend(name), torch.no_grad():
            got = model(x.to(memory_format=layout))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        assert got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize(
    ("name", "activation"),
    [("reference", None), *((name, a) for name, a in zip(FAST, (STATIC, TOKEN), strict=False))],
)
def test_operators_are_legal(name, activation, kernel, generator) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    one = mixed(
        (6, 5, *([3, 3] if kernel else [])),
        [spec_of("uint1"), spec_of("e2m1")],
        (2, 4),
        generator,
        activation=activation,
    )
    layer = installed(one.joined, torch.randn(6, generator=generator))
    weight, (inputs,) = layer.packed_weight()
    operator = torch.ops.difloat.conv2d if kernel else torch.ops.difloat.linear
    last = Geometry(*GEOMETRY).numbers() if kernel else []
    for x in (some_input(one.joined, generator), some_input(one.joined, generator).requires_grad_()):
        lists = operators._lists(weight, inputs)
        arguments = (x, *lists, weight.row_band, layer.bias.detach(), last, weight.text)
        with dispatch.use_backend(name):
            torch.library.opcheck(operator.default, arguments, test_utils=tests)


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("name", ["reference", *FAST])
def test_gradients_are_straight_through(name, kernel, generator) -> None:
    shape = (6, 5) if kernel is None else (6, 5, kernel, kernel)
    one = mixed(
        shape, [spec_of("uint1"), spec_of("e2m1"), spec_of("int5")], (2, 3, 1), generator, activation=STATIC
    )
    bias = torch.randn(6, generator=generator)
    x = (3 * some_input(one.joined, generator)).requires_grad_()  # the grid ends at -3 and 3
    layer = installed(one.joined, bias)
    with dispatch.use_backend(name):
        out = layer(x)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    twin, shift = x.detach().clone().requires_grad_(), bias.clone().requires_grad_()
    inside = ((twin >= -3) & (twin <= 3)).detach()
    operator = F.linear if kernel is None else lambda v, w, b: F.conv2d(v, w, b, padding=1)
    operator(twin * inside, dequantize(one.joined), shift).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, shift.grad, rtol=1e-5, atol=1e-5)
    assert 0.1 < inside.float().mean() < 0.9


@pytest.mark.parametrize("kernel", [None, 3])
def test_compiled_layers_have_no_graph_break_and_the_same_result(kernel, generator) -> None:
    shape = (6, 9) if kernel is None else (6, 9, kernel, kernel)
    specs = [spec_of("uint1"), spec_of("e2m1", "group", 2), spec_of("int5", "tensor")]
    one = mixed(
        shape, specs, (2, 3, 1), generator, channels=(4, 5), activation=STATIC, factors=torch.rand(9) + 0.5
    )
    layer, x = installed(one.joined, torch.randn(6, generator=generator)), some_input(one.joined, generator)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", FAST)
def test_a_weight_that_changes_in_place_is_derived_again(name, generator) -> None:
    first, second = (mixed((6, 8), [spec_of("uint1"), spec_of("int4")], (2, 4), generator) for _ in range(2))
    layer, x = installed(first.joined), torch.randn(3, 8, generator=generator)
    with dispatch.use_backend(name), torch.no_grad():
        before = layer(x)
        expected = installed(second.joined)(x)
        layer.load_state_dict(installed(second.joined).state_dict())
        assert torch.equal(layer(x), expected) and not torch.equal(before, expected)


def test_no_more_than_one_byte_per_weight_is_kept(generator) -> None:
    one = mixed((40, 64), [spec_of("uint1"), spec_of("uint2"), spec_of("uint3")], (4, 32, 4), generator)
    layer, x = installed(one.joined), torch.randn(3, 64, generator=generator)
    before = derived.resident_bytes()
    with dispatch.use_backend("torch"), torch.no_grad():
        layer(x)
        layer(x)
    kept = before + 40 * 64 + 40 * 4  # the weights and the places of the rows
    assert derived.resident_bytes() == kept
    if "cpu" in FAST:
        with dispatch.use_backend("cpu"), torch.no_grad():
            layer(x)
        assert derived.resident_bytes() == kept + 40 * 4  # and the row that every place holds


# Timesteps


class Denoiser(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = nn.Linear(shape[1], shape[0], bias=False)

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        return self.inner(sample)


def test_several_weights_and_input_ranges_by_timestep(generator) -> None:
    specs, counts, grid = [spec_of("uint1"), spec_of("e2m1")], (2, 4), (1.0, 2.0, 3.0)
    factors = torch.rand(3, 7, generator=generator) + 0.5
    variants = [mixed((6, 7), specs, counts, generator, activation=STATIC) for _ in range(3)]
    plans = [join_rows(variant.bands, variants[0].order) for variant in variants]
    schedule = [2, 0, 1]
    joined = join_variants(plans, schedule, factors)
    ranges = torch.tensor([0.5, 1.0, 2.0]) / 255 * 6
    tensors = {
        **joined.tensors,
        "input_scale": ranges,
        "input_zero_point": joined.tensors["input_zero_point"].repeat(3),
    }
    plan = replace(joined, tensors=tensors, input_schedule=(0, 1, 2))
    assert plan.variants == 3 and plan.tensors["weight"].shape[0] == 3
    assert plan.codes()[0].shape == (3 * 2, 7)
    assert read(LayerSpec, plain(plan)).with_tensors(plan.tensors).bands == plan.bands
    model = install.apply(Denoiser(plan.shape), Plan("test", "w2a8", {"inner": plan}, timesteps=grid))
    x = torch.randn(3, 7, generator=generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for entry, timestep in enumerate(grid):
        number = schedule[entry]
        alone = replace(
            plan.variant(number),
            tensors={
                **plan.variant(number).tensors,
                "input_scale": ranges[entry : entry + 1],
                "input_zero_point": torch.tensor([-3.0]),
            },
            input_schedule=(),
        )
        assert torch.equal(dequantize(alone), dequantize(plans[number]) * factors[number])
        with torch.no_grad():
            expected = installed(alone)(x)
            assert torch.equal(model(x, torch.tensor(timestep)), expected)
            assert torch.equal(compiled(x, torch.tensor(timestep)), expected)
    with pytest.raises(ValueError, match="must have one weight each to become float"):
        install.restore(model)


def test_restore_gives_the_dequantized_rows_in_order(generator) -> None:
    one = mixed((6, 7), [spec_of("uint1"), spec_of("e2m1")], (2, 4), generator, activation=None)
    model = nn.Sequential(nn.Linear(7, 6))
    install.install(model, "0", one.joined)
    assert torch.equal(model[0].dequantized_weight(), dequantize(one.joined))
    install.restore(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, dequantize(one.joined))


def test_what_computes_a_layer_is_said_in_words(generator) -> None:
    one = mixed((6, 7), [spec_of("uint1"), spec_of("uint2"), spec_of("uint3")], (2, 3, 1), generator)
    model = nn.Sequential(installed(one.joined))
    with dispatch.use_backend("torch"):
        assert kernel_summary.layers(model) == ["1 x uint1/uint2/uint3 x int8: int8 products, backend torch"]
    model = nn.Sequential(
        installed(replace(one.joined, parts=tuple(replace(p, activation=None) for p in one.joined.parts)))
    )
    name = "decoded" if "decoded" in dispatch.available() else "reference"
    assert kernel_summary.layers(model) == [
        f"1 x uint1/uint2/uint3 x float: decoded to floats, backend {name} (activations are not quantized)"
    ]


def test_reports_name_all_widths(generator) -> None:
    one = mixed((6, 8), [spec_of("uint1"), spec_of("e2m0")], (2, 4), generator, channels=(3, 5))
    model = nn.Sequential(nn.Linear(8, 6))
    plan = Plan("test", "w2a8", {"0": one.joined})
    row = build.layer_row("0", one.joined, model[0].weight)
    assert row.weight_format == "uint1/e2m0" and not row.integer_grid
    assert row.effective_bits == 8 * one.joined.nbytes / 48
    (histogram,) = build.worst_histograms(model, plan, [row])
    band = model[0].weight.detach()[one.joined.tensors["row_band"] == 0]
    low, high = band[0, :3].min(), band[0, :3].max()
    assert (histogram.edges[0], histogram.edges[-1]) == pytest.approx((float(low), float(high)))
    assert len(histogram.grid) == 2
    install.apply(model, plan)
    assert model[0].weight_formats() == "uint1/e2m0"

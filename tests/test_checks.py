"""What does not fit a layer is refused in a sentence, by every backend, before anything is computed or read."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from difloat.kernels import attention, dispatch, native_library, operators
from difloat.kernels.dispatch import use_backend
from difloat.numbers.formats import parse
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Branch, Inputs, PackedWeight, Weight
from test_backends import case, compute, rounded, stored

CHANNELS, ROWS = 24, 10
STATIC, TOKEN = QuantSpec(parse("uint8")), QuantSpec(parse("int8"), "token", online=True)
NAMES = [name for name in dispatch.available() if name != "triton"]
VECTORS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(request.param):
        yield request.param


def linear_case(generator: torch.Generator, activation: QuantSpec = STATIC) -> Any:
    weight = QuantSpec(parse("uint4"), "channel", zero_point=True)
    return case((ROWS, CHANNELS), Part(CHANNELS, weight, activation), generator)


WRONG_INPUTS = {
    "wider": lambda x: torch.cat([x, x], -1),
    "one more": lambda x: torch.cat([x, x[..., :1]], -1),
    "narrower": lambda x: x[..., :-1],
    "half": lambda x: x[..., : CHANNELS // 2],
    "one channel": lambda x: x[..., :1],
    "no channel": lambda x: x[..., :0],
    "a number": lambda x: x.sum(),
    "transposed": lambda x: x.reshape(-1, CHANNELS).t(),
    "whole numbers": lambda x: x.long(),
    "bytes": lambda x: x.to(torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.reshape(-1, CHANNELS).to_sparse(),
    "elsewhere": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("what", WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused(what: str, backend: str, generator: torch.Generator) -> None:
    one, x = linear_case(generator), torch.randn(3, 4, CHANNELS, generator=generator)
    assert one.call(x).shape == (3, 4, ROWS)
    if (
        what == "elsewhere"
    ):  # operators have a meaning for tensors without data; with those of a layer in memory they have not
        with pytest.raises(ValueError, match="must be on the device of its input"):
            compute(WRONG_INPUTS[what](x), one.tensors, one.part)
        return
    with pytest.raises(ValueError, match="input of a quantized layer must"):
        one.call(WRONG_INPUTS[what](x))


WRONG_PICTURES = {
    "wider": lambda x: torch.cat([x, x], 1),
    "narrower": lambda x: x[:, :-1],
    "channels last": lambda x: x.movedim(1, -1),
    "three axes": lambda x: x[0],
    "five axes": lambda x: x[None],
    "smaller than the kernel": lambda x: x[:, :, :1, :1],
    "whole numbers": lambda x: x.int(),
}


@pytest.mark.parametrize("what", WRONG_PICTURES)
def test_pictures_that_do_not_fit_are_refused(what: str, backend: str, generator: torch.Generator) -> None:
    part = Part(CHANNELS, QuantSpec(parse("int4"), "channel"), TOKEN)
    one = case((ROWS, CHANNELS, 3, 3), part, generator)
    x, geometry = torch.randn(2, CHANNELS, 6, 5, generator=generator), ((1, 1), (0, 0), (1, 1), 1)
    assert one.call(x, *geometry).shape == (2, ROWS, 4, 3)
    with pytest.raises(ValueError, match="must"):
        one.call(WRONG_PICTURES[what](x), *geometry)


@pytest.mark.parametrize(
    "geometry",
    [
        ((0, 1), (0, 0), (1, 1), 1),
        ((1, 1), (-1, 0), (1, 1), 1),
        ((1, 1), (0, 0), (0, 1), 1),
        ((1, 1), (0, 0), (1, 1), 3),
    ],
)
def test_geometries_that_mean_nothing_are_refused(geometry, backend, generator) -> None:
    one = case((ROWS, CHANNELS, 3, 3), Part(CHANNELS, QuantSpec(parse("int4"), "channel"), TOKEN), generator)
    with pytest.raises(ValueError, match="must"):
        one.call(torch.randn(1, CHANNELS, 6, 6, generator=generator), *geometry)


def wrong(tensor: Tensor) -> dict[str, Tensor | None]:
    """Tensors that a stored tensor must not be replaced by."""
    return {
        "missing": None,
        "shorter": tensor[:-1] if len(tensor) > 1 else tensor[:0],
        "longer": torch.cat([tensor, tensor]),
        "of another dtype": tensor.to(torch.int32 if tensor.dtype == torch.uint8 else torch.int16),
        "elsewhere": tensor.to("meta"),
        "spread": torch.stack([tensor, tensor], -1)[..., 0] if len(tensor) > 1 else tensor[:0],
    }


@pytest.mark.parametrize("place", range(1, 1 + len(VECTORS)))
def test_stored_tensors_that_do_not_fit_are_refused(place: int, backend: str, generator) -> None:
    spec = QuantSpec(parse("uint8"), zero_point=True)
    one, x = linear_case(generator, spec), torch.randn(5, CHANNELS, generator=generator)
    name = VECTORS[place - 1]
    expected = one.call(x)
    for what, tensor in wrong(one.tensors[place]).items():
        if name == "bias" and what in ("missing", "spread"):
            continue  # a layer may have none, and it is copied
        tensors = [tensor if n == place else one.tensors[n] for n in range(len(one.tensors))]
        with pytest.raises(ValueError, match="must"):
            compute(x, tensors, one.part)
    assert torch.equal(one.call(x), expected)


def test_codes_that_do_not_fit_are_refused(backend: str, generator) -> None:
    one, x = linear_case(generator), torch.randn(5, CHANNELS, generator=generator)
    packed, *rest = one.tensors
    for codes in (
        packed[:, :-1],
        torch.cat([packed, packed], 1),
        packed[:, :, None],
        packed.int(),
        packed[0],
        packed[:-1],
    ):
        with pytest.raises(ValueError, match="must"):
            compute(x, (codes, *rest), one.part)
    with pytest.raises(ValueError, match="bytes a row"):
        operators.dequantize(packed[:, :-1], rest[0], rest[1], "uint4", CHANNELS, 0)


def test_layouts_of_inputs_change_nothing(backend: str, generator) -> None:
    one, x = linear_case(generator), torch.randn(6, CHANNELS, generator=generator)
    expected = one.call(x)
    wide = torch.randn(6, 2 * CHANNELS, generator=generator)
    wide[:, ::2] = x
    for same in (wide[:, ::2], x.t().contiguous().t(), torch.cat([x, x])[:6], x[None].expand(3, -1, -1)[1]):
        assert torch.equal(one.call(same), expected)
    assert torch.equal(one.call(x[:1].expand(6, -1)), expected[:1].expand(6, -1))
    assert one.call(x[:0]).shape == (0, ROWS)


def test_attention_is_checked(generator) -> None:
    query = torch.randn(1, 2, 4, 16, generator=generator).bfloat16()
    wrong_calls = [
        (query[0], query, query, None),
        (query, query[..., :8], query[..., :8], None),
        (query, query, query[:, :, :2], None),
        (query, query[:, :, :0], query[:, :, :0], None),
        (query, query[:, :1], query[:, :1], None),
        (query, query.float(), query.float(), None),
        (query, query, query, torch.zeros(3, 4)),
        (query, query, query, torch.zeros(4, 4, dtype=torch.int32)),
    ]
    for call in wrong_calls:
        with pytest.raises(ValueError, match="must"):
            attention.attend(*call, 0.25)


def test_attention_of_other_lengths_is_left_to_torch(generator, monkeypatch) -> None:
    monkeypatch.setattr(attention, "torch_has_tiles", lambda: False)
    query = torch.randn(2, 2, 4, 16, generator=generator).bfloat16()
    assert attention.supports(query, query, query, None)
    assert not attention.supports(query, query[:1], query[:1], None)
    assert not attention.supports(query, query, query[:, :, :2], None)


def test_branches_are_checked(backend: str, generator) -> None:
    one, x = linear_case(generator), torch.randn(5, CHANNELS, generator=generator)
    down, up = torch.randn(2, CHANNELS, generator=generator), torch.randn(ROWS, 2, generator=generator)
    weight, inputs = stored(one.tensors, one.part)

    def beside(*pair: Tensor) -> Tensor:
        return operators.linear(x, Weight(weight.columns, branch=Branch(*pair)), [inputs], one.tensors[5])

    assert beside(down, up).shape == (5, ROWS)
    for pair in ((down[:, :-1], up), (down, up[:-1]), (down[:1], up), (down.int(), up), (down[0], up)):
        with pytest.raises(ValueError, match="a branch must"):
            beside(*pair)


@pytest.mark.parametrize("name", ["uint8", "ue1m7"])
@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("weight", ["int4", "uint4", "e2m1"])
def test_zeros_add_exactly_nothing(weight, kernel, name, backend, generator) -> None:
    """The shift of unsigned inputs is taken back in integers: in float32 a remainder of the correction stayed."""
    spec = QuantSpec(parse(weight), "channel", zero_point=weight == "uint4")
    shape = (ROWS, CHANNELS) if kernel is None else (ROWS, CHANNELS, kernel, kernel)
    one = case(shape, Part(CHANNELS, spec, QuantSpec(parse(name))), generator, bias=False)
    x = torch.zeros(8, CHANNELS) if kernel is None else torch.zeros(2, CHANNELS, 5, 5)
    geometry = () if kernel is None else ((1, 1), (1, 1), (1, 1), 1)
    assert one.call(x, *geometry).count_nonzero() == 0
    single = x.clone()
    single[(0, 3) if kernel is None else (0, 3, 2, 2)] = 1.0
    result = one.call(single, *geometry)
    value = rounded(single, one, kernel is not None).max()
    expected = value * (one.weight[:, 3] if kernel is None else one.weight[:, 3].flip(1, 2))
    got = result[0] if kernel is None else result[0, :, 1:4, 1:4]
    assert torch.allclose(got, expected, rtol=2e-6, atol=1e-6 * float(expected.abs().max()))
    assert result[1:].count_nonzero() == 0


def _in_child(queue: Any, one: Any, x: Tensor) -> None:
    queue.put((native_library.threads(), one.call(x).tolist()))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_with_one_thread(generator) -> None:
    if "cpu" not in dispatch.available():
        pytest.skip("the native library was not built")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, x = linear_case(generator), torch.randn(4096, CHANNELS, generator=generator)
        with use_backend("cpu"):
            expected = one.call(x)  # the parent's pool is awake now
            context = multiprocessing.get_context("fork")
            queue = context.Queue()
            child = context.Process(target=_in_child, args=(queue, one, x), daemon=True)
            child.start()
            used, result = queue.get(timeout=60)
            child.join(60)
        assert used == 1 and torch.equal(torch.tensor(result), expected)
    finally:
        torch.set_num_threads(threads)


def test_rows_of_several_widths_are_checked(backend: str, generator) -> None:
    weights = [QuantSpec(parse("int4"), "channel"), QuantSpec(parse("int2"), "channel")]
    layers = [case((5, CHANNELS), Part(CHANNELS, w, TOKEN), generator, bias=False) for w in weights]
    packed, scales = ([one.tensors[n] for one in layers] for n in (0, 1))
    order, x = torch.tensor([0, 1] * 5, dtype=torch.uint8), torch.randn(3, CHANNELS, generator=generator)

    def run(x: Tensor, packed: Any, scales: Any, input_scale: Any, order: Any, bias: Any) -> Tensor:
        fields = zip(packed, scales, layers, strict=True)
        pieces = tuple(PackedWeight(codes, scale, None, one.part) for codes, scale, one in fields)
        return operators.linear(x, Weight((pieces,), order), [Inputs(input_scale)], bias)

    good = (packed, scales, None, order, None)
    assert run(x, *good).shape == (3, ROWS)
    for bad in (x[:, 1:], torch.cat([x, x], 1), x.long()):
        with pytest.raises(ValueError, match="input of a quantized layer must"):
            run(bad, *good)
    replaced = {
        0: [packed[0], packed[1][:, :-1]],
        1: [scales[0], scales[1][:-1]],
        2: torch.ones(1),
        3: order[:-1],
        4: torch.ones(ROWS - 1),
    }
    for place, value in replaced.items():
        with pytest.raises(ValueError, match="must"):
            run(x, *(value if n == place else one for n, one in enumerate(good)))


@pytest.mark.parametrize("size", [(7, 3), (3, 7), (3, 3)])
def test_results_one_pixel_wide(size, backend, generator) -> None:
    """Patches of one input channel overlap in memory there."""
    part = Part(1, QuantSpec(parse("int2"), "channel"), QuantSpec(parse("int4"), "token", online=True))
    one, x = case((13, 1, 3, 3), part, generator), torch.randn(2, 1, *size, generator=generator)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    with use_backend("reference"):
        expected = one.call(x, *geometry)
    assert torch.allclose(
        one.call(x, *geometry), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )

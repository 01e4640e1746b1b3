"""A layer's call is prepared once: few Python calls, and the same result whatever happens to the layer in between."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import difloat
from difloat.kernels import dispatch, native_library
from difloat.layers import install
from difloat.layers.packed import QuantizedLayer
from difloat.numbers.formats import parse
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import QuantSpec
from mixed_rows import STATIC, TOKEN, mixed, spec_of
from tiny import PROMPTS, tiny_pixart

pytestmark = pytest.mark.skipif(
    native_library.unit() is None, reason="calls are prepared for the native library, which was not built"
)
KINDS = [(kernel, several) for kernel in (None, 3) for several in (False, True)]
needs_decoding = pytest.mark.skipif(
    native_library.unit() not in ("amx", "avx512"),
    reason="only the units of AVX-512 round to formats that are no integers of 8 bits",
)
ACTIVATIONS = [
    pytest.param(TOKEN, id="online"),
    pytest.param(STATIC, id="static"),
    pytest.param(QuantSpec(parse("e4m3"), "token", online=True), id="online FP8", marks=needs_decoding),
    pytest.param(QuantSpec(parse("e4m3")), id="static FP8", marks=needs_decoding),
    pytest.param(QuantSpec(parse("e2m1")), id="static FP4"),
]


def layer_of(
    kernel: int | None, several: bool, generator: torch.Generator, activation: object = TOKEN
) -> QuantizedLayer:
    """A linear layer or convolution of 12 to 10 channels, with rows of one width or two."""
    shape = (10, 12) if kernel is None else (10, 12, kernel, kernel)
    names, counts = (("uint2", "int4"), (4, 6)) if several else (("int4",), (10,))
    plan = mixed(shape, [spec_of(name) for name in names], counts, generator, activation=activation).joined
    plain = nn.Linear(12, 10) if kernel is None else nn.Conv2d(12, 10, kernel, padding=1)
    plain.bias.data.copy_(torch.randn(10, generator=generator))
    model = nn.Sequential(plain)
    install.install(model, "0", plan)
    return model[0]


def input_of(layer: QuantizedLayer, generator: torch.Generator, tokens: int = 2) -> Tensor:
    shape = (tokens, 12) if len(layer.float_shape) == 2 else (tokens, 12, 5, 6)
    return torch.randn(shape, generator=generator)


def general(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The result by the operators, without a prepared call."""
    kept, layer._prepared = layer._prepared, None
    try:
        with torch.no_grad():
            return layer(x)
    finally:
        layer._prepared = kept


def python_calls(run: Callable[[], object]) -> int:
    """Python functions that the second call of `run` calls, itself not counted."""
    calls = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    with torch.no_grad():
        run()
        sys.setprofile(seen)
        try:
            run()
        finally:
            sys.setprofile(None)
    return calls - 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [None, 3])
def test_few_python_calls(kernel, activation, generator) -> None:
    plain, several = (layer_of(kernel, mixed_rows, generator, activation) for mixed_rows in (False, True))
    x = input_of(plain, generator)
    counts = [python_calls(lambda layer=layer: layer(x)) for layer in (plain, several)]
    assert counts[0] <= 15 and counts[1] <= 1.3 * counts[0], counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "several"), KINDS)
def test_prepared_calls_are_the_operators_bit_for_bit(kernel, several, activation, dtype, generator) -> None:
    layer = layer_of(kernel, several, generator, activation)
    with torch.no_grad():
        for tokens in (2, 0, 300 if kernel is None else 3):
            x = input_of(layer, generator, tokens).to(dtype)
            inputs = [x, x.flip(-1).mT.contiguous().mT] if tokens else [x]
            inputs += [x.to(memory_format=torch.channels_last)] if kernel else []
            for one in inputs:
                got, expected = layer(one), general(layer, one)
                assert torch.equal(got, expected) and got.dtype == dtype
                assert got.stride() == expected.stride() or not tokens
    assert layer._prepared


@needs_decoding
def test_few_python_calls_in_every_layer_of_the_default_recipe(generator) -> None:
    """Which chooses formats that an integer product computes, and others."""
    pipeline = tiny_pixart()
    cheap = {"iterations": 2, "rounding_rows": 4}
    difloat.quantize(
        pipeline, recipe="lbfp", bits="w4a8", prompts=PROMPTS, samples=8, steps=2, progress=False, **cheap
    )
    backends = set()
    for layer in (one for one in pipeline.transformer.modules() if isinstance(one, QuantizedLayer)):
        picture = [8, 8] if len(layer.float_shape) == 4 else []
        x = torch.randn((2, layer.float_shape[1], *picture), generator=generator)
        assert python_calls(lambda layer=layer, x=x: layer(x)) <= 15
        weight, _ = layer.packed_weight()
        backends.add(dispatch.choose_for(weight, x).__name__.rpartition(".")[2])
    assert backends == {"native_int8", "native_decode"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "several"), KINDS)
def test_parts_of_the_input_are_prepared_too(kernel, several, activation, generator) -> None:
    """A skip concatenation's features, each with a scale of its own; also behind factors of the input."""
    shape = (10, 12) if kernel is None else (10, 12, kernel, kernel)
    names, counts = (("uint2", "int4"), (4, 6)) if several else (("int4",), (10,))
    for factors in (None, torch.rand(12, generator=generator) + 0.5):
        plan = mixed(
            shape,
            [spec_of(name) for name in names],
            counts,
            generator,
            channels=(8, 4),
            activation=activation,
            factors=factors,
        ).joined
        if "input_scale" in plan.tensors:
            plan.tensors["input_scale"][1] *= 0.5
        model = nn.Sequential(nn.Linear(12, 10) if kernel is None else nn.Conv2d(12, 10, kernel, padding=1))
        install.install(model, "0", plan)
        layer = model[0]
        with torch.no_grad():
            for tokens in (2, 0, 70 if kernel is None else 3):
                x = input_of(layer, generator, tokens).bfloat16()
                for one in [x, x.to(memory_format=torch.channels_last)] if kernel else [x]:
                    got, expected = layer(one), general(layer, one)
                    assert torch.equal(got, expected) and got.stride() == expected.stride()
        assert all(kept.call is not None for kept in layer._prepared.values())
        with pytest.raises(ValueError, match="must have 12 channels"):
            layer(x[:, :8])
        assert python_calls(lambda layer=layer, x=x: layer(x)) <= 24  # without a prepared call about 200


BANDS = {  # names of formats and sizes of groups
    "two of four bits around two": [("int4", None), ("uint2", None), ("e2m1", None)],
    "grouped and not": [("int4", 128), ("e2m1", None), ("int4", 128)],
    "of many widths": [(f"int{bits}", None) for bits in range(2, 8)],
}


@pytest.mark.parametrize("kind", BANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [TOKEN, STATIC], ids=["online", "static"])
@pytest.mark.parametrize("kernel", [None, 3])
def test_bands_compute_what_they_compute_alone(kernel, activation, dtype, kind, generator) -> None:
    """Bit for bit, though the input is rounded once for all of them and some ways reorder it."""
    names = [(name, None if kernel else group) for name, group in BANDS[kind]]
    specs = [spec_of(name, "group" if group else "channel", group) for name, group in names]
    counts = [70, 3, *[5] * (len(names) - 2)]
    shape = (sum(counts), 256) if kernel is None else (sum(counts), 20, kernel, kernel)
    one = mixed(shape, specs, counts, generator, activation=activation)

    def installed(plan: LayerPlan) -> nn.Module:
        rows = plan.shape[0]
        plain = (
            nn.Linear(256, rows, bias=False) if kernel is None else nn.Conv2d(20, rows, kernel, bias=False)
        )
        model = nn.Sequential(plain)
        install.install(model, "0", plan)
        return model

    whole, alone = installed(one.joined), [installed(band) for band in one.bands]
    with torch.no_grad(), dispatch.use_backend("cpu"):
        for tokens in (1, 4, 5, 70) if kernel is None else (2,):
            x = torch.randn((tokens, 256) if kernel is None else (tokens, 20, 5, 6), generator=generator)
            got = whole(x.to(dtype)).index_select(1, one.order)
            assert torch.equal(got, torch.cat([band(x.to(dtype)) for band in alone], 1))


@pytest.mark.parametrize("kernel", [None, 3])
def test_a_backend_without_a_prepared_call_is_called_past_the_dispatcher(kernel, generator) -> None:
    layer = layer_of(kernel, False, generator, QuantSpec(parse("e4m3"), "token", online=True))
    x = input_of(layer, generator)
    with torch.no_grad(), dispatch.use_backend("reference"):
        out = layer(x)
        (kept,) = layer._prepared.values()
        assert kept.call is None and kept.direct is not None
        assert torch.equal(out, general(layer, x)) and torch.equal(layer(x), out)
        with pytest.raises(ValueError, match="must have 12 channels"):
            layer(x[..., :-1] if kernel is None else x[:, :-1])


def _swap(layer: QuantizedLayer, other: QuantizedLayer) -> None:
    for name in ("weight", "bias"):
        layer.get_parameter(name).data = other.get_parameter(name).data.clone()


def _assign(layer: QuantizedLayer, other: QuantizedLayer) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def _load(layer: QuantizedLayer, other: QuantizedLayer) -> None:
    layer.load_state_dict(other.state_dict())


def _away_and_back(layer: QuantizedLayer, other: QuantizedLayer) -> None:
    layer.to("meta")
    layer.load_state_dict(other.state_dict(), assign=True)


@pytest.mark.parametrize("change", [_swap, _assign, _load, _away_and_back])
@pytest.mark.parametrize(("kernel", "several"), KINDS)
def test_tensors_that_change_are_read_again(kernel, several, change, generator) -> None:
    layer, other = (layer_of(kernel, several, generator) for _ in range(2))
    x = input_of(layer, generator)
    with torch.no_grad():
        before = layer(x)
        change(layer, other)
        assert torch.equal(layer(x), general(layer, x)) and not torch.equal(layer(x), before)
        if change is not _swap:
            assert torch.equal(layer(x), other(x))
        layer.bias = None
        assert torch.equal(layer(x), general(layer, x))


@pytest.mark.parametrize(("kernel", "several"), KINDS)
def test_copies_threads_backends_and_compilers(kernel, several, generator) -> None:
    layer = layer_of(kernel, several, generator)
    x = input_of(layer, generator)
    with torch.no_grad():
        expected = layer(x)
        copies = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
        layer.bfloat16().float()
        layer.bias.data.copy_(copies[0].bias.data)
        for one in (*copies, layer):
            assert torch.equal(one(x), expected)
        for name in dispatch.available():
            if name != "triton":
                with dispatch.use_backend(name):
                    assert torch.equal(layer(x), general(layer, x))
        assert torch.equal(layer(x), expected)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(layer(x) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(torch.equal(result, expected) for result in found)


@pytest.mark.parametrize(("kernel", "several"), KINDS)
def test_gradients_go_through_the_operator(kernel, several, generator) -> None:
    layer = layer_of(kernel, several, generator)
    x = input_of(layer, generator)
    with torch.no_grad():
        expected = layer(x)
    out = layer(x.requires_grad_())
    out.sum().backward()
    assert torch.equal(out, expected) and x.grad is not None and layer.bias.grad is not None


class Seen(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [None, 3])
def test_modes_and_kinds_of_tensors_see_the_operator(kernel, generator) -> None:
    layer = layer_of(kernel, False, generator)
    x = input_of(layer, generator)
    with torch.no_grad():
        expected = layer(x)
        with Seen() as seen:
            assert torch.equal(layer(x), expected)
        assert f"difloat.{'conv2d' if kernel else 'linear'}.default" in seen.names
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == expected.shape


@pytest.mark.parametrize("kernel", [None, 3])
def test_wrong_inputs_are_refused_after_a_prepared_call(kernel, generator) -> None:
    layer = layer_of(kernel, False, generator)
    x = input_of(layer, generator)
    wrong = [x[:, 1:], torch.cat([x, x], 1), x.long(), x.to("meta"), x.to_sparse()]
    with torch.no_grad():
        layer(x)
        for one in wrong:
            with pytest.raises(ValueError, match="must"), dispatch.use_backend("cpu"):
                general(layer, one)
            with pytest.raises(ValueError, match="must"), dispatch.use_backend("cpu"):
                layer(one)
        if kernel:
            layer.padding = (0, 0)
            layer._prepared.clear()
            with pytest.raises(ValueError, match="pictures must be as large as the kernel reaches"):
                layer(x[:, :, :1])

"""Times of kernels: kinds of layers, their file, and what times decide, which formats a layer gets and who computes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from difloat import recipes
from difloat.calibration.collect import CalibrationSettings, collect, denoiser_of
from difloat.cli import kernel_summary
from difloat.kernels import dispatch, latency, native_decode
from difloat.kernels.latency import Kind, kind_of
from difloat.layers import install
from difloat.methods.post_training import Bits, Task
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec
from tiny import tiny_pixart

TOKEN = QuantSpec(parse("int8"), "token", online=True)
RANGED = QuantSpec(parse("uint4"), "group", 32, online=True, zero_point=True)
CHANNEL = QuantSpec(parse("e2m1"), "channel")
needs_library = pytest.mark.skipif("cpu" not in dispatch.available(), reason="no native library here")
Time = Callable[[Kind], float]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[None]:
    """A cache of its own."""
    monkeypatch.setenv("DIFLOAT_CACHE", str(tmp_path))
    yield
    latency._read.cache_clear()
    dispatch.prepare_anew()


@pytest.fixture
def timed(cache, monkeypatch) -> Callable[[Time], list[Kind]]:
    """Sets what a product takes, and returns the list of the kinds that are measured."""

    def by(time: Time) -> list[Kind]:
        seen: list[Kind] = []
        monkeypatch.setattr(latency, "_measured", lambda kind: seen.append(kind) or time(kind))
        return seen

    return by


def test_layers_of_a_kind_share_a_time(timed) -> None:
    seen = timed(lambda kind: 1e-9)
    part = Part(1000, CHANNEL, TOKEN)
    one, other = (kind_of(part, *sizes, (), torch.float32) for sizes in [(1000, 1000), (1152, 1100)])
    assert one == other and one.channels == 1024 and one.tokens == 1024
    assert kind_of(part, 9000, 10**6, (), torch.float32).channels == 4096
    assert kind_of(part, 3, 0, (), torch.float32).tokens == 1
    for changed in (
        kind_of(part, 1000, 1, (), torch.float32),
        kind_of(part, 1000, 1000, (3, 3), torch.float32),
        kind_of(part, 1000, 1000, (), torch.bfloat16),
        kind_of(replace(part, activation=RANGED), 1000, 1000, (), torch.float32),
        kind_of(None, 1000, 1000, (), torch.float32),
    ):
        assert changed.key != one.key
    tables = [
        QuantSpec(parse(name), "channel")
        for name in ("table(-120,-5,5,120)", "table(-127,-9,4,121)", "table(-2,-1,1,2)")
    ]
    near, alike, apart = (kind_of(Part(64, spec, TOKEN), 64, 64, (), torch.float32) for spec in tables)
    assert near.key == alike.key != apart.key
    latency.measure([one, other], lambda text: None)
    assert seen == [one]
    assert latency.seconds(one, 10, 1000, 64) == pytest.approx(10 * 1000 * 64 * 1e-9)


def test_a_kind_is_measured_once_and_kept(timed) -> None:
    seen, said = timed(lambda kind: 2e-9), []
    kind = kind_of(Part(64, CHANNEL, TOKEN), 64, 64, (), torch.float32)
    assert latency.seconds(kind, 1, 64, 64) is None and "no times of this machine" in kernel_summary.times()
    latency.measure([kind], said.append)
    latency.measure([kind], said.append)
    assert seen == [kind] and len(said) == 1 and "measuring 1 kinds of layers" in said[0]
    assert (
        f"times of 1 kinds of layers measured on this machine, {latency.cache_file()}"
        in kernel_summary.times()
    )
    stored = json.loads(latency.cache_file().read_text())
    assert stored["machine"] == latency.machine() and stored["seconds_per_product"] == {kind.key: 2e-9}
    latency.cache_file().write_text(json.dumps({**stored, "machine": "another"}))
    latency._read.cache_clear()
    assert latency.seconds(kind, 1, 64, 64) is None
    latency.cache_file().write_text("{")
    latency._read.cache_clear()
    with pytest.raises(ValueError, match="measured times must be JSON as written, got .* delete it"):
        latency.seconds(kind, 1, 64, 64)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize(
    "part", [None, Part(64, CHANNEL, TOKEN), Part(64, CHANNEL, RANGED), Part(64, CHANNEL)]
)
def test_every_kind_can_be_measured(part, kernel, cache, monkeypatch) -> None:
    monkeypatch.setattr(latency, "_LEAST_S", 0.0)
    kind = kind_of(part, 64, 64, kernel, torch.float32)
    latency.measure([kind], lambda text: None)
    assert 0 < latency.seconds(kind, 1, 1, 1) < 1e-3


def packed_layer(generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32))
    weight = torch.randn(32, 64, generator=generator)
    layer = plan_layer(weight, [Part(64, CHANNEL, TOKEN)], [weight.abs().amax(1) / 6])
    install.install(model, "0", layer)
    return model.requires_grad_(False)


@needs_library
@pytest.mark.parametrize(
    ("packed", "allowed", "kept"), [(2.0, "1", True), (1.0, "1", False), (1.06, "1", True), (2.0, "0", False)]
)
def test_a_layer_slower_than_float_is_decoded_once(packed, allowed, kept, timed, monkeypatch) -> None:
    """The rule is 0.95 of float's speed from 64 tokens on; memory has to be allowed."""
    monkeypatch.setenv("DIFLOAT_DECODED_MB", allowed)
    native_decode.allowed_bytes.cache_clear()
    timed(lambda kind: 1e-9 if kind.weight is None else packed * 1e-9)
    model, x = packed_layer(torch.Generator().manual_seed(0)), torch.randn(64, 64)
    with dispatch.use_backend("auto"):
        plain = model(x)
        assert native_decode.kept_bytes() == 0  # nothing was measured yet
        part = model[0].parts[0]
        kinds = [kind_of(one, 64, 64, (), torch.float32) for one in (part, None)]
        latency.measure(kinds, lambda text: None)
        result = model(x)
        assert (native_decode.kept_bytes() > 0) is kept
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)
    with dispatch.use_backend("decoded" if kept else "cpu"):
        assert torch.equal(result, model(x))
    del model
    native_decode.allowed_bytes.cache_clear()


def test_formats_are_chosen_by_their_times_too(timed) -> None:
    """5 and 6 bits are slower than float on this pretended machine, and 8 bits take three times as long as 4."""
    slow = {5: 9e-9, 6: 9e-9, 8: 3e-9}
    seen = timed(lambda kind: 4e-9 if kind.weight is None else slow.get(kind.weight.format.bits, 1e-9))
    pipeline = tiny_pixart()
    settings = CalibrationSettings(samples=16, steps=2, prompts_per_batch=4)
    data = collect(pipeline, ["a cat", "a red house"], settings, progress=False)
    task = Task(denoiser_of(pipeline)[1], data, Bits.parse("w4a8"), progress=False)
    options = {"rows": 16, "widths": "layers"}
    free = recipes.plan(task, "auto", "w4a8", options)
    assert not seen and "seconds" not in free.measured["widths"]
    plan = recipes.plan(replace(task, target="cpu"), "auto", "w4a8", options)
    found = plan.measured["widths"]
    chosen = {name: plan.layers[name].parts[0].weight.format.bits for name in found["seconds"]}
    assert seen and chosen and not {5, 6} & set(chosen.values())
    total = sum(expected for expected, _ in found["seconds"].values())
    assert 0 < total <= found["most_seconds"]
    assert all(expected <= floating / 0.8 for expected, floating in found["seconds"].values())
    widths = lambda of: {of.layers[name].parts[0].weight.format.bits for name in chosen}  # noqa: E731
    assert {5, 6, 8} & widths(free)

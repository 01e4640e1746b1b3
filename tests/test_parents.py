"""Parents that read the dtype of their layers' weights: T5's feed-forward in every dtype, and layers that must stay float."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difloat import checkpoint
from difloat.layers import dtype_readers, install, packed
from difloat.numbers import formats
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import Plan
from difloat.plan.specs import Part, QuantSpec
from tiny import tiny_t5, tiny_tokenizer

WO = "encoder.block.0.layer.1.DenseReluDense.wo"
IDS = torch.tensor([[5, 6, 7, 1]])


class Casting(nn.Module):
    """Always casts, as CLIP's patch embedding does; the other layer is only asked what kind of dtype it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.free = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.free.weight.dtype.is_floating_point:
            x = x + 0
        return self.free(self.inner(x.to(self.inner.weight.dtype)))


def weight_only(model: nn.Module) -> Plan:
    spec = QuantSpec(formats.parse("e2m1"), "channel")
    plans = {}
    for name, layer in packed.quantizable(model).items():
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1) / spec.format.max
        plans[name] = plan_layer(weight, [Part(weight.shape[1], spec)], [scale])
    return Plan("rtn", "w4a16", plans)


@pytest.fixture
def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_t5(tiny_tokenizer())


def test_a_layer_whose_input_is_always_cast_stays_float() -> None:
    model = Casting()
    assert dtype_readers.kept(model) == {"inner": "the model casts to the dtype of its weight"}
    assert list(packed.quantizable(model)) == ["free"]
    assert dtype_readers.use_of(model, "inner") == "dtype" and dtype_readers.use_of(model, "free") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_computes_what_its_dequantized_weights_compute(encoder, dtype) -> None:
    plan = weight_only(encoder)
    encoder.to(dtype)
    if (
        dtype == torch.float16
    ):  # as transformers loads it: the sum of a feed-forward does not fit half precision
        encoder.get_submodule(WO).float()
    with torch.no_grad():
        for name, layer in plan.layers.items():
            weight = packed.weight_of(encoder, name)
            weight.copy_(dequantize(layer))
        expected = encoder(IDS)[0]
        install.apply(encoder, plan)
        found = encoder(IDS)[0]
    wo = encoder.get_submodule(WO)
    assert wo.weight.dtype == torch.int8 and wo.packed.dtype == torch.uint8
    assert wo.input_dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert found.dtype == expected.dtype
    # Sums in another order: a few units in the last place of the dtype, relative to the largest value.
    assert float((found - expected).abs().max() / expected.abs().max()) < 8 * torch.finfo(dtype).eps


def test_a_change_of_dtype_after_quantizing_is_followed(encoder) -> None:
    install.apply(encoder, weight_only(encoder)).to(torch.bfloat16)
    wo = encoder.get_submodule(WO)
    assert wo.input_dtype == torch.bfloat16 and wo.weight_scale.dtype == torch.float32
    with torch.no_grad():
        assert encoder(IDS)[0].dtype == torch.bfloat16


def test_the_plan_is_the_same_bytes_and_swapping_again_keeps_the_answer(encoder) -> None:
    plan = weight_only(encoder)
    install.apply(encoder, plan)
    wo = encoder.get_submodule(WO)
    assert torch.equal(wo.plan().tensors["weight"], plan.layers[WO].tensors["weight"])
    install.install(encoder, WO, plan.layers[WO])
    again = encoder.get_submodule(WO)
    assert again is not wo and again.weight.dtype == torch.int8 and again.input_dtype == torch.float32
    assert not checkpoint.layout.bundled_names(plan)


def test_a_plain_module_around_an_encoder_is_saved_and_loaded(encoder, tmp_path) -> None:
    plan = weight_only(nn.Sequential(encoder))
    model = install.apply(nn.Sequential(encoder), plan)
    checkpoint.mark_quantized(model, plan)
    directory = checkpoint.save(model, tmp_path / "a")
    assert all(finding.passed for finding in checkpoint.verify(directory))
    with torch.random.fork_rng(devices=[]):
        loaded = checkpoint.load(directory, into=nn.Sequential(tiny_t5(tiny_tokenizer())))
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    assert loaded[0].get_submodule(WO).weight.dtype == torch.int8

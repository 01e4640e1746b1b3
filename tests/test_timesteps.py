"""Layers whose weight depends on the timestep: the right one is taken, stored, verified and loaded."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import difloat
from difloat.layers import install
from difloat.layers import packed as layers
from difloat.layers.timestep_clock import Clock
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, join_variants, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec

GRID = (0.0, 100.0, 500.0, 900.0)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(sample), self.conv(sample[:, :3, None, None].expand(-1, -1, 4, 4))


def stretched(weight: Tensor, factors: Tensor, schedule: tuple[int, ...]) -> LayerPlan:
    part = Part(
        weight.shape[1], QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("int8"), "token", online=True)
    )
    plans = []
    for factor in factors:
        divided = weight / factor.reshape(1, -1, *[1] * (weight.dim() - 2))
        plans.append(plan_layer(divided, [part], [divided.flatten(1).abs().amax(1) / 6]))
    return join_variants(plans, schedule, factors)


def quantized() -> tuple[Denoiser, Plan, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Denoiser()
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("proj", "conv")}
    entries = {
        "proj": stretched(weights["proj"], torch.rand(3, 6) + 0.5, (0, 1, 1, 2)),
        "conv": stretched(weights["conv"], torch.rand(1, 3) + 0.5, ()),
    }
    plan = Plan("test", "w4a8", entries, timesteps=GRID)
    difloat.apply(model, plan)
    return model, plan, weights


def by_hand(layer: LayerPlan, number: int, x: Tensor, bias: Tensor) -> Tensor:
    one = layer.variant(number)
    factor = one.tensors["input_factor"]
    x = x * factor
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    return rounded @ (dequantize(one) / factor).T + bias


@pytest.mark.parametrize(
    ("timestep", "number"), [(0.0, 0), (40.0, 0), (60.0, 1), (600.0, 1), (800.0, 2), (2000.0, 2)]
)
def test_the_nearest_timestep_chooses_the_weight(timestep, number, generator) -> None:
    model, plan, _ = quantized()
    x = torch.randn(5, 6, generator=generator)
    expected = by_hand(plan.layers["proj"], number, x, model.proj.bias)
    for value in (timestep, torch.tensor(timestep), torch.full((5,), timestep)):
        torch.testing.assert_close(model(x, value)[0], expected)
    torch.testing.assert_close(model(timestep=torch.tensor([timestep]), sample=x)[0], expected)


def test_smoothing_undoes_itself(generator) -> None:
    model, plan, weights = quantized()
    for name, layer in plan.layers.items():
        for number in range(layer.variants):
            error = (dequantize(layer.variant(number)) - weights[name]).norm() / weights[name].norm()
            assert float(error) < 0.2
    x = torch.randn(5, 6, generator=generator)
    plain = Denoiser()
    biases = {f"{name}.bias": getattr(model, name).bias for name in weights}
    plain.load_state_dict({**{f"{name}.weight": weight for name, weight in weights.items()}, **biases})
    with torch.no_grad():
        results = list(zip(model(x, 0.0), plain(x, 0.0), strict=True))
    for got, exact in results:
        assert float((got - exact).norm() / exact.norm()) < 0.3


def test_save_verify_load_give_the_same_bits(tmp_path, generator) -> None:
    model, plan, _ = quantized()
    difloat.save(model, tmp_path / "a")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "a"))
    loaded = difloat.load(tmp_path / "a", into=Denoiser())
    x = torch.randn(5, 6, generator=generator)
    for timestep in GRID:
        for got, expected in zip(loaded(x, timestep), model(x, timestep), strict=True):
            assert torch.equal(got, expected)
    difloat.save(loaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


class Deep(nn.Module):
    """Eight layers whose weights are of opposite signs at the two ends of the grid."""

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.checkpointed = checkpointed
        self.inner: nn.Module | None = None
        weights = {f"blocks.{n}": block.weight.detach() for n, block in enumerate(self.blocks)}
        part = Part(16, QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("int8"), "token", online=True))
        plans = {
            name: join_variants(
                [plan_layer(v, [part], [v.abs().amax(1) / 6]) for v in (weight, -weight)], (0, 1)
            )
            for name, weight in weights.items()
        }
        difloat.apply(self, Plan("test", "w4a8", plans, timesteps=(0.0, 999.0)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if self.checkpointed:
                reentrant = self.checkpointed == "reentrant"
                sample = checkpoint(block, sample, use_reentrant=reentrant).tanh()
            else:
                sample = block(sample).tanh()
            if self.inner is not None and number == 3:
                with torch.no_grad():
                    self.inner(sample, 999.0 - timestep)
        return sample


ENDS = (torch.tensor([0.0]), torch.tensor([999.0]))


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("compiled", ["", "model", "blocks"])
def test_threads_have_timesteps_of_their_own(compiled, generator) -> None:
    model = Deep().eval()
    x = torch.randn(16, 16, generator=generator)
    with torch.no_grad():
        expected = [model(x, end) for end in ENDS]
    assert float((expected[0] - expected[1]).abs().max()) > 0.05
    call: nn.Module = model
    if compiled == "model":
        call = torch.compile(model, fullgraph=True, backend="eager")
    for block in model.blocks if compiled == "blocks" else ():
        block.compile(fullgraph=True, backend="eager")
    wrong = [0] * 4

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                wrong[number] += not torch.equal(call(x, ENDS[number % 2]), expected[number % 2])

    with torch.no_grad():
        call(x, ENDS[0])  # compiles once, in one thread
    in_threads(work, 4)
    assert wrong == [0] * 4


# Dynamo itself looks at .grad of what the backward pass hands to a compiled block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("way", "compiled"), [("reentrant", False), ("not reentrant", False), ("not reentrant", True)]
)
def test_a_checkpointed_block_is_computed_again_at_its_calls_timestep(way, compiled, generator) -> None:
    plain, model = Deep(), Deep(way)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    x, y = (torch.randn(4, 16, generator=generator) for _ in range(2))
    gradients = []
    for each in (plain, model):
        inputs = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        outputs = [each(one, end) for one, end in zip(inputs, ENDS, strict=True)]
        each(x.clone().requires_grad_(), ENDS[0])  # another call between the steps' forward and backward
        (outputs[0].sum() + 2 * outputs[1].sum()).backward()
        gradients.append([one.grad for one in inputs])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="must be called by its denoiser"):
        model.blocks[0](x)


def test_features_of_a_checkpointed_call_have_its_gradients_in_any_thread(generator) -> None:
    plain, model = Deep(), Deep("not reentrant")
    x = torch.randn(4, 16, generator=generator)
    gradients: dict[tuple[int, int], Tensor] = {}

    def work(number: int) -> None:
        for end in (number % 2, 1 - number % 2):
            for each in (plain, model):
                caught: list[Tensor] = []
                handle = each.blocks[5].register_forward_hook(
                    lambda m, i, out, caught=caught: caught.append(out)
                )
                one = x.clone().requires_grad_()
                each(one, ENDS[end])
                handle.remove()
                caught[0].sum().backward()  # not through the model's output
                gradients[id(each), end] = one.grad

    work(0)
    for end in range(2):
        torch.testing.assert_close(gradients[id(model), end], gradients[id(plain), end])
    outputs: list[Tensor] = []
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs += [model(one, end) for one, end in zip(inputs, ENDS, strict=True)]
    in_threads(lambda number: outputs[number].sum().backward(), 2)
    for one, end in zip(inputs, ENDS, strict=True):
        other = x.clone().requires_grad_()
        plain(other, end).sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


def test_saved_tensor_hooks_of_the_caller_see_what_they_saw(generator) -> None:
    model, plain = Deep("not reentrant"), Deep()
    x = torch.randn(4, 16, generator=generator)
    seen = []
    for each in (model, plain):
        one = x.clone().requires_grad_()
        packed: list[int] = []

        def pack(tensor: Tensor, packed: list[int] = packed) -> list[Tensor]:
            packed.append(tensor.numel())
            return [tensor]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0]):
            output = each(one, ENDS[1])
        output.sum().backward()
        assert packed
        seen.append(one.grad)
    torch.testing.assert_close(*seen)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):  # as functional transforms do
        plain(x.clone().requires_grad_(), ENDS[1]).sum().backward()


def test_calls_within_calls_and_failed_calls_leave_the_outer_one_as_it_was(generator) -> None:
    model = Deep()
    x = torch.randn(4, 16, generator=generator)
    with torch.no_grad():
        expected = model(x, ENDS[0])
        model.inner = copy.deepcopy(model)
        assert torch.equal(model(x, ENDS[0]), expected)  # a copy at another timestep
        model.inner = None

    class Guided(nn.Module):
        """A denoiser that calls itself, and swallows a refused call."""

        def __init__(self) -> None:
            super().__init__()
            self.deep = model

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            half = list(model.blocks)[:4]
            for block in half:
                sample = block(sample).tanh()
            if float(timestep) == 0.0:
                self(sample, ENDS[1])
                with pytest.raises(ValueError, match="must have one timestep"):
                    self(sample, torch.tensor([0.0, 999.0]))
                with pytest.raises(ValueError, match="must give the timestep as 'timestep', got none"):
                    self(sample, None)
            for block in list(model.blocks)[4:]:
                sample = block(sample).tanh()
            return sample

    guided = Guided()
    install.set_clock(guided, Clock(guided, (0.0, 999.0)))
    with torch.no_grad():
        assert torch.equal(guided(x, ENDS[0]), expected)


def test_copies_and_pickles_choose_for_themselves(generator) -> None:
    model, _, _ = quantized()
    x = torch.randn(5, 6, generator=generator)
    expected = {timestep: model(x, timestep)[0] for timestep in GRID}
    for twin in (install.shadow(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert install.clock_of(twin) is not install.clock_of(model)
        with install.as_in_call(model, (x, 0.0), {}):
            assert torch.equal(twin(x, 900.0)[0], expected[900.0])
            assert torch.equal(model.proj(x), expected[0.0])
            with pytest.raises(RuntimeError, match="must be called by its denoiser"):
                twin.proj(x)
        install.remove_clock(twin)
        assert not twin._forward_hooks and not twin._forward_pre_hooks
        assert not twin._forward_hooks_always_called


def test_a_layer_alone_does_not_take_the_last_calls_timestep(generator) -> None:
    model, _, _ = quantized()
    x = torch.randn(5, 6, generator=generator)
    model(x, 0.0)
    for call in (model.proj, lambda x: model.forward(x, 0.0)):  # `forward` itself runs no hooks
        with pytest.raises(RuntimeError, match="must be called by its denoiser"):
            call(x)


def test_what_cannot_be_done_is_said(generator) -> None:
    model, plan, _ = quantized()
    x = torch.randn(2, 6, generator=generator)
    with pytest.raises(RuntimeError, match="must be called by its denoiser"):
        model.proj(x)
    with pytest.raises(ValueError, match="all rows of a call must have one timestep"):
        model(x, torch.tensor([0.0, 900.0]))
    with pytest.raises(ValueError, match="'proj' has one per stretch"):
        difloat.restore(model)
    assert isinstance(model.proj, layers.QuantLinear)
    with pytest.raises(ValueError, match="forward of Linear must have a parameter called timestep"):
        Clock(nn.Linear(2, 2), GRID)
    with pytest.raises(ValueError, match="an entry for each of the 3 timesteps"):
        Plan("test", "w4a8", plan.layers, timesteps=GRID[:3])

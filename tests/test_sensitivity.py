"""Sensitivities against what is known exactly, and against errors that are really made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difloat.calibration.collect import CalibrationSettings, collect
from difloat.layers.packed import quantizable
from difloat.methods.sensitivity import Probe, SensitivitySettings, probes_of, sensitivities
from difloat.methods.task import Task
from difloat.plan.rules import Bits
from tiny import PROMPTS, tiny_unet

PLAIN = SensitivitySettings(guidance=3.0)


class Chain(nn.Module):
    """Two projections and a number per row; what comes between them is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.idle = nn.Linear(3, 4), nn.Linear(4, 1, bias=False), nn.Linear(3, 2)

    def forward(self, sample: Tensor) -> Tensor:
        self.idle(sample)
        return self.last(self.first(sample).mul_(2))


def chain() -> Chain:
    model = Chain().requires_grad_(False)
    model.last.weight.data = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    return model


def call_of(rows: int) -> Any:
    return (torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)),), {}


def test_of_a_chain_they_are_squares_of_its_weights() -> None:
    model = chain()
    found = sensitivities(model, [Probe(call_of(4), (1.0,) * 4, False)], ["first", "last", "idle"], PLAIN, 0)
    assert found["first"].tolist() == [4.0, 16.0, 0.0, 36.0] and found["last"].tolist() == [1.0]
    assert found["idle"].tolist() == [0.0, 0.0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.5])
def test_guidance_and_timesteps_weigh(guidance: float) -> None:
    settings = SensitivitySettings(guidance=guidance, probes=3)
    paired = Probe(call_of(6), (0.5, 1.0, 3.0), True)
    found = sensitivities(chain(), [paired], ["first", "last"], settings, 0)
    factor = ((1 - guidance) ** 2 + guidance**2) * (0.5 + 1.0 + 3.0) / 3
    torch.testing.assert_close(found["last"], torch.tensor([factor]))
    torch.testing.assert_close(found["first"], factor * torch.tensor([4.0, 16.0, 0.0, 36.0]))


@pytest.mark.parametrize(
    "name", ["mid_block.resnets.0.conv2", "up_blocks.1.resnets.0.conv1", "time_embedding.linear_2"]
)
def test_they_foretell_what_an_error_does_to_the_guided_output(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    model = tiny_unet().unet.requires_grad_(False)
    sample, text = (torch.randn(shape, generator=draw) for shape in ((8, 4, 8, 8), (8, 5, 16)))
    call: Any = ((sample, torch.full((8,), 300)), {"encoder_hidden_states": text})
    settings = SensitivitySettings(probes=64)
    gamma = sensitivities(model, [Probe(call, (1.0,) * 4, True)], list(quantizable(model)), settings, 0)[name]
    size = 1e-2 * torch.rand(len(gamma), generator=draw)

    def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        spread = size.reshape(-1, *[1] * (output.dim() - 2)) if output.dim() == 4 else size
        return output + spread * torch.randn(output.shape, generator=draw)

    def guided() -> Tensor:
        with torch.no_grad():
            output = model(*call[0], **call[1]).sample
        return output[0::2] + settings.guidance * (output[1::2] - output[0::2])

    clean, changes = guided(), []
    with model.get_submodule(name).register_forward_hook(noisy):
        changes = [float((guided() - clean).square().sum()) / 4 for _ in range(40)]
    expected = float((gamma * size.square()).sum())
    assert sum(changes) / len(changes) == pytest.approx(expected, rel=0.15)


def test_blocks_may_run_once_more_instead_of_keeping_their_activations() -> None:
    model = tiny_unet().unet  # its weights ask for gradients, and get none
    draw = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(shape, generator=draw) for shape in ((4, 4, 8, 8), (4, 5, 16)))
    probe = Probe(((sample, torch.full((4,), 300)), {"encoder_hidden_states": text}), (1.0,) * 2, True)
    names, attributes = list(quantizable(model)), {m: set(vars(m)) for m in model.modules()}
    ran = []
    handle = model.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: ran.append(1))
    again = sensitivities(model, [probe, probe], names, SensitivitySettings(recompute=True), 0)
    handle.remove()
    assert len(ran) == 4  # two calls, twice each
    once = sensitivities(model, [probe, probe], names, SensitivitySettings(), 0)
    for name in names:
        torch.testing.assert_close(again[name], once[name])
    assert not model.is_gradient_checkpointing
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {m: set(vars(m)) for m in model.modules()} == attributes


@pytest.mark.parametrize("guided", [True, False])
def test_rows_come_in_pairs_from_all_timesteps(guided: bool) -> None:
    pipeline = tiny_unet()
    settings = CalibrationSettings(
        samples=24, steps=4, guidance_scale=3.0 if guided else 1.0, prompts_per_batch=3
    )
    sizes = {"height": 16, "width": 16}
    data = collect(pipeline, PROMPTS[:3], settings, progress=False, call_kwargs=sizes)
    task = Task(pipeline.unet, data, Bits.parse("w4a8"))
    weights = {timestep: 1.0 + number for number, timestep in enumerate(sorted(set(data.timesteps)))}
    found = probes_of(task, SensitivitySettings(rows=8, rows_per_call=6), weights)
    assert [one.paired for one in found] == [guided] * len(found)
    counts = [len(one.weights) for one in found]
    assert counts == ([3, 1] if guided else [6, 2])
    seen = sorted(weight for one in found for weight in one.weights)
    assert seen == ([1.0, 2.0, 3.0, 4.0] if guided else [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    for one in found:
        sample, text = one.call[0][0], one.call[1]["encoder_hidden_states"]
        if guided:  # the same point with and without its prompt
            assert torch.equal(sample[0::2], sample[1::2]) and len({t.sum().item() for t in text[0::2]}) == 1


def test_a_model_without_gradients_is_refused() -> None:
    model = chain()
    model.forward = torch.no_grad()(model.forward)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="gradients"):
        sensitivities(model, [Probe(call_of(2), (1.0, 1.0), False)], ["first"], PLAIN, 0)
    broken = chain()
    broken.last.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or Inf at layer 'first'"):
        sensitivities(broken, [Probe(call_of(2), (1.0, 1.0), False)], ["first"], PLAIN, 0)


def test_a_call_holds_as_many_rows_as_memory_does() -> None:
    pipeline = tiny_unet()
    data = collect(pipeline, PROMPTS, CalibrationSettings(16, 2, prompts_per_batch=4), progress=False)
    by_time = dict.fromkeys(data.timesteps, 1.0)

    def rows(memory_bytes: int) -> list[int]:
        task = Task(pipeline.unet, data, Bits.parse("w4a8"), memory_bytes=memory_bytes)
        return [len(probe.weights) for probe in probes_of(task, PLAIN, by_time)]

    assert set(rows(1 << 30)) == {4}  # pairs, of eight rows
    assert set(rows(1)) == {1} and sum(rows(1)) == sum(rows(1 << 30))

"""The public functions on a plain module and a tiny pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import api, layers
from tiny import tiny_ddim, tiny_pixart

FAST = {"rounding": "nearest", "weight_granularity": "tensor", "progress": False}


class Denoiser(nn.Module):
    """A denoiser of points in the plane, no diffusers class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.out = nn.Linear(32, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.out(self.inner(torch.cat([x, timestep[:, None].float()], dim=1)))


def loop(model: nn.Module) -> None:
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(4, 0, -1):
            x = x - 0.1 * model(x, torch.full((16,), step))


def test_a_plain_module_is_quantized_saved_and_loaded_bit_for_bit(tmp_path) -> None:
    model = Denoiser()
    x, timestep = torch.randn(5, 2), torch.arange(5)
    before = model(x, timestep).detach()
    plan = difloat.quantize(model, "lbfp", "w8a8", forward_loop=loop, samples=32, progress=False)
    assert set(plan.layers) == {"inner.0", "inner.2", "out"}
    after = model(x, timestep).detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
    difloat.save(model, tmp_path / "m")
    again = difloat.load(tmp_path / "m", into=Denoiser())
    assert torch.equal(again(x, timestep), after)
    assert all(finding.passed for finding in difloat.verify(tmp_path / "m"))


def test_planning_leaves_the_pipeline_alone_and_applying_changes_it() -> None:
    pipeline = tiny_pixart()
    plan = difloat.plan(pipeline, "lbfp", "w4a8", samples=8, steps=2, prompts_per_batch=2, **FAST)
    assert len(layers.quantizable(pipeline.transformer)) == len(plan.layers)
    assert difloat.apply(pipeline, plan) is pipeline
    assert not layers.quantizable(pipeline.transformer)
    float_again = difloat.restore(copy.deepcopy(pipeline.transformer))
    assert set(layers.quantizable(float_again)) == set(plan.layers) and not getattr(
        float_again, "is_quantized", False
    )
    with pytest.raises(ValueError, match="quantized already"):
        difloat.plan(pipeline, samples=8, steps=2)


def test_unconditional_pipelines_need_no_prompts() -> None:
    pipeline = tiny_ddim()
    assert api.prompts_for(pipeline, None) is None
    plan = difloat.plan(pipeline, "rtn", "w8a8", samples=8, steps=2, prompts_per_batch=2, progress=False)
    assert plan.layers and plan.options["calibration_rows"] == 8


def test_built_in_prompts_are_many_and_different() -> None:
    prompts = api.default_prompts()
    assert len(prompts) == len(set(prompts)) >= 32 and all(prompts)


def test_bad_arguments_are_refused_before_any_work() -> None:
    model = Denoiser()
    with pytest.raises(ValueError, match="forward_loop"):
        difloat.plan(model)
    with pytest.raises(ValueError, match="options must be among"):
        difloat.plan(model, forward_loop=loop, colour="red")
    with pytest.raises(ValueError, match="recipe must be one of"):
        difloat.plan(model, "nope", forward_loop=loop)
    with pytest.raises(ValueError, match="bits must"):
        difloat.plan(model, "lbfp", "four", forward_loop=loop)
    model.out.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="'out'"):
        difloat.plan(model, forward_loop=loop)
    with pytest.raises(AttributeError):
        difloat.nothing  # noqa: B018

"""The public functions on a plain module and a tiny pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import api
from difloat.checkpoint import data_free
from difloat.layers import packed
from tiny import PROMPTS, tiny_ddim, tiny_pixart

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
    assert len(packed.quantizable(pipeline.transformer)) == len(plan.layers)
    assert difloat.apply(pipeline, plan) is pipeline
    assert not packed.quantizable(pipeline.transformer)
    float_again = difloat.restore(copy.deepcopy(pipeline.transformer))
    assert set(packed.quantizable(float_again)) == set(plan.layers) and not getattr(
        float_again, "is_quantized", False
    )
    with pytest.raises(ValueError, match="quantized already"):
        difloat.plan(pipeline, samples=8, steps=2)


def test_unconditional_pipelines_need_no_prompts() -> None:
    pipeline = tiny_ddim()
    assert api.prompts_for(pipeline, None) is None
    plan = difloat.plan(
        pipeline, "rtn", "w8a8", samples=8, steps=2, prompts_per_batch=2, progress=False, activation="static"
    )
    assert plan.layers and plan.options["calibration_rows"] == 8


def test_a_recipe_that_needs_no_data_never_calls_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_ddim()

    def called(*_: object, **__: object) -> None:
        raise AssertionError("the denoiser was called")

    monkeypatch.setattr(type(pipeline.unet), "forward", called)
    plan = difloat.plan(pipeline, "rtn", "w4a8", progress=False)
    edges = {name for name, layer in plan.layers.items() if layer.parts[0].weight.format.bits == 8}
    assert plan.options["calibration_rows"] == 0 and {"conv_in", "conv_out"} <= edges < plan.layers.keys()
    with pytest.raises(AssertionError, match="was called"):
        difloat.plan(pipeline, "rtn", "w4a8", activation="static", progress=False)


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


class Mixed(Denoiser):
    """A denoiser with weights of every kind that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.narrow, self.deep = nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1)
        self.up, self.table = nn.ConvTranspose2d(2, 2, 2), nn.Embedding(3, 2)
        self.experts = Experts()
        self.norm = nn.LayerNorm(2)


class Experts(nn.Module):
    """A stack of experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_whatever_stays_float_is_named_with_a_reason() -> None:
    model = Mixed()
    model.own = OwnForward(2, 2)
    plan = difloat.plan(model, "rtn", "w8a8", forward_loop=loop, samples=8, progress=False)
    heavy = {
        name
        for name, module in model.named_modules()
        if any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }
    assert plan.layers.keys() | plan.skipped.keys() == heavy and not plan.layers.keys() & plan.skipped.keys()
    assert set(plan.skipped) == {
        "attention", "attention.out_proj", "narrow", "deep", "up", "table", "experts", "own",
    }  # fmt: skip
    assert "in_proj_weight of MultiheadAttention, no linear layer" in plan.skipped["attention"]
    assert "forward pass of its own" in plan.skipped["own"]
    assert "without calling" in plan.skipped["attention.out_proj"]
    found = data_free.plan(model, data_free.settings({"bits": "w8a8"}), progress=False)
    assert found.layers.keys() | found.skipped.keys() == heavy


def test_losses_weighted_by_the_sampler_are_refused_for_plain_modules_before_calibration() -> None:
    def no_loop(module: nn.Module) -> None:
        raise AssertionError("nothing may be calibrated")

    for recipe in ("msfp", "guided"):
        with pytest.raises(
            ValueError, match=f"{recipe} must be told factor_power=0 for a plain module"
        ) as refused:
            difloat.plan(Denoiser(), recipe, "w4a4", forward_loop=no_loop, progress=False)
        assert "--" not in str(refused.value)
    model = Denoiser()
    plan = difloat.plan(model, "rtn", "w4a8", forward_loop=loop, samples=8, progress=False)
    with pytest.raises(ValueError, match="repair must be told dfa=False"):
        api.repair(model, plan, forward_loop=no_loop)
    repaired = api.repair(
        model, plan, forward_loop=loop, dfa=False, epochs=1, rank=0, samples=8, progress=False
    )
    assert repaired.options["repair"]["guidance_weight"] == 0.0


def test_a_plan_says_what_was_used_not_what_was_asked_for() -> None:
    plan = difloat.plan(
        Denoiser(), "guided", "w4a8", forward_loop=loop, samples=8, progress=False,
        factor_power=0.0, epochs=1, rounding="nearest", guidance_weight=9.0,
    )  # fmt: skip
    assert plan.options["guidance_weight"] == 0.0  # the loop has no pairs of guidance


def test_a_loop_has_a_name_in_the_cache(tmp_path) -> None:
    def scaled(factor: float):
        return lambda m: m(torch.full((8, 2), factor), torch.ones(8))

    def scales(loop, **kwargs) -> Tensor:
        plan = difloat.plan(
            Denoiser(),
            "rtn",
            "w8a8",
            forward_loop=loop,
            samples=8,
            progress=False,
            cache_dir=tmp_path,
            activation="static",
            **kwargs,
        )
        return plan.layers["inner.0"].tensors["input_scale"]

    for kwargs in ({}, {"cache_key": "mine"}):
        assert 50 < float(scales(scaled(1000.0), **kwargs) / scales(scaled(2.0), **kwargs))
    with pytest.raises(ValueError, match="must come with a plain module, got DDIMPipeline"):
        difloat.plan(tiny_ddim(), "rtn", "w8a8", activation="static", cache_key="mine")


def test_a_channels_last_model_learns_rounding_as_any_other() -> None:
    plain, last = tiny_ddim(), tiny_ddim()
    last.unet.to(memory_format=torch.channels_last)
    settings = {"samples": 4, "steps": 2, "prompts_per_batch": 2, "iterations": 2, "progress": False}
    one, other = (difloat.plan(p, "lbfp", "w4a8", **settings) for p in (plain, last))
    assert one.layers.keys() == other.layers.keys()
    # The layouts sum in another order: a few roundings may turn.
    same = [
        (one.layers[n].tensors["weight"] == other.layers[n].tensors["weight"]).float().mean()
        for n in one.layers
    ]
    assert min(same) > 0.8 and any(m.weight.stride(1) == 1 for m in packed.quantizable(last.unet).values())


@pytest.mark.parametrize("recipe", ["lbfp", "guided"])
def test_rows_that_memory_does_not_hold_are_said_and_stored(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = {"samples": 8, "steps": 2, "iterations": 2, "rounding_rows": 8, "rounding": "learned"}
    fast |= {"epochs": 0} if recipe == "guided" else {}
    call = {"use_resolution_binning": False}

    def made(memory_bytes: int) -> tuple[int, str]:
        plan = difloat.plan(
            tiny_pixart(),
            recipe,
            "w4a8",
            prompts=PROMPTS,
            call_kwargs=call,
            memory_bytes=memory_bytes,
            **fast,
        )
        return plan.options["rounding_rows"], capsys.readouterr().err

    rows, said = made(1 << 20)
    assert rows == 8 and "--memory-mb" not in said
    rows, said = made(100_000)
    assert (
        1 <= rows < 8
        and f"rounding is learned on {rows} of 8 rows" in said
        and "--memory-mb 1 holds all" in said
    )


def test_models_of_dtypes_that_do_not_fit_are_named() -> None:
    pipeline = tiny_pixart()
    pipeline.transformer.transformer_blocks[1].bfloat16()
    with pytest.raises(ValueError, match="must compute in one dtype") as caught:
        difloat.plan(pipeline, "lbfp", prompts=PROMPTS, samples=4, steps=2, **FAST)
    assert "float32 in text_encoder" in str(caught.value) and "bfloat16 and float32 in transformer" in str(
        caught.value
    )

"""Where things live: names of devices, every kind of offloading, CUDA where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

import difloat
from difloat import devices, evaluation
from difloat.evaluation import picture_metrics
from difloat.layers import install, offloading
from difloat.plan.plan import Plan
from test_hooks import CPU, offload_groups
from test_modes import assert_same, denoiser, plain_plan, planned
from tiny import tiny_pixart, tiny_unet

CALIBRATION = {"samples": 8, "steps": 2, "prompts_per_batch": 2, "seed": 1, "progress": False}


PROMPTS = ["a cat", "a red house"]


BINNING = {"use_resolution_binning": False}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        arguments = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 16), torch.full((2,), 300)
        result: Tensor = model(*arguments, return_dict=False)[0]
        return result


OFFLOADED: dict[str, Callable[[nn.Module], object]] = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, CPU),
    "sequential": lambda model: accelerate.cpu_offload(model, CPU),
    "groups of blocks": lambda model: offload_groups(model, "block_level"),
    "groups of leaves": lambda model: offload_groups(model, "leaf_level"),
}


def hung(model: nn.Module) -> dict[str, list[str]]:
    """Kinds of hooks by module."""
    found = {
        name: [
            type(hook).__name__
            for hook in [*offloading.of_accelerate(part), *offloading.of_diffusers(part).values()]
        ]
        for name, part in model.named_modules()
    }
    return {name: kinds for name, kinds in found.items() if kinds}


@pytest.mark.parametrize("recipe", ["rtn", "lbfp"])
@pytest.mark.parametrize("kind", OFFLOADED)
def test_offloaded_models_are_quantized_bit_for_bit_and_stay_offloaded(kind: str, recipe: str) -> None:
    model = denoiser()
    OFFLOADED[kind](model)
    before = hung(model)
    plan = planned(model, recipe)
    assert_same(plan, plain_plan(recipe))
    assert hung(model) == before and torch.equal(run(model), run(denoiser()))
    difloat.apply(model, plan)
    assert hung(model).keys() >= before.keys() - plan.layers.keys() and offloading.is_offloaded(model)
    if kind == "sequential":
        assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert torch.equal(run(model), run(install.apply(denoiser(), plain_plan(recipe))))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn, torch.float16])
def test_layerwise_casting_is_lifted_and_comes_back(storage: torch.dtype) -> None:
    model, plain = denoiser(), denoiser()
    apply_layerwise_casting(model, storage, torch.float32)
    before, cast = {name: tensor.clone() for name, tensor in model.state_dict().items()}, hung(model)
    for name in cast:
        plain.get_submodule(name).to(storage).to(torch.float32)
    plan = planned(model, "rtn")
    assert_same(plan, planned(plain, "rtn"))
    after = model.state_dict()
    assert hung(model) == cast and all(torch.equal(before[name], after[name]) for name in before)
    difloat.apply(model, plan)
    assert hung(model).keys() == cast.keys() - plan.layers.keys()
    assert torch.equal(run(model), run(install.apply(plain, plan)))


def test_layerwise_casting_and_groups_together() -> None:
    model, plain = denoiser(), denoiser()
    apply_layerwise_casting(model, torch.bfloat16, torch.float32)
    for name in hung(model):
        plain.get_submodule(name).to(torch.bfloat16).to(torch.float32)
    offload_groups(model, "leaf_level")
    before = hung(model)
    plan = planned(model, "rtn")
    assert_same(plan, planned(plain, "rtn"))
    assert {name: set(kinds) for name, kinds in hung(model).items()} == {
        name: set(kinds) for name, kinds in before.items()
    }


@pytest.mark.parametrize("kind", OFFLOADED)
def test_hooks_come_back_after_an_error(kind: str) -> None:
    model = denoiser()
    OFFLOADED[kind](model)
    before = hung(model)
    with pytest.raises(KeyError, match="inside"), offloading.lifted(model):
        assert not hung(model) and not any(tensor.is_meta for tensor in model.parameters())
        raise KeyError("inside")
    assert hung(model) == before and torch.equal(run(model), run(denoiser()))


@pytest.mark.parametrize("kind", ["sequential", "groups of leaves"])
def test_an_offloaded_pipeline_with_its_text_encoder_is_quantized_saved_and_loaded(
    kind: str, tmp_path: Path
) -> None:
    def quantized(offload: Callable[[nn.Module], object]) -> tuple[object, Plan]:
        pipeline = tiny_pixart()
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
            offload(part)
        plan = difloat.quantize(
            pipeline,
            "rtn",
            "w8a8",
            prompts=PROMPTS,
            call_kwargs=BINNING,
            components=["transformer", "text_encoder"],
            **CALIBRATION,
        )
        return pipeline, plan

    pipeline, plan = quantized(OFFLOADED[kind])
    assert_same(plan, quantized(lambda part: None)[1])
    assert offloading.is_offloaded(pipeline.transformer)
    difloat.save(pipeline, tmp_path / "saved")
    assert offloading.is_offloaded(pipeline.transformer)
    arguments = {"prompts": PROMPTS, "seeds": [0], "steps": 2, "progress": False, "call_kwargs": BINNING}
    again = difloat.load(tmp_path / "saved")
    assert torch.equal(
        evaluation.generate(again, **arguments).images, evaluation.generate(pipeline, **arguments).images
    )


def test_names_of_devices() -> None:
    assert devices.resolve("cpu") == CPU and devices.resolve(CPU) == CPU
    assert devices.resolve("auto").type in ("cpu", "cuda", "xpu", "mps")
    for wrong in ("gpu", "cuda:x", "meta", "", "cpu:1", "cuda:99"):
        with pytest.raises(ValueError, match="^device must be one") as error:
            devices.resolve(wrong)
        assert repr(wrong) in str(error.value) and ". " not in str(error.value)


def test_a_wrong_device_is_refused_before_anything_runs() -> None:
    pipeline = tiny_unet()
    calls: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError, match="^device must be one of auto, cpu"):
        difloat.quantize(pipeline, "rtn", "w8a8", prompts=PROMPTS, device="gpu", **CALIBRATION)
    assert not calls


def test_random_numbers_are_seeded_inside_and_go_on_afterwards() -> None:
    before = torch.random.get_rng_state()
    with devices.seeded(CPU, 7):
        first = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.gpu
def test_on_cuda_a_pipeline_has_the_codes_of_the_cpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = {"prompts": PROMPTS, **CALIBRATION}
    here, there = tiny_unet(), tiny_unet()
    expected = difloat.quantize(here, "rtn", "w4a8", **arguments)
    found = difloat.quantize(there, "rtn", "w4a8", device="cuda", **arguments)
    assert {tensor.device.type for tensor in there.unet.parameters()} == {"cuda"}
    for name, layer in expected.layers.items():
        assert torch.equal(layer.tensors["weight"], found.layers[name].tensors["weight"].cpu()), name
    difloat.save(there, tmp_path / "saved")
    again = difloat.load(tmp_path / "saved", device="cuda")
    drawing = {"prompts": PROMPTS, "seeds": range(2), "steps": 2, "progress": False}
    drawn = evaluation.generate(there, **drawing).images
    assert torch.equal(evaluation.generate(again, **drawing).images, drawn)
    # Another order of summation in float32, through a random network of few steps.
    assert picture_metrics.psnr(evaluation.generate(here, **drawing).images, drawn).min() > 30


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_on_cuda_offloaded_pipelines_have_the_plan_of_those_that_are_not(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = {"prompts": PROMPTS, **CALIBRATION}
    pipeline = tiny_unet()
    settings = {"onload_device": torch.device("cuda"), "offload_type": "leaf_level"}
    getattr(pipeline, kind)(**settings if kind == "enable_group_offload" else {})
    found = difloat.quantize(pipeline, "rtn", "w4a8", **arguments)
    assert_same(found, difloat.plan(tiny_unet().to("cuda"), "rtn", "w4a8", **arguments))
    assert offloading.is_offloaded(pipeline.unet)


def test_work_happens_where_the_model_is_on_a_pretended_accelerator() -> None:
    """In a process of its own: the device must be there before autograd first runs, which counts the devices once."""
    file = Path(__file__).with_name("on_pretended_device.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 10, done.stdout[-3000:] + done.stderr[-1000:]

"""Work happens where the model is: on a pretended accelerator, under every kind of offloading, on CUDA where there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

import difloat
import pretend_device
from difloat import api, devices, evaluation, recipes
from difloat.evaluation import picture_metrics
from difloat.kernels import dispatch
from difloat.layers import install, offloading
from difloat.numbers import formats, search
from difloat.plan.plan import Plan
from test_hooks import CPU, offload_groups
from test_modes import assert_same, denoiser, plain_plan, planned
from tiny import tiny_pixart, tiny_unet

FAST = {
    "iterations": 4,
    "rounding_rows": 8,
    "weight_granularity": "tensor",
    "epochs": 1,
    "rows": 2,
    "rank": 2,
}
SLOW = (
    "guided",
    "mpqdm",
    "msfp",
    "lbfp",
)  # what they do, efficientdm and qdiffusion do on fewer layers and formats
CALIBRATION = {"samples": 8, "steps": 2, "prompts_per_batch": 2, "seed": 1, "progress": False}
PROMPTS = ["a cat", "a red house"]
BINNING = {"use_resolution_binning": False}


@pytest.fixture(scope="module")
def pretended() -> torch.device:
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices in Python")
    return pretend_device.register()


@pytest.fixture
def same_arithmetic() -> Iterator[None]:
    """The CPU computes as the pretended device does: without its own kernels."""
    with (
        dispatch.use_backend("reference"),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        yield


def plan_on(device: torch.device | str, recipe: str, bits: str = "w4a8") -> Plan:
    known = recipes.RECIPES[recipe].options.__dataclass_fields__
    options = {name: value for name, value in FAST.items() if name in known}
    return difloat.plan(
        tiny_pixart().to(device), recipe, bits, prompts=PROMPTS, call_kwargs=BINNING, **CALIBRATION, **options
    )


def test_the_pretended_device_catches_mixed_operands_and_gives_the_numbers_of_the_cpu(
    pretended: torch.device,
) -> None:
    here, there = torch.arange(3.0), torch.arange(3.0, device=pretended)
    for mixed in (
        lambda: here + there,
        lambda: torch.where(there > 0, there, here),
        lambda: torch.cat([here, there]),
        lambda: there.add_(here),
        lambda: torch.searchsorted(there, here),
        lambda: there.gather(0, torch.tensor([0])),
        lambda: torch.ops.difloat.fake_quantize_input(there, here[:1] + 1, None, "int8", False),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=pretended, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there * 2 + torch.tensor(1.0))[torch.tensor([2])].tolist() == [5.0]
    weight = torch.ones(3, device=pretended, requires_grad=True)
    (weight * there).square().sum().backward()
    assert weight.grad is not None and weight.grad.device == pretended
    assert torch.equal(weight.grad.cpu(), 2 * here.square())


@pytest.mark.usefixtures("same_arithmetic")
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in recipes.RECIPES]
)
def test_every_recipe_decides_on_an_accelerator_what_it_decides_on_the_cpu(
    recipe: str, pretended: torch.device
) -> None:
    expected, found = plan_on("cpu", recipe), plan_on(pretended, recipe)
    assert expected.layers.keys() == found.layers.keys() and expected.layers
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert (layer.parts, layer.bands) == (other.parts, other.bands)
        for key, tensor in layer.tensors.items():
            assert other.tensors[key].device == pretended, f"{name}.{key} was left elsewhere"
            if tensor.dtype == torch.uint8:
                # Steps of AdamW are fused on accelerators, and their last bit moves a code at a border.
                assert (tensor != other.tensors[key].cpu()).float().mean() < 0.02
            else:
                torch.testing.assert_close(tensor, other.tensors[key].cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("format", ["e2m1", "int4", "ue3m1"])
def test_search_gives_the_same_on_every_device(format: str, pretended: torch.device) -> None:
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).abs()
    here = search.search(rows, [formats.parse(format)])
    there = search.search(rows.to(pretended), [formats.parse(format)])
    assert there.scale.device == pretended
    assert torch.equal(here.scale, there.scale.cpu()) and torch.equal(here.error, there.error.cpu())
    assert here.error_by_format == there.error_by_format


@pytest.mark.usefixtures("same_arithmetic")
def test_quantized_drawn_measured_and_loaded_on_an_accelerator(
    pretended: torch.device, tmp_path: Path
) -> None:
    pipeline = tiny_unet()
    original = copy.deepcopy(pipeline).to(pretended)
    difloat.quantize(pipeline, "rtn", "w4a8", prompts=PROMPTS, device=pretended, **CALIBRATION)
    assert {tensor.device for tensor in pipeline.unet.parameters()} == {pretended}
    arguments = {"prompts": PROMPTS, "seeds": range(2), "steps": 2, "progress": False}
    drawn, reference = (evaluation.generate(each, **arguments) for each in (pipeline, original))
    difloat.save(pipeline.to("cpu"), tmp_path / "saved")  # writing itself needs the addresses of real tensors
    pipeline.to(pretended)
    again = difloat.load(tmp_path / "saved", device=pretended)
    assert {tensor.device for tensor in again.unet.parameters()} == {pretended}
    assert torch.equal(evaluation.generate(again, **arguments).images, drawn.images)
    there = [picture.images.to(pretended) for picture in (reference, drawn)]
    for measure in (picture_metrics.psnr, picture_metrics.ssim):
        torch.testing.assert_close(measure(*there), measure(reference.images, drawn.images))
    found = difloat.restore(pipeline)
    assert {tensor.device for tensor in found.unet.parameters()} == {pretended}


@pytest.mark.usefixtures("same_arithmetic")
def test_data_stay_where_they_are(pretended: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows of calibration and hashed samples of the weights come to the CPU, never an input to search or a weight."""
    largest: list[int] = []
    inner = pretend_device.PretendTensor.__torch_dispatch__.__func__

    def counted(cls, func, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if func._schema.name == "aten::_to_copy" and device is not None and device.type == "cpu":
            largest.append(args[0].numel())
        return inner(cls, func, types, args, kwargs)

    model = tiny_pixart().to(pretended)
    data = api.calibrate(model, prompts=PROMPTS, call_kwargs=BINNING, **CALIBRATION)
    monkeypatch.setattr(pretend_device.PretendTensor, "__torch_dispatch__", classmethod(counted))
    for recipe in ("rtn", "mpqdm"):
        known = recipes.RECIPES[recipe].options.__dataclass_fields__
        options = {name: value for name, value in FAST.items() if name in known}
        task = replace(api.task_of(model, data, api.Bits.parse("w4a8")), progress=False)
        recipes.plan(task, recipe, "w4a8", options)
    assert max(largest, default=0) <= 192  # a number for every row of the widest layer


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


def test_offloaded_models_are_not_moved_away(pretended: torch.device) -> None:
    model = denoiser()
    accelerate.cpu_offload(model, CPU)
    assert devices.home(model) == CPU and devices.move(model, "cpu") is model
    with pytest.raises(
        ValueError, match="^an offloaded model must stay on the device that it is offloaded from, cpu"
    ):
        devices.move(model, pretended)


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

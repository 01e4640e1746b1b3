"""Work happens where the model is, on a pretended accelerator; `test_devices.py` runs this in a process of its own.

The device must be there before torch's autograd first runs, for that counts the devices once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import difloat
import pretend_device
from difloat import api, checkpoint, cli, devices, evaluation, recipes
from difloat.evaluation import picture_metrics
from difloat.kernels import dispatch, mps, torch_int8
from difloat.kernels.geometry import Geometry
from difloat.numbers import formats, search
from difloat.plan.encode import plan_layer
from difloat.plan.plan import Plan
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs
from test_hooks import CPU
from test_modes import denoiser
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
        tiny_pixart(blocks=1).to(device),
        recipe,
        bits,
        prompts=PROMPTS,
        call_kwargs=BINNING,
        **CALIBRATION,
        **options,
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
    # `empty_layers.as_stored` tells other names of a packed weight by its address, and pretended tensors have none.
    difloat.save(pipeline.to("cpu"), tmp_path / "saved")
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

    model = tiny_pixart(blocks=1).to(pretended)
    data = api.calibrate(model, prompts=PROMPTS, call_kwargs=BINNING, **CALIBRATION)
    monkeypatch.setattr(pretend_device.PretendTensor, "__torch_dispatch__", classmethod(counted))
    for recipe in ("rtn", "mpqdm"):
        known = recipes.RECIPES[recipe].options.__dataclass_fields__
        options = {name: value for name, value in FAST.items() if name in known}
        task = replace(api.task_of(model, data, api.Bits.parse("w4a8")), progress=False)
        recipes.plan(task, recipe, "w4a8", options)
    assert max(largest, default=0) <= 192  # a number for every row of the widest layer


def test_offloaded_models_are_not_moved_away(pretended: torch.device) -> None:
    model = denoiser()
    accelerate.cpu_offload(model, CPU)
    assert devices.home(model) == CPU and devices.move(model, "cpu") is model
    with pytest.raises(
        ValueError, match="^an offloaded model must stay on the device that it is offloaded from, cpu"
    ):
        devices.move(model, pretended)


@pytest.mark.usefixtures("same_arithmetic")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_commands_compute_on_the_device_they_are_told(
    pretended: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    tiny_pixart(blocks=1).save_pretrained(source)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    real = checkpoint.save

    def save(pipeline: Any, directory: Path, **options: Any) -> Path:
        assert {tensor.device for tensor in pipeline.transformer.parameters()} == {pretended}
        # `empty_layers.as_stored` tells other names of a packed weight by its address, and pretended tensors have none.
        saved = real(pipeline.to("cpu"), directory, **options)
        pipeline.to(pretended)
        return saved

    def command(*words: object) -> None:
        common = ["--steps", 2, "--prompts", tmp_path / "prompts.txt", "--device", pretended]
        common += ["--call", "use_resolution_binning=false"]
        monkeypatch.setattr("sys.argv", ["difloat", *map(str, [*words, *common])])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, words

    monkeypatch.setattr(checkpoint, "save", save)
    quick = ["--samples", 8, "--images"]
    command("quantize", source, made, *quick, 2, "--recipe", "rtn", "--set", "activation=static")
    command("repair", source, made, tmp_path / "repaired", *quick, 0, "--epochs", 1, "--rank", 2, "--no-dfa")
    devices_of_calls: set[torch.device] = set()

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        devices_of_calls.add((args[0] if args else kwargs["hidden_states"]).device)

    monkeypatch.setattr(type(tiny_pixart().transformer), "__call__", _noting(note))
    command("generate", made, tmp_path / "drawn", "--count", 1)
    command("evaluate", source, made, "--samples", 2)
    command("diagnose", source, made, "--samples", 2, "--images", 1)
    assert devices_of_calls == {pretended}


def _noting(note: Any) -> Any:
    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        note(module, args, kwargs)
        return torch.nn.Module.__call__(module, *args, **kwargs)

    return call


@torch.no_grad()
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_the_backend_of_apples_gpu_computes_where_its_tensors_are(
    pretended: torch.device, kernel: int | None
) -> None:
    """Its integers, too: a table of codes or a flag of another device would be refused."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, 64) if kernel is None else (8, 64, kernel, kernel)
    part = Part(
        64, QuantSpec(formats.parse("t4g"), "channel"), QuantSpec(formats.parse("int8"), "token", online=True)
    )
    planned = plan_layer(torch.randn(shape, generator=generator), [part], [torch.full((8,), 0.1)])
    x = torch.randn((5, 64) if kernel is None else (2, 64, 6, 5), generator=generator)
    geometry = [] if kernel is None else [Geometry(padding=(kernel // 2, kernel // 2))]
    compute = "linear" if kernel is None else "conv2d"
    assert torch_int8.computes(part, shape, x.to(pretended))
    results = []
    for device in (pretended, torch.device("cpu")):
        tensors = {name: tensor.to(device) for name, tensor in planned.tensors.items()}
        weight = replace(planned, tensors=tensors).weight()
        results.append(getattr(mps, compute)(x.to(device), weight, Inputs(), None, *geometry))
    assert results[0].device == pretended and torch.equal(results[0].cpu(), results[1])

"""difloat inside diffusers: plain from_pretrained and save_pretrained of tiny real pipelines, bit for bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from difloat import checkpoint
from difloat.checkpoint import CheckpointError, register
from difloat.layers import install, packed
from difloat.numbers import formats
from difloat.plan.encode import plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec
from mixed_rows import in_bands
from tiny import tiny_pixart, tiny_unet

register.register()  # again: importing difloat did it already

PIPELINES = {"unet": tiny_unet, "transformer": tiny_pixart}


def denoiser_plan(model: torch.nn.Module) -> Plan:
    """Every layer: weights per channel, per group or with rows of three widths, static and online inputs, some in two parts."""
    weight, grouped = (
        QuantSpec(formats.parse("e2m1"), "channel"),
        QuantSpec(formats.parse("int6"), "group", 5),
    )
    static, online = (
        QuantSpec(formats.parse("e4m3"), "tensor"),
        QuantSpec(formats.parse("e4m3"), "token", online=True),
    )
    plans: dict[str, LayerPlan] = {}
    for number, (name, layer) in enumerate(packed.quantizable(model).items()):
        channels = layer.weight.shape[1]
        parts = [Part(channels, weight, online if number % 3 == 0 else static)]
        if number % 2 and channels > 8:
            parts = [Part(7, weight, static), Part(channels - 7, grouped, static)]
        pieces = layer.weight.detach().split([part.channels for part in parts], dim=1)
        scales = [
            (piece.abs().amax() / part.weight.format.max).repeat(
                part.weight.scale_count(len(piece), part.channels)
            )
            for piece, part in zip(pieces, parts, strict=True)
        ]
        inputs = [None if part.activation.online else torch.rand(1) + 0.01 for part in parts]
        plans[name] = plan_layer(layer.weight.detach(), parts, scales, input_scales=inputs)
        if number % 4 == 2:
            plans[name] = in_bands(layer.weight, parts, ["uint1", "e2m1", "int3"])
    return Plan("rtn", "w4a8", plans, {}, {"seed": 0})


def quantized_pipeline(component: str, dtype: torch.dtype = torch.float32):
    pipeline = PIPELINES[component]()
    model = getattr(pipeline, component)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = denoiser_plan(model)
    pipeline.to(dtype)
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    return pipeline


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    sample = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    width = 16
    states = torch.randn(1, 6, width, generator=generator).to(dtype)
    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            return model(sample, torch.tensor([5]), states).sample
        conditions = {"resolution": None, "aspect_ratio": None}
        return model(sample, states, timestep=torch.tensor([5]), added_cond_kwargs=conditions).sample


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def component(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(component):
    return quantized_pipeline(component)


@pytest.fixture(scope="module")
def directory(pipeline, tmp_path_factory) -> Path:
    return checkpoint.save(pipeline, tmp_path_factory.mktemp("pipeline") / "saved")


def assert_same_layers(model: torch.nn.Module, other: torch.nn.Module) -> None:
    got, expected = checkpoint.plan_of(model), checkpoint.plan_of(other)
    assert (got.recipe, got.bits, got.skipped, got.options) == ("rtn", "w4a8", {}, {"seed": 0})
    assert got.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert got.layers[name].parts == layer.parts
        for key, tensor in layer.tensors.items():
            loaded = got.layers[name].tensors[key]
            assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), f"{name}.{key}"


def test_plain_from_pretrained_gives_the_same_output_and_saves_the_same_bytes(
    component, pipeline, directory, tmp_path
):
    loaded = DiffusionPipeline.from_pretrained(directory)
    expected = getattr(pipeline, component)
    model = getattr(loaded, component)
    assert_same_layers(model, expected)
    assert torch.equal(output(model), output(expected))
    assert contents(checkpoint.save(copy.deepcopy(model), tmp_path / "model")).keys() >= {
        "config.json",
        "difloat.json",
    }
    assert contents(checkpoint.save(loaded, tmp_path / "again")) == contents(directory)
    assert contents(checkpoint.save(checkpoint.load(directory), tmp_path / "third")) == contents(directory)


def test_verify_passes(component, directory):
    findings = checkpoint.verify(directory)
    assert [finding.message for finding in findings if not finding.passed] == []
    assert {finding.component for finding in findings} == {"", component}


PIXART_ONLY = pytest.mark.parametrize("component", ["transformer"], indirect=True, scope="module")


@PIXART_ONLY
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [None, 5000])
def test_codes_and_scales_survive_every_dtype(component, pipeline, tmp_path, dtype, shard_bytes):
    expected = getattr(pipeline, component)
    directory = checkpoint.save(expected, tmp_path / "a", max_shard_bytes=shard_bytes)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    model = type(expected).from_pretrained(directory, dtype=dtype)
    assert_same_layers(model, expected)
    assert model.dtype == (dtype or torch.float32)
    assert output(model).isfinite().all()


def test_half_precision_comes_back_as_it_was(component, tmp_path):
    pipeline = quantized_pipeline(component, torch.float16)
    directory = checkpoint.save(pipeline, tmp_path / "a")
    loaded = checkpoint.load(directory)
    assert getattr(loaded, component).dtype == loaded.vae.dtype == torch.float16
    again, first = contents(checkpoint.save(loaded, tmp_path / "b")), contents(directory)
    # transformers itself reads some layers of a half-precision T5 as float32.
    own = [name for name in first if name.startswith((component, "vae"))]
    assert len(own) == 4 and {name: again[name] for name in own} == {name: first[name] for name in own}


def test_own_save_pretrained_of_diffusers_loads_too(component, pipeline, tmp_path):
    model = getattr(pipeline, component)
    model.save_pretrained(tmp_path / "a", max_shard_size=5000)
    assert_same_layers(type(model).from_pretrained(tmp_path / "a"), model)
    loaded = checkpoint.load(tmp_path / "a", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert_same_layers(loaded, model)
    failed = {finding.check for finding in checkpoint.verify(tmp_path / "a") if not finding.passed}
    assert failed == {"hashes"}  # only difloat.save writes a manifest


def test_a_diffusers_model_loads_into_an_instance(component, pipeline, directory):
    expected = getattr(pipeline, component)
    target = getattr(PIPELINES[component](seed=1), component)
    loaded = checkpoint.load(directory / component, into=target)
    assert torch.equal(output(loaded), output(expected))
    assert loaded.is_quantized and loaded.hf_quantizer.is_serializable


def test_dequantize_gives_a_float_model_that_saves(component, directory, tmp_path):
    model = getattr(DiffusionPipeline.from_pretrained(directory), component)
    expected = output(install.restore(copy.deepcopy(model)))
    model.dequantize()
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path / "a")
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "a")), expected)


def test_unmark_makes_a_restored_model_plain(component, tmp_path):
    model = getattr(quantized_pipeline(component), component)
    checkpoint.unmark_quantized(install.restore(model))
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "a")), output(model))
    with pytest.raises(ValueError, match="must be quantized"):
        checkpoint.save(model, tmp_path / "b")


def damaged(directory: Path, tmp_path: Path, component: str, change) -> Path:
    """A copy of one component, whose tensors were changed by `change`."""
    copy_of = tmp_path / "damaged"
    copy_of.mkdir()
    tensors = safetensors.torch.load_file(directory / component / "diffusion_pytorch_model.safetensors")
    config = json.loads((directory / component / "config.json").read_text())
    change(tensors, config)
    safetensors.torch.save_file(
        tensors, copy_of / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )
    (copy_of / "config.json").write_text(json.dumps(config))
    return copy_of


def first_name(tensors: dict, ending: str) -> str:
    return min(name for name in tensors if name.endswith(ending))


def drop(ending: str):
    return lambda tensors, config: tensors.pop(first_name(tensors, ending))


def put(ending: str, value):
    def change(tensors, config):
        name = first_name(tensors, ending)
        tensors[name] = value(tensors[name])

    return change


DAMAGES = {
    "scale missing": (drop(".weight_scale"), "weight_scale' is missing"),
    "bundle missing": (drop("difloat.input"), "input_scale' is missing"),
    "bias missing": (drop(".bias"), "bias' is missing"),
    "one too many": (lambda tensors, config: tensors.update(ghost=torch.ones(1)), "'ghost' is one too many"),
    "bundle too short": (
        put("difloat.input", lambda v: v[:-1].clone()),
        "must be the plan's float32 input vectors",
    ),
    "scale in half": (put(".weight_scale", lambda v: v.half()), "must be torch.float32, got torch.float16"),
    "scale too short": (put(".weight_scale", lambda v: v[:-1].clone()), "must have the shape"),
    "NaN scale": (put(".weight_scale", lambda v: v * float("nan")), "must be finite and positive, got nan"),
    "row in another band": (put(".row_band", lambda b: b * 0), "rows into the bands"),
    "bands missing": (drop(".row_band"), "row_band' is missing"),
    "other version": (lambda tensors, config: config["quantization_config"].update(version=9), "got 9"),
    "unknown layer": (
        lambda tensors, config: config["quantization_config"]["layers"].update(
            ghost=next(iter(config["quantization_config"]["layers"].values()))
        ),
        "but 'ghost' of shape",
    ),
}


@PIXART_ONLY
@pytest.mark.parametrize("case", DAMAGES)
def test_from_pretrained_refuses_damage_in_one_sentence(component, pipeline, directory, tmp_path, case):
    change, message = DAMAGES[case]
    broken = damaged(directory, tmp_path, component, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        type(getattr(pipeline, component)).from_pretrained(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        checkpoint.load(broken)


def test_pipelines_that_cannot_be_saved_or_loaded(tmp_path):
    float_pipeline = tiny_pixart()
    with pytest.raises(ValueError, match="must have a quantized component"):
        checkpoint.save(float_pipeline, tmp_path / "a")
    float_pipeline.save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="must hold a quantized component"):
        checkpoint.load(tmp_path / "float")


def test_registration_waits_for_diffusers_and_then_goes_away():
    # The other order is what this file itself does: its imports of diffusers came first.
    code = """
import sys
from difloat.checkpoint.register import register
register()
register()
waiting = [finder for finder in sys.meta_path if type(finder).__name__ == "_RegisterOnImport"]
assert len(waiting) == 2 and "diffusers" not in sys.modules
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert {"difloat", "gguf"} <= AUTO_QUANTIZER_MAPPING.keys()
assert {"difloat", "gguf"} <= AUTO_QUANTIZATION_CONFIG_MAPPING.keys()
assert not any(finder in sys.meta_path and finder.table in sys.modules for finder in waiting)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@PIXART_ONLY
def test_a_config_shows_itself(directory, component):
    from difloat.checkpoint.diffusers_quantizer import DifloatConfig

    fields = json.loads((directory / component / "config.json").read_text())["quantization_config"]
    assert DifloatConfig.from_dict(fields).to_dict() == fields
    assert '"recipe": "rtn"' in repr(DifloatConfig.from_dict(fields))


@PIXART_ONLY
def test_nothing_of_this_machine_is_in_the_files(directory):
    assert not any(str(directory.parent).encode() in data for data in contents(directory).values())

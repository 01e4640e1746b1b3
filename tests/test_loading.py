"""`DifloatConfig` in diffusers and transformers: quantizing while loading, in every way to ask for it; loading elsewhere."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

import difloat
from difloat import DifloatConfig, checkpoint
from difloat.checkpoint import CheckpointError, data_free, plan_config
from difloat.layers import install, packed
from difloat.layers.packed import QuantizedLayer
from test_diffusers import contents, output
from tiny import tiny_pixart, tiny_unet

CLASSES = {
    "transformer": PixArtTransformer2DModel,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "t5": T5EncoderModel,
    "clip": CLIPTextModel,
}
FAST = {"weights": "e2m1", "group_size": 0}  # one format, one scale per channel: little to search
IDS = torch.tensor([[5, 6, 7, 1]])


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    """Float models on disk: two pipelines, and links from their parts."""
    root = tmp_path_factory.mktemp("floats")
    tiny_pixart().save_pretrained(root / "pixart")
    tiny_unet().save_pretrained(root / "sd")
    for name, part in {
        "transformer": "pixart/transformer",
        "unet": "sd/unet",
        "vae": "sd/vae",
        "t5": "pixart/text_encoder",
        "clip": "sd/text_encoder",
    }.items():
        (root / name).symlink_to(root / part)
    return root


def aligned(model: nn.Module) -> nn.Module:
    """Float tensors in memory of their own: products by some libraries depend on the address that a file is mapped to."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def result(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(aligned(model), AutoencoderKL):
            picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            return model(picture.to(model.dtype)).sample
        if isinstance(model, (T5EncoderModel, CLIPTextModel)):
            return model(IDS)[0]
        return output(model)


def same_plans(one: nn.Module, other: nn.Module) -> bool:
    first, second = checkpoint.plan_of(one), checkpoint.plan_of(other)
    return (first.layers.keys(), first.bits, first.skipped, first.options) == (
        second.layers.keys(),
        second.bits,
        second.skipped,
        second.options,
    ) and all(
        layer.parts == second.layers[name].parts
        and all(torch.equal(t, second.layers[name].tensors[key]) for key, t in layer.tensors.items())
        for name, layer in first.layers.items()
    )


@pytest.mark.parametrize("name", CLASSES)
def test_quantized_while_loading_is_quantized_in_memory_and_comes_back_bit_for_bit(
    floats, name, tmp_path
) -> None:
    model = CLASSES[name].from_pretrained(floats / name, quantization_config=DifloatConfig(**FAST))
    reference = CLASSES[name].from_pretrained(floats / name)
    expected = result(reference)
    plan = data_free.plan(reference, data_free.settings(FAST), progress=False)
    install.apply(reference, plan)
    checkpoint.mark_quantized(reference, plan)
    assert same_plans(model, reference)
    assert torch.equal(result(model), result(reference))
    assert 0 < float((result(model) - expected).norm() / expected.norm()) < 0.7
    assert model.is_quantized and model.hf_quantizer.quantization_config.plan.bits == "w4a8"
    directory = checkpoint.save(model, tmp_path / "a", max_shard_bytes=20_000)
    again = CLASSES[name].from_pretrained(directory)
    assert same_plans(again, model) and torch.equal(result(again), result(model))
    assert contents(
        checkpoint.save(checkpoint.load(directory), tmp_path / "b", max_shard_bytes=20_000)
    ) == contents(directory)
    assert all(finding.passed for finding in checkpoint.verify(directory))
    model.save_pretrained(tmp_path / "c")
    assert same_plans(CLASSES[name].from_pretrained(tmp_path / "c"), model)


@pytest.mark.parametrize("name", ["transformer", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_is_searched_and_loaded_whatever_the_dtype(floats, name, dtype, tmp_path) -> None:
    config = {"quantization_config": DifloatConfig(**FAST)}
    model = CLASSES[name].from_pretrained(floats / name, **config)
    half = CLASSES[name].from_pretrained(floats / name, dtype=dtype, **config)
    assert half.dtype == dtype and result(half).isfinite().all()
    # transformers casts a weight before its quantizer sees it, diffusers after we have disguised it
    assert same_plans(half, model) == (name == "transformer")
    directory = checkpoint.save(model, tmp_path / "a")
    assert same_plans(CLASSES[name].from_pretrained(directory, dtype=dtype), model)


@pytest.mark.parametrize("name", ["unet", "t5"])
def test_quantized_while_loading_it_can_be_pickled_and_copied(floats, name) -> None:
    model = CLASSES[name].from_pretrained(floats / name, quantization_config=DifloatConfig(**FAST))
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert same_plans(other, model) and torch.equal(result(other), result(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("name", ["transformer", "clip"])
def test_device_maps(floats, name, device_map) -> None:
    arguments = {"quantization_config": DifloatConfig(**FAST), "device_map": device_map}
    model = CLASSES[name].from_pretrained(floats / name, **arguments)
    assert result(model).isfinite().all() and len(checkpoint.plan_of(model).layers) > 5


def test_shards_and_parallel_loading_of_a_float_model(floats, tmp_path, monkeypatch) -> None:
    model = PixArtTransformer2DModel.from_pretrained(floats / "transformer")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    config = DifloatConfig(**FAST)
    one = PixArtTransformer2DModel.from_pretrained(tmp_path / "shards", quantization_config=config)
    other = PixArtTransformer2DModel.from_pretrained(floats / "transformer", quantization_config=config)
    assert same_plans(one, other)


@pytest.mark.parametrize("name", ["transformer", "t5"])
def test_disk_offload_waits_until_a_model_is_quantized(floats, name, tmp_path) -> None:
    with pytest.raises(ValueError, match="must not hold 'disk' while a float model is quantized"):
        CLASSES[name].from_pretrained(
            floats / name,
            quantization_config=DifloatConfig(**FAST),
            device_map={"": "disk"},
            offload_folder=tmp_path,
        )


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
def test_a_quantized_text_encoder_may_lie_on_the_disk(floats, tmp_path) -> None:
    model = T5EncoderModel.from_pretrained(floats / "t5", quantization_config=DifloatConfig(**FAST))
    directory = checkpoint.save(model, tmp_path / "a")
    device_map = {
        "shared": "cpu",
        "encoder.embed_tokens": "cpu",
        "encoder.block": "disk",
        "encoder.final_layer_norm": "cpu",
    }
    found = T5EncoderModel.from_pretrained(
        directory, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert found.encoder.block[0].layer[0].SelfAttention.q.weight.is_meta
    with torch.no_grad():
        assert torch.equal(found(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("form", ["mapping", "backend"])
def test_pipelines_are_quantized_by_a_mapping_or_by_name(floats, form, tmp_path) -> None:
    if form == "mapping":
        config = PipelineQuantizationConfig(
            quant_mapping={"transformer": DifloatConfig(**FAST), "text_encoder": DifloatConfig(bits="w8a8")}
        )
    else:
        config = PipelineQuantizationConfig(
            quant_backend="difloat", quant_kwargs=FAST, components_to_quantize=["transformer", "text_encoder"]
        )
    pipeline = DiffusionPipeline.from_pretrained(floats / "pixart", quantization_config=config)
    bits = {
        name: checkpoint.plan_of(getattr(pipeline, name)).bits for name in ("transformer", "text_encoder")
    }
    assert bits == {"transformer": "w4a8", "text_encoder": "w8a8" if form == "mapping" else "w4a8"}
    assert not any(isinstance(module, QuantizedLayer) for module in pipeline.vae.modules())
    directory = difloat.save(pipeline, tmp_path / "p")
    again = DiffusionPipeline.from_pretrained(directory)
    assert all(same_plans(getattr(again, name), getattr(pipeline, name)) for name in bits)


def test_a_model_of_one_file_is_quantized(tmp_path) -> None:
    vae = tiny_unet().vae
    vae.save_pretrained(tmp_path / "vae")
    single = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    config = DifloatConfig(**FAST)
    found = AutoencoderKL.from_single_file(
        str(single), config=str(tmp_path / "vae"), quantization_config=config
    )
    assert same_plans(found, AutoencoderKL.from_pretrained(tmp_path / "vae", quantization_config=config))


# What the test mixins of diffusers for quantization backends look at, besides LoRA and what the matrix covers.
def test_contract_of_a_backend(floats) -> None:
    config = DifloatConfig(weights="e2m1", group_size=0, outside="8bit")
    plain = PixArtTransformer2DModel.from_pretrained(floats / "transformer")
    model = PixArtTransformer2DModel.from_pretrained(floats / "transformer", quantization_config=config)
    assert plain.get_memory_footprint() / model.get_memory_footprint() > 3
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and all(isinstance(module, QuantizedLayer) for module in linears)
    scales = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("weight_scale")}
    for cast in (
        lambda: model.to(torch.float16),
        model.half,
        model.float,
        lambda: model.to("cpu", torch.float16),
    ):
        cast()  # the rest of the model follows, what is packed keeps its bits
        assert scales and all(
            torch.equal(dict(model.named_buffers())[name], scale) for name, scale in scales.items()
        )
    model.to("cpu")
    fewer = DifloatConfig(weights="e2m1", group_size=0, outside="8bit", exclude=["attn1"])
    partly = PixArtTransformer2DModel.from_pretrained(floats / "transformer", quantization_config=fewer)
    left = [
        n for n, m in partly.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantizedLayer)
    ]
    assert left and all("attn1" in name for name in left)
    assert partly.get_memory_footprint() > model.get_memory_footprint()
    model.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert output(model).isfinite().all() and "quantization_config" not in model.config


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_text_encoders_are_dequantized(floats, name, tmp_path) -> None:
    model = CLASSES[name].from_pretrained(floats / name, quantization_config=DifloatConfig(**FAST))
    expected = result(model)
    model.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert float((result(model) - expected).norm() / expected.norm()) < 0.1  # inputs are not rounded any more
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(result(CLASSES[name].from_pretrained(tmp_path / "a")), result(model))


def test_a_plan_cannot_be_handed_to_a_float_model(floats) -> None:
    model = PixArtTransformer2DModel.from_pretrained(
        floats / "transformer", quantization_config=DifloatConfig(**FAST)
    )
    fields = model.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match="must come from a difloat checkpoint"):
        PixArtTransformer2DModel.from_pretrained(
            floats / "transformer", quantization_config=DifloatConfig.from_dict(fields)
        )
    with pytest.raises(CheckpointError, match="must have the fields"):
        DifloatConfig.from_dict({"quant_method": "difloat", "version": 1, "bits": "w4a8"})
    with pytest.raises(ValueError, match="options must be among"):
        DifloatConfig(wheights="e2m1")


def test_damaged_text_encoders_are_refused(floats, tmp_path) -> None:
    model = T5EncoderModel.from_pretrained(floats / "t5", quantization_config=DifloatConfig(**FAST))
    directory = checkpoint.save(model, tmp_path / "a")
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = min(name for name in tensors if name.endswith(".weight_scale"))
    for change, message in (
        (lambda: tensors.pop(name), f"{name!r} is missing"),
        (
            lambda: tensors.update({name: torch.full((16,), torch.nan)}),
            "must be finite and positive, got nan",
        ),
    ):
        change()
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
            T5EncoderModel.from_pretrained(directory)


def test_static_input_scales_of_text_encoders_are_refused(floats) -> None:
    from test_matrix import CHANNEL, STATIC, whole

    model = T5EncoderModel.from_pretrained(floats / "t5")
    make = whole(STATIC, CHANNEL)
    plans = {name: make(layer.weight.detach()) for name, layer in packed.quantizable(model).items()}
    with pytest.raises(ValueError, match="must have online scales"):
        checkpoint.mark_quantized(model, difloat.Plan("rtn", "w4a8", plans))


# Processes of their own: what is imported, and in which order, is the point.
ORDERS = [
    "difloat.checkpoint.config",
    "transformers.quantizers.auto, difloat",
    pytest.param("difloat, transformers.quantizers.auto", marks=pytest.mark.slow),
    pytest.param("difloat, diffusers.quantizers.auto", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order", ORDERS)
def test_registration_in_any_order_of_import(order) -> None:
    code = f"""
import {order}
from diffusers.quantizers import auto as one
from transformers.quantizers import auto as other
import difloat
for table in (one, other):
    assert table.AUTO_QUANTIZATION_CONFIG_MAPPING["difloat"] is difloat.DifloatConfig
    assert "difloat" in table.AUTO_QUANTIZER_MAPPING
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
def test_checkpoints_load_where_difloat_is_not_imported(floats, tmp_path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(floats / "pixart")
    for name in ("transformer", "text_encoder"):
        model = getattr(pipeline, name)
        difloat.apply(model, data_free.plan(model, data_free.settings(FAST), progress=False))
    directory = difloat.save(pipeline, tmp_path / "p", remote_code=True)
    assert all(finding.passed for finding in difloat.verify(directory))
    code = f"""
import sys, transformers, diffusers
path = {str(directory)!r}
encoder = transformers.AutoModel.from_pretrained(path + "/text_encoder", trust_remote_code=True)
assert type(encoder) is transformers.T5EncoderModel and encoder.is_quantized
model = diffusers.AutoModel.from_pretrained(path, subfolder="transformer", trust_remote_code=True)
assert type(model) is diffusers.PixArtTransformer2DModel and model.is_quantized
assert diffusers.DiffusionPipeline.from_pretrained(path).text_encoder.is_quantized
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
    with pytest.raises(ValueError, match="remote_code must be False for a plain module"):
        plain = nn.Sequential(nn.Linear(4, 4))
        plan = data_free.plan(plain, data_free.settings(FAST), progress=False)
        difloat.save(difloat.apply(plain, plan), tmp_path / "q", remote_code=True)


@pytest.mark.slow
def test_processes_load_side_by_side(floats, tmp_path) -> None:
    model = PixArtTransformer2DModel.from_pretrained(
        floats / "transformer", quantization_config=DifloatConfig(**FAST)
    )
    directory = checkpoint.save(model, tmp_path / "a", max_shard_bytes=20_000)
    code = f"""
import difloat, hashlib, json
from difloat.checkpoint import plan_of
plan = plan_of(difloat.load({str(directory)!r}))
state = {{f"{{name}}.{{key}}": hashlib.sha256(t.numpy().tobytes()).hexdigest()
          for name, layer in plan.layers.items() for key, t in layer.tensors.items()}}
print(json.dumps(state, sort_keys=True))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    first, second = (json.loads(run.communicate(timeout=300)[0].splitlines()[-1]) for run in runs)
    assert first == second and len(first) == sum(
        len(layer.tensors) for layer in checkpoint.plan_of(model).layers.values()
    )


def test_a_checkpoint_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pixart()
    components = ["transformer", "text_encoder"]
    difloat.quantize(pipeline, "rtn", "w4a8", components=components, progress=False)
    difloat.save(pipeline, tmp_path / "out")
    parsed: list[str] = []
    parse = plan_config._parse_layer

    def counting(name: str, data: object, version: int) -> object:
        parsed.append(name)
        return parse(name, data, version)

    monkeypatch.setattr(plan_config, "_parse_layer", counting)
    loaded = difloat.load(tmp_path / "out")
    layers = [
        m for part in components for m in getattr(loaded, part).modules() if isinstance(m, QuantizedLayer)
    ]
    assert len(parsed) == len(layers) > 10
    difloat.load(tmp_path / "out")
    assert len(parsed) == 2 * len(layers), "nothing is remembered from one load to the next"

"""Loading with proof, models that cannot be rebuilt, modules with two names, and diffusers' own methods on packed models."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FluxTransformer2DModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from transformers import CLIPTextModel

import difloat
import mutate_checkpoints
from difloat import DifloatConfig, checkpoint
from difloat.checkpoint import CheckpointError
from difloat.layers import attention, install
from difloat.layers import packed as layers
from difloat.layers.packed import QuantizedLayer
from difloat.numbers import formats
from difloat.plan.plan import LayerSpec, Plan
from difloat.plan.specs import AttentionPlan, Part, QuantSpec
from difloat.plan.validation import plain, read
from test_checkpoint import contents, quantized, same_state, saved, set_tensor, simple_layer, tiny
from test_diffusers import output, quantized_pipeline
from tiny import tiny_pixart, tiny_unet

E2M1 = QuantSpec(formats.parse("e2m1"), "channel")
FAST = DifloatConfig(weights="e2m1", group_size=0)


def packed(model: nn.Module, names: list[str], attended: dict[str, AttentionPlan] | None = None) -> nn.Module:
    """The model with these layers on e2m1, marked."""
    parts = {name: [Part(layers.weight_of(model, name).shape[1], E2M1)] for name in names}
    planned = {
        name: simple_layer(layers.weight_of(model, name), entry, 0.02) for name, entry in parts.items()
    }
    plan = Plan("rtn", "w4a16", planned, attention=attended or {})
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    return model


def all_packed(model: nn.Module, attended: dict[str, AttentionPlan] | None = None) -> nn.Module:
    return packed(model, list(layers.quantizable(model)), attended)


# Hashes while loading


def flip(path: Path, place: int = -1) -> None:
    """One bit of a file's last byte (or another one)."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_code_loads_plainly_and_is_refused_with_proof(tmp_path, monkeypatch):
    directory = saved(tmp_path)
    assert same_state(checkpoint.load(directory, into=tiny(1), verify=True), quantized())
    set_tensor("first.weight", lambda codes: codes ^ 1)(directory)
    path = directory / "difloat.json"
    manifest = json.loads(
        path.read_text()
    )  # the size is another one, since the library writes its own header
    manifest["files"]["model.safetensors"]["bytes"] = (directory / "model.safetensors").stat().st_size
    path.write_text(json.dumps(manifest))
    assert not same_state(checkpoint.load(directory, into=tiny(1)), quantized())
    target = tiny(1)
    with pytest.raises(CheckpointError, match=r"model.safetensors must have the bytes .* SHA-256 is another"):
        checkpoint.load(directory, into=target, verify=True)
    assert same_state(target, tiny(1))
    monkeypatch.setenv("DIFLOAT_VERIFY", "1")
    with pytest.raises(CheckpointError, match="SHA-256 is another"):
        checkpoint.load(directory, into=tiny(1))
    assert not same_state(checkpoint.load(directory, into=tiny(1), verify=False), quantized())


def test_proof_needs_a_manifest_and_a_flag(tmp_path, monkeypatch):
    directory = saved(tmp_path)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pytorch_model.bin must not be there"):
        checkpoint.load(directory, into=tiny(1), verify=True)
    (directory / "difloat.json").unlink()
    with pytest.raises(FileNotFoundError, match="must be there to prove the files"):
        checkpoint.load(directory, into=tiny(1), verify=True)
    with pytest.raises(ValueError, match="verify must be True, False or None, got 1"):
        checkpoint.load(directory, into=tiny(1), verify=1)
    monkeypatch.setenv("DIFLOAT_VERIFY", "yes")
    with pytest.raises(ValueError, match="DIFLOAT_VERIFY must be 1 or 0, got 'yes'"):
        checkpoint.load(directory, into=tiny(1))


@pytest.fixture(scope="module")
def pipeline_directory(tmp_path_factory) -> Path:
    """Stable Diffusion in tiny, its U-Net and text encoder packed."""
    root = tmp_path_factory.mktemp("pipeline")
    tiny_unet().save_pretrained(root / "float")
    wishes = difloat.DifloatConfig(weights="e2m1", group_size=0)
    pipeline = DiffusionPipeline.from_pretrained(
        root / "float",
        unet=UNet2DConditionModel.from_pretrained(root / "float/unet", quantization_config=wishes),
        text_encoder=CLIPTextModel.from_pretrained(root / "float/text_encoder", quantization_config=FAST),
    )
    return checkpoint.save(pipeline, root / "saved")


LOADERS = {
    "pipeline": DiffusionPipeline.from_pretrained,
    "unet": lambda root: UNet2DConditionModel.from_pretrained(root / "unet"),
    "subfolder": lambda root: UNet2DConditionModel.from_pretrained(root, subfolder="unet"),
    "text_encoder": lambda root: CLIPTextModel.from_pretrained(root / "text_encoder"),
    "load": checkpoint.load,
}


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"]
)
def test_from_pretrained_checks_hashes_where_the_environment_says_so(
    pipeline_directory, tmp_path, monkeypatch, how, file
):
    root = tmp_path / "copy"
    shutil.copytree(pipeline_directory, root)
    monkeypatch.setenv("DIFLOAT_VERIFY", "1")
    LOADERS[how](root)  # clean
    flip(root / f"{file}.safetensors")
    other = {"unet": "text_encoder", "subfolder": "text_encoder", "text_encoder": "unet"}.get(how)
    if other is not None and file.startswith(other):
        LOADERS[how](root)  # not what is loaded
    else:
        with pytest.raises(CheckpointError, match="SHA-256 is another"):
            LOADERS[how](root)
    monkeypatch.setenv("DIFLOAT_VERIFY", "0")
    LOADERS[how](root)


def test_from_pretrained_with_proof_reads_nothing_unlisted(pipeline_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFLOAT_VERIFY", "1")
    shutil.copytree(pipeline_directory / "unet", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="must be there to prove the files"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    manifest = json.loads((pipeline_directory / "difloat.json").read_text())
    del manifest["files"]["unet/diffusion_pytorch_model.safetensors"]
    (tmp_path / "difloat.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="must be listed in difloat.json"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_tensor_in_two_shards_is_refused_everywhere(pipeline_directory, tmp_path, component):
    source = DiffusionPipeline.from_pretrained(pipeline_directory).components[component]
    directory = checkpoint.save(source, tmp_path / "a", max_shard_bytes=4_000)
    (directory / "difloat.json").unlink()
    first, second = sorted(directory.glob("*-of-*.safetensors"))[:2]
    tensors = safetensors.torch.load_file(second)
    name, value = next(iter(safetensors.torch.load_file(first).items()))
    safetensors.torch.save_file(tensors | {name: value.clone()}, second, metadata={"format": "pt"})
    for loader in (type(source).from_pretrained, checkpoint.load):
        with pytest.raises(CheckpointError, match=r"must be stored once, but is in two shards"):
            loader(directory)
    assert any(
        "two shards" in finding.message for finding in checkpoint.verify(directory) if not finding.passed
    )


def test_verify_reports_what_is_no_checkpoint(tmp_path):
    for name, make in {"nothing": Path.exists, "empty": Path.mkdir, "file": Path.touch}.items():
        make(tmp_path / name)
        (finding,) = checkpoint.verify(tmp_path / name)
        assert not finding.passed and "\n" not in finding.message


# Numbers in plans

BAD = [math.inf, -math.inf, math.nan, 10**400, 2**70, -1, 0, 1.0, True, "7", None, [], {}]


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{value!r:.12}")
@pytest.mark.parametrize(
    ("path", "fine"),
    [
        (["layers", "first", "shape", 0], []),
        (["layers", "first", "parts", 0, "channels"], []),
        (["layers", "blocks.0", "parts", 0, "weight", "group_size"], []),
        (["layers", "blocks.0", "parts", 0, "activation", "online"], [True]),
        (["layers", "first", "parts", 0, "activation", "zero_point"], [True]),
        (["layers", "first", "smoothed"], [True]),
        (["layers", "first", "schedule"], [[]]),
        (["layers", "first", "side"], []),
        (["layers", "first", "kind"], []),
        (["bits"], ["7"]),
        (["recipe"], ["7"]),
        (["options"], [{}]),
        (["skipped"], [{}]),
        (["attention"], [{}]),
        (["timesteps"], [[]]),
        (["version"], []),
    ],
    ids=lambda value: ".".join(map(str, value)) if value and isinstance(value[0], str) else "",
)
def test_numbers_of_a_plan_are_of_their_type_and_range(path, fine, value):
    config = json.loads(
        json.dumps(checkpoint.plan_config.quantization_config(checkpoint.plan_of(quantized())))
    )
    place = config
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    if any(value == one and type(value) is type(one) for one in fine):
        checkpoint.plan_config.parse_config(config)
        return
    with pytest.raises(CheckpointError) as caught:
        checkpoint.plan_config.parse_config(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_infinite_and_huge_numbers_are_refused_in_files(tmp_path):
    directory = saved(tmp_path)
    (directory / "difloat.json").unlink()
    path = directory / "config.json"
    text = path.read_text()
    for number in ("1e999", "NaN", "1" * 4000, "1" * 5000):
        path.write_text(text.replace('"channels":7', f'"channels":{number}'))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(directory, into=tiny(1))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
        assert not all(finding.passed for finding in checkpoint.verify(directory))


@pytest.mark.parametrize("timesteps", [[math.inf], [math.nan, 1], ["1"], [True], [10**400], [3, 1], [[1]]])
def test_timesteps_of_a_plan_are_finite_and_ascend(timesteps):
    config = checkpoint.plan_config.quantization_config(checkpoint.plan_of(quantized()))
    with pytest.raises(CheckpointError, match="timestep"):
        checkpoint.plan_config.parse_config({**config, "timesteps": timesteps})


@pytest.mark.parametrize("schedule", [[0.0], [True], [-1], [10**9], ["0"], "01", 7, [math.inf]])
@pytest.mark.parametrize("field", ["schedule", "input_schedule"])
def test_schedules_are_small_whole_numbers(field, schedule):
    data = plain(simple_layer(torch.ones(2, 3), [Part(3, E2M1)]))
    with pytest.raises(ValueError, match="schedule"):
        read(LayerSpec, {**data, field: schedule})


def test_a_name_that_is_twice_in_an_object_is_refused(tmp_path):
    directory = saved(tmp_path)
    (directory / "difloat.json").unlink()
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"bits":"w4a8"', '"bits":"w4a8","bits":"w2a2"'))
    with pytest.raises(CheckpointError, match="'bits' is in it twice"):
        checkpoint.load(directory, into=tiny(1))


# Two names


class TwoNames(nn.Module):
    """A layer and a block that are registered twice, and two layers that share a float weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.blocks = nn.ModuleList([self.block])
        self.ins, self.outs = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outs.weight = self.ins.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outs(self.ins(self.blocks[0](self.second(self.block(self.first(x))))))


def test_a_module_with_two_names_is_replaced_under_both_and_stays_one_in_files(tmp_path, generator):
    model = packed(TwoNames(), ["first", "block.0"])
    assert isinstance(model.second, QuantizedLayer) and model.second is model.first
    assert model.blocks[0][0] is model.block[0] and isinstance(model.block[0], QuantizedLayer)
    directory = checkpoint.save(model, tmp_path / "a")
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    assert "first.weight" in stored and not any(
        name.startswith(("second.", "blocks.0.0.")) for name in stored
    )
    assert all(finding.passed for finding in checkpoint.verify(directory))
    loaded = checkpoint.load(directory, into=TwoNames())
    x = torch.randn(3, 6, generator=generator)
    assert loaded.second is loaded.first and loaded.outs.weight is loaded.ins.weight
    assert torch.equal(loaded(x), model(x))
    assert contents(checkpoint.save(loaded, tmp_path / "b")) == contents(directory)
    float_again = install.restore(copy.deepcopy(loaded))
    assert type(float_again.second) is nn.Linear and float_again.second is float_again.first


def test_tied_tensors_with_different_values_are_refused(tmp_path):
    directory = checkpoint.save(packed(TwoNames(), ["first"]), tmp_path / "a")
    (directory / "difloat.json").unlink()
    set_tensor("outs.weight", lambda weight: weight + 1)(directory)
    with pytest.raises(CheckpointError, match="'ins.weight' and 'outs.weight' must be equal"):
        checkpoint.load(directory, into=TwoNames())


class TwoNamesModel(ModelMixin, ConfigMixin):
    """The same for diffusers."""

    @register_to_config
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_diffusers_model_with_a_module_of_two_names_comes_back(tmp_path, generator):
    model = packed(TwoNamesModel(), ["first"])
    directory = checkpoint.save(model, tmp_path / "a")
    loaded = TwoNamesModel.from_pretrained(directory)
    x = torch.randn(3, 6, generator=generator)
    assert loaded.second is loaded.first and isinstance(loaded.first, QuantizedLayer)
    assert torch.equal(loaded(x), model(x))


# What a loader could not build again


def flux(seed: int = 0) -> FluxTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 2, 2),
        ).eval()


def widen(model: nn.Module) -> None:
    model.proj_out = nn.Linear(16, 32)


CHANGES = {
    "fused": (lambda m: m.fuse_qkv_projections(), "to_qkv' was added"),
    "added": (lambda m: m.add_module("head", nn.Linear(4, 4)), "'head' was added"),
    "removed": (lambda m: delattr(m, "norm_out"), "'norm_out' is gone"),
    "activation": (
        lambda m: setattr(m.transformer_blocks[0].ff.net, "1", nn.Tanh()),
        "is Tanh instead of Dropout",
    ),
    "wider": (widen, r"'proj_out' is Linear \(32, 16\) instead of Linear \(16, 16\)"),
    "parameter": (
        lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(3))),
        r"tensor 'gain' has the shape \(3,\) instead of None",
    ),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(3)), "tensor 'mask' has the shape"),
    "no bias": (lambda m: setattr(m.proj_out, "bias", None), r"is Linear \(16, 16\) without bias instead of"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_save_refuses_what_no_loader_can_build(tmp_path, case):
    change, message = CHANGES[case]
    model = flux()
    change(model)
    all_packed(model)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_save_builds_without_touching_the_random_state_or_the_model(tmp_path):
    model = all_packed(flux())
    before, state = torch.get_rng_state(), {name: id(p) for name, p in model.named_parameters()}
    directory = checkpoint.save(model, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert (
        all(finding.passed for finding in checkpoint.verify(directory))
        and checkpoint.load(directory) is not None
    )


def test_a_text_encoder_with_an_added_module_is_refused(tmp_path):
    encoder = all_packed(tiny_unet().text_encoder)
    checkpoint.save(encoder, tmp_path / "a")
    encoder.add_module("head", nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="'head' was added"):
        checkpoint.save(encoder, tmp_path / "b")


# diffusers' own methods


def test_attributes_beside_the_entries_of_a_config_survive_marking():
    model = tiny_unet().unet
    model.config.encoder_hid_dim_type = "ip_image_proj"
    all_packed(model)
    assert (
        model.config.encoder_hid_dim_type == "ip_image_proj" and model.config["encoder_hid_dim_type"] is None
    )
    checkpoint.mark_quantized(model, checkpoint.plan_of(model))
    assert model.config.encoder_hid_dim_type == "ip_image_proj"
    install.restore(model)
    checkpoint.unmark_quantized(model)
    assert model.config.encoder_hid_dim_type == "ip_image_proj" and "quantization_config" not in model.config
    assert not hasattr(model.config, "quantization_config")


def test_fusing_packed_projections_is_refused_and_changes_nothing():
    model = all_packed(tiny_unet().unet)
    before, expected = sorted(model.state_dict()), output(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="must be fused or unfused before a model is quantized"):
            one.fuse_qkv_projections()
        assert sorted(one.state_dict()) == before and torch.equal(output(one), expected)
    attn = next(m for m in model.modules() if hasattr(m, "fuse_projections"))
    with pytest.raises(ValueError, match="must be fused or unfused before a model is quantized"):
        attn.fuse_projections()
    install.restore(model)
    checkpoint.unmark_quantized(model)
    model.fuse_qkv_projections()  # float again
    assert torch.allclose(output(model), expected, atol=1e-5)


def test_unfusing_what_was_packed_fused_is_refused():
    model = flux()
    model.fuse_qkv_projections()
    all_packed(model)
    with pytest.raises(ValueError, match="must be fused or unfused before a model is quantized"):
        model.unfuse_qkv_projections()


def ip_adapter(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    width, clip, tokens = 16, 8, 4

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    projection = {"proj.weight": random(tokens * width, clip), "proj.bias": torch.zeros(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    own, key = {}, 1
    for name in model.attn_processors:
        if not name.endswith("attn1.processor"):
            hidden = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
            own |= {f"{key}.to_{which}_ip.weight": random(hidden, width) for which in "kv"}
            key += 2
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": own}])
    return model


@pytest.mark.filterwarnings("ignore:You have passed a tensor as `encoder_hidden_states`:FutureWarning")
@pytest.mark.parametrize("attended", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ip_adapters_load_onto_packed_models_and_unload(attended, dtype):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 8, 8), (2, 6, 16)))
    images = {"image_embeds": [torch.randn(2, 1, 8, generator=generator).to(dtype)]}

    def call(model: nn.Module, **conditions) -> torch.Tensor:
        with torch.no_grad():
            return model(x, 500, text, **conditions, return_dict=False)[0].float()

    pipeline = tiny_unet()
    model = pipeline.unet.to(dtype)
    plans = {
        name.removesuffix(".processor"): AttentionPlan(formats.parse("e4m3"))
        for name in model.attn_processors
    }
    all_packed(model, plans if attended else {})
    before = call(model)
    ip_adapter(model)
    assert model.is_quantized and model.dtype == dtype
    assert all((attention.plan_of(model.get_submodule(name)) is not None) == attended for name in plans)
    twin = copy.deepcopy(model)
    with_picture = call(model, added_cond_kwargs=images)
    assert torch.equal(call(twin, added_cond_kwargs=images), with_picture)
    assert (with_picture - before).norm() > 0.01 * before.norm()
    pipeline.image_encoder = None
    pipeline.unload_ip_adapter()
    assert torch.equal(call(model), before)
    assert all((attention.plan_of(model.get_submodule(name)) is not None) == attended for name in plans)


def test_attention_stays_quantized_under_any_processor():
    pipeline = tiny_pixart()
    model = pipeline.transformer
    plain = output(model)
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    attended = {name: AttentionPlan(formats.parse("int3")) for name in names}
    attention.install(model, attended)
    expected = output(model)
    assert not torch.equal(plain, expected)
    model.set_attn_processor(AttnProcessor2_0())
    assert {name: attention.plan_of(model.get_submodule(name)) for name in names} == attended
    assert torch.equal(output(model), expected)
    model.set_default_attn_processor()  # AttnProcessor, which does not call scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="must compute by torch's scaled_dot_product_attention"):
        output(model)
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(output(copy.deepcopy(model)), expected)
    attention.restore(model)
    assert (
        torch.equal(output(model), plain)
        and type(model.attn_processors[f"{names[0]}.processor"]) is AttnProcessor2_0
    )
    assert all(attention.plan_of(model.get_submodule(name)) is None for name in names)


def test_quantized_attention_is_saved_after_a_processor_was_set(tmp_path):
    pipeline = quantized_pipeline("transformer")
    model = pipeline.transformer
    name = next(name.removesuffix(".processor") for name in model.attn_processors)
    attention.install(model, {name: AttentionPlan(formats.parse("int4"))})
    model.set_attn_processor(AttnProcessor2_0())
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "a"))
    assert attention.plan_of(loaded.get_submodule(name)) == AttentionPlan(formats.parse("int4"))
    assert torch.equal(output(loaded), output(model))


# Mutations


def test_mutated_checkpoints_load_with_proof_to_the_same_or_are_refused(tmp_path):
    counts, faults = mutate_checkpoints.run(range(28), 1, tmp_path)
    assert faults == [] and sum(counts.values()) == 28
    assert {kind for kind, _ in counts} == set(mutate_checkpoints.MUTATIONS)


@pytest.mark.slow
def test_many_more_mutated_checkpoints(tmp_path):
    assert mutate_checkpoints.run(range(1500), 2, tmp_path)[1] == []

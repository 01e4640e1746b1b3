"""Names kept: single files under BFL's, CompVis' and ComfyUI's names, loaded and written back under them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_model
from torch import Tensor

import difloat
import families
from difloat import api, interchange, sources
from difloat.checkpoint import source_names as kept_names
from difloat.checkpoint.layout import CheckpointError
from difloat.interchange import gguf_files, source_names
from difloat.interchange.contents import Contents
from difloat.interchange.rename import renamed
from difloat.layers import packed
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize
from difloat.plan.plan import Plan
from difloat.plan.rules import Rule, draft_layer
from difloat.sources import Source
from single_files import FLUX, LUMINA2, TINY, under_source_names


def loaded(family: str, folder: Path, extra: dict | None = None) -> tuple[torch.nn.Module, dict]:
    """The tiny model of a family, loaded by diffusers from a file under its source's names, and that file's tensors."""
    build, rules = TINY[family]
    model = build()
    state = under_source_names(model.state_dict(), rules) | (extra or {})
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / "source.safetensors")
    model.save_pretrained(folder / "config")
    read = type(model).from_single_file(
        str(folder / "source.safetensors"), config=str(folder / "config"), torch_dtype=torch.float32
    )
    names = source_names.find(read, state, keep_unused=True)
    if names is not None:
        kept_names.keep(read, names)
    assert all(torch.equal(read.state_dict()[k], v) for k, v in model.state_dict().items()), (
        "the oracle's names"
    )
    return read, state


def quantized(model: torch.nn.Module, kind: str = "int8", only: str = "") -> torch.nn.Module:
    """With the linear layers that fit GGUF's blocks as such; `only` those with a text in their names."""
    rule = Rule((parse(kind),), "group", 32, scales="float16")
    layers = {
        name: draft_layer(layer.weight, [layer.in_features], rule).plan()
        for name, layer in packed.quantizable(model).items()
        if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0 and only in name
    }
    return api.apply(model, Plan("rtn", "w8a16", layers))


def decoded(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a quantized model with float weights."""
    state, plan = dict(model.state_dict()), api.plan_of(model)
    for name, layer in plan.layers.items():
        for key in layer.tensors:
            state.pop(f"{name}.{key}", None)
        state[f"{name}.weight"] = dequantize(layer)
    return state


@pytest.mark.parametrize("family", TINY)
def test_a_float_file_goes_back_as_it_came(family: str, tmp_path: Path) -> None:
    model, state = loaded(family, tmp_path)
    names = kept_names.kept(model)
    if family == "qwen_image":
        assert names is None and state.keys() == model.state_dict().keys()
        return
    again = renamed(Contents({}, model.state_dict(), {}, {}), names).others
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("family", TINY)
def test_a_quantized_file_has_the_names_and_shapes_it_came_with(family: str, tmp_path: Path) -> None:
    model, state = loaded(family, tmp_path)
    difloat.save(quantized(model), tmp_path / "own")
    assert (tmp_path / "own" / "source_names.json").is_file() == (family != "qwen_image")
    difloat.save(difloat.load(tmp_path / "own"), tmp_path / "again")
    file = interchange.export_checkpoint(tmp_path / "again", tmp_path / "m.gguf", "gguf")
    read, counts = gguf_files.read(file)
    expected = under_source_names(decoded(model), TINY[family][1])
    assert counts["Q8_0"] and {n: t.shape for n, t in read.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    if family != "qwen_image":
        file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "d.gguf", "gguf", names="diffusers")
        assert gguf_files.read(file)[0].keys() == decoded(model).keys()


def test_diffusers_reads_a_joined_file_back(tmp_path: Path) -> None:
    """GGUFLinear of every query, key and value, cut by diffusers from the joined blocks."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    model, _ = loaded("z_image", tmp_path)
    difloat.save(quantized(model, "iq4nl"), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    read = type(model).from_single_file(
        str(file),
        config=str(tmp_path / "config"),
        torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    for name, layer in api.plan_of(model).layers.items():
        weight = dequantize_gguf_tensor(read.get_submodule(name).weight).float()
        assert torch.equal(weight, dequantize(layer)), name


FLUX_CONFIG = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "joint_attention_dim": 32}


def test_flux_and_lumina_by_the_rows_of_their_published_widths() -> None:
    """Diffusers' conversions of both know no other widths: here with a single column, which is all that they look at."""
    import diffusers

    cases = [
        ("FluxTransformer2DModel", {**FLUX_CONFIG, "guidance_embeds": True}, FLUX),
        ("Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 2}, LUMINA2),
    ]
    for name, config, rules in cases:
        with torch.device("meta"):
            shapes = {k: t.shape for k, t in getattr(diffusers, name)(**config).state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        ours = {
            k: torch.rand(size[0], *[1] * (len(size) - 1), generator=generator) for k, size in shapes.items()
        }
        source = under_source_names(ours, rules)
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        converted = convert(checkpoint=dict(source))
        assert all(torch.equal(converted[k], t) for k, t in ours.items())
        found = source_names.inverse(
            convert, {}, {k: t.shape for k, t in source.items()}, {k: t.shape for k, t in ours.items()}
        )
        assert found is not None and found.keys() == source.keys()
        again = renamed(Contents({}, ours, {}, {}), {"tensors": found, "unused": {}}).others
        assert all(torch.equal(again[k], t) for k, t in source.items())


def test_tensors_without_a_place_in_the_model_come_back(tmp_path: Path) -> None:
    extra = {"norm_final.weight": torch.rand(32).bfloat16()}
    model, state = loaded("z_image", tmp_path, extra)
    difloat.save(quantized(model), tmp_path / "own")
    read, _ = gguf_files.read(interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf"))
    assert read.keys() == state.keys()
    assert torch.equal(read["norm_final.weight"], extra["norm_final.weight"].float())


def test_from_the_command_of_a_user(tmp_path: Path) -> None:
    """A denoiser in one file with the rest from a base: what `sources.load` notes is saved with the checkpoint."""
    pipeline = families.sd3()
    pipeline.save_pretrained(tmp_path / "base")
    state = under_source_names(pipeline.transformer.state_dict(), TINY["sd3"][1])
    safetensors.torch.save_file(state, tmp_path / "fine-tune.safetensors")
    source = Source(str(tmp_path / "fine-tune.safetensors"), base=str(tmp_path / "base"))
    read = sources.load(source)
    quantized(read.transformer)
    difloat.save(read, tmp_path / "own")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "own"))
    assert (tmp_path / "own" / "transformer" / "source_names.json").is_file()
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    assert gguf_files.read(file)[0].keys() == state.keys()


def test_parts_that_differ_are_refused_with_advice(tmp_path: Path) -> None:
    model, _ = loaded("z_image", tmp_path)
    difloat.save(quantized(model, only="attention.to_q"), tmp_path / "own")
    with pytest.raises(ValueError, match="all of .*qkv.weight' must be quantized or none.*--names diffusers"):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    plan = api.plan_of(model)
    again, _ = loaded("z_image", tmp_path)
    name = next(name for name in plan.layers)
    wide = Rule((parse("int8"),), "group", 32, scales="float16")
    narrow = replace(wide, formats=(parse("int4"),))
    layers = {}
    for part, rule in (("to_q", wide), ("to_k", narrow), ("to_v", wide)):
        layer = name.replace("to_q", part)
        layers[layer] = draft_layer(again.get_submodule(layer).weight, [32], rule).plan()
    difloat.save(api.apply(again, Plan("rtn", "w8a16", layers)), tmp_path / "mixed")
    with pytest.raises(
        ValueError, match=r"quantized in one way, but its parts are not \(weights int4, int8\)"
    ):
        interchange.export_checkpoint(tmp_path / "mixed", tmp_path / "m.gguf", "gguf")
    with pytest.raises(ValueError, match="names must be one of auto, source, diffusers, got 'mine'"):
        interchange.export_checkpoint(tmp_path / "mixed", tmp_path / "m.gguf", "gguf", names="mine")


def test_a_conversion_that_computes_is_given_up() -> None:
    shapes = {"a": (4, 8)}
    for convert in (
        lambda checkpoint, config: {"b": checkpoint["a"].T.reshape(4, 8)},
        lambda checkpoint, config: {"b": checkpoint["a"].flip(1)},
        lambda checkpoint, config: {"b": checkpoint["a"] * 0},
        lambda checkpoint, config: {"b": checkpoint["a"][:2].repeat(2, 1)},
        lambda checkpoint, config: {},
    ):
        assert source_names.inverse(convert, {}, shapes, {"b": (4, 8)}) is None
    turned = source_names.inverse(
        lambda checkpoint, config: {"b": checkpoint["a"].roll(1, 0)}, {}, shapes, {"b": (4, 8)}
    )
    assert turned == {"a": {"shape": [4, 8], "rows": [["b", 1, 4], ["b", 0, 1]]}}


def test_damaged_names_are_refused(tmp_path: Path) -> None:
    for text in (
        "[]",
        "{}",
        '{"version": 1, "tensors": {"a": {"shape": [1], "rows": [[1, 0, 1]]}}, "unused": {}}',
    ):
        (tmp_path / "source_names.json").write_text(text)
        with pytest.raises(CheckpointError):
            kept_names.read(tmp_path)

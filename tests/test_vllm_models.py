"""Files for vLLM-Omni's own models: query, key and value as one layer, read by the `load_weights` of these models."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import difloat
from difloat import api, interchange
from difloat.interchange import vllm
from difloat.pipelines import denoiser_of
from difloat.plan import vllm_models
from difloat.plan.encode import stored_values
from difloat.plan.plan import LayerPlan
from pipeline_table import BUILT, pipeline
from test_vllm import branched, copy_into, omni  # noqa: F401
from tiny import PROMPTS

TO_OUT = {".to_out.0.": ".to_out."}


@dataclass(frozen=True)
class Theirs:
    """A model of vLLM-Omni.

    Attributes:
        file: Where its code is.
        joined: How many layers of each of its blocks are several of ours.
        config: Of the tiny model, whose widths are multiples of 16.
        names: How it calls other layers.
        stacked: Layers in float that are one there, by its name.
        component: The denoiser, where the pipeline has several.
    """

    file: str
    joined: int
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    component: str | None = None

    def spelled(self, name: str) -> str:
        """Its name of a layer or tensor."""
        if name in self.names:
            return self.names[name]
        for ours, other in self.names.items():
            if ours.startswith("."):  # others are whole names
                name = f"{name}.".replace(ours, other).removesuffix(".")
        return name


HEAD, AUDIO = {"attention_head_dim": 16}, {"audio_attention_head_dim": 16}
MODELS = {
    "QwenImagePipeline": Theirs(
        "qwen_image/qwen_image_transformer.py", 2, {**HEAD, "axes_dims_rope": (4, 6, 6)}, TO_OUT
    ),
    "WanPipeline": Theirs(
        "wan2_2/wan2_2_transformer.py",
        1,
        HEAD,
        {
            **TO_OUT,
            ".ffn.net.0.": ".ffn.net_0.",
            ".ffn.net.2.": ".ffn.net_2.",
            "scale_shift_table": "output_scale_shift_prepare.scale_shift_table",
        },
        component="transformer",
    ),
    "Flux2KleinPipeline": Theirs("flux2/flux2_transformer.py", 2, {**HEAD, "axes_dims_rope": (4, 4, 4, 4)}),
    "ZImagePipeline": Theirs(
        "z_image/z_image_transformer.py",
        1,
        {"dim": 32, "axes_dims": (4, 6, 6)},
        stacked={"w13": ("w1", "w3")},
    ),
    "HunyuanVideo15Pipeline": Theirs(
        "hunyuan_video/hunyuan_video_15_transformer.py", 2, {**HEAD, "rope_axes_dim": (4, 6, 6)}
    ),
    "LTX2Pipeline": Theirs(
        "ltx2/ltx2_transformer.py",
        2,
        {**HEAD, "cross_attention_dim": 32, **AUDIO, "audio_cross_attention_dim": 32},
    ),
    "FluxPipeline": Theirs(
        "flux/flux_transformer.py",
        0,
        stacked={
            "to_qkv": ("to_q", "to_k", "to_v"),
            "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
        },
    ),
}


def load_weights_of(
    folder: Path, file: str, name: str
) -> Callable[[Any, Iterable[tuple[str, Tensor]]], set[str]]:
    """The method of a model of vLLM-Omni, with the functions of its file and the few names that it takes from vLLM."""
    tree = ast.parse((folder / file).read_text(encoding="utf-8"))
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (method,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "load_weights")
    names = [
        n
        for n in owner.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "stacked_params_mapping"
    ]
    beside = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    future = ast.parse("from __future__ import annotations").body
    namespace: dict[str, Any] = {
        "torch": torch,
        "logger": SimpleNamespace(warning=print, debug=print),
        "default_weight_loader": copy_into,
        "is_pp_missing_parameter": lambda name, model: False,
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
        "NPUMxfp4LinearMethod": type("Other", (), {}),
    }
    exec(compile(ast.Module([*future, *beside, *names, method], []), file, "exec"), namespace)

    def load(model: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        model.stacked_params_mapping = namespace.get("stacked_params_mapping")
        return namespace["load_weights"](model, weights)

    return load


def into_rows(param: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
    """What vLLM's layers do with a tensor: all of it, or the rows of one of several; what has no rows is the same for all."""
    axis = getattr(param, "output_dim", None)
    if shard is None or axis is None:
        copy_into(param, loaded)
        return
    size = loaded.shape[axis]
    param.data.narrow(axis, ("qkv".index(shard) if isinstance(shard, str) else shard) * size, size).copy_(
        loaded
    )


class Exported:
    """A tiny pipeline of a family quantized for vLLM-Omni, and its file."""

    def __init__(self, name: str, folder: Path) -> None:
        model = pipeline(name)
        if MODELS[name].config:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                old = model.transformer
                model.transformer = type(old).from_config({**old.config, **MODELS[name].config}).eval()
        call = {
            "prompts": PROMPTS,
            "samples": 2,
            "steps": 2,
            "progress": False,
            "call_kwargs": BUILT[name].call,
        }
        self.plan = api.plan(model, "svdquant", "w4a16", target="vllm", **call)
        difloat.save(api.apply(model, self.plan), folder / "own")
        self.module = denoiser_of(model)[1]
        self.file = interchange.export_checkpoint(
            folder / "own", folder / "out", "vllm", component=MODELS[name].component
        )
        self.tensors = load_file(self.file)
        self.config = json.loads((folder / "out/config.json").read_text())["quantization_config"]
        self.joined = vllm_models.joined(type(self.module).__name__, self.plan.layers)


def theirs_of(found: Exported, config: Any, own: Theirs) -> nn.Module:
    """The parameters of vLLM-Omni's model: layers of SVDQuant by its own code, all others as they are in the file."""

    def put(name: str, made: nn.Parameter | nn.Module) -> None:
        *parents, last = name.split(".")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        setattr(at, last, made)

    root = nn.Module()
    quantized = {key.removesuffix(".qweight") for key in found.tensors if key.endswith(".qweight")}
    for name in quantized:
        rows, half = found.tensors[f"{name}.qweight"].shape
        layer = nn.Linear(1, 1)  # an instance of vLLM's LinearBase, as the fixture has it
        method = config.get_quant_method(layer, own.spelled(name))
        made = nn.Module()
        method.create_weights(made, 2 * half, [rows], 2 * half, rows, torch.bfloat16, weight_loader=into_rows)
        made.method = method
        put(own.spelled(name), made)
    for key, tensor in found.tensors.items():
        name, _, last = key.rpartition(".")
        if name in quantized and last != "bias":
            continue
        whole, shape = own.spelled(key), list(tensor.shape)
        for one, parts in own.stacked.items():
            if (part := name.rpartition(".")[2]) in parts:
                whole = whole.replace(f".{part}.", f".{one}.")
                shape[0] *= len(parts)
        parameter = nn.Parameter(torch.full(shape, torch.nan, dtype=tensor.dtype), requires_grad=False)
        parameter.weight_loader, parameter.output_dim = into_rows, 0
        put(whole, parameter)
    return root


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n not in ("QwenImagePipeline", "WanPipeline")))
        for n in MODELS
    ],
)
def test_its_own_models_load_the_file(name: str, omni: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    own, found = MODELS[name], Exported(name, tmp_path)
    folder = Path(importlib.util.find_spec("vllm_omni").submodule_search_locations[0]) / "diffusion/models"
    load = load_weights_of(folder, own.file, type(found.module).__name__)
    config = omni.DiffusionSVDQuantConfig.from_config(found.config)
    theirs = theirs_of(found, config, own)
    load(theirs, found.tensors.items())
    for names in found.joined.values():
        with pytest.raises(TypeError):  # of layers apart, the number of each has no place there
            load(theirs, [(f"{names[0]}.wtscale", torch.ones(1, dtype=torch.bfloat16))])
    assert len(found.joined) >= own.joined and bool(found.joined) == bool(own.joined)
    for key, parameter in theirs.named_parameters():
        assert bool(parameter.float().isfinite().all()), f"{key} was not loaded"
    generator = torch.Generator().manual_seed(0)
    wholes = {**{n: (n,) for n in found.plan.layers}, **found.joined}
    for whole, names in wholes.items():
        if len(names) == 1 and any(whole in members for members in found.joined.values()):
            continue
        layer = theirs.get_submodule(own.spelled(whole))
        layer.method.process_weights_after_loading(layer)
        by_row = 1 if layer.output_channel_scale is None else layer.output_channel_scale.float()[:, None]
        wanted = torch.cat([stored_values(found.plan.layers[one]) for one in names])
        assert torch.equal(layer.decoded * by_row, wanted)
        x = torch.randn(2, 3, wanted.shape[1], generator=generator).bfloat16()
        parts = [found.module.get_submodule(one) for one in names]
        with torch.no_grad():
            ours = torch.cat([part(x.float()) for part in parts], -1)
            bias = getattr(layer, "bias", None)
            got = layer.method.apply(layer, x, None if bias is None else bias.bfloat16()).float()
        assert float((ours - got).abs().max()) <= 5 * 2**-8 * float(ours.abs().max())


def test_joined_layers_have_one_first_factor_and_take_no_more_rank(tmp_path: Path) -> None:
    found = Exported("QwenImagePipeline", tmp_path)
    assert found.joined and found.config["rank"] == max(
        layer.side.rank for layer in found.plan.layers.values()
    )
    for names in found.joined.values():
        layers = [found.plan.layers[name] for name in names]
        assert all(torch.equal(one.tensors["side_down"], layers[0].tensors["side_down"]) for one in layers)
        assert all(
            torch.equal(one.tensors["input_factor"], layers[0].tensors["input_factor"]) for one in layers
        )
    assert "vLLM-Omni holds it in float" in found.plan.skipped["transformer_blocks.0.img_mod.1"]
    (whole,) = interchange.validate(found.file)
    assert whole.level == "ok"


NAMES = tuple(f"transformer_blocks.0.attn.to_{which}" for which in "qkv")


def other(down: float, rows: int = 48) -> LayerPlan:
    layer = branched(down)
    up = torch.full((rows, 1), down).half()
    return replace(layer, tensors={**layer.tensors, "side_up": up})


def test_branches_of_their_own_stand_beside_each_other() -> None:
    layers = dict(zip(NAMES, (other(0.5), other(1.0), other(2.0)), strict=True))
    joined = vllm.joined_layers("QwenImageTransformer2DModel", layers)
    assert joined == {"transformer_blocks.0.attn.to_qkv": NAMES} and vllm.rank_of(layers, joined) == 3
    made = vllm.encode_joined(NAMES, layers, 3)
    product = made["proj_up"].float() @ made["proj_down"].float().t()
    wanted = [
        layer.tensors["side_up"].float() @ layer.tensors["side_down"].float() for layer in layers.values()
    ]
    assert torch.equal(product, torch.cat(wanted))
    assert vllm.rank_of({NAMES[0]: other(0.5)}, {}) == 1


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("QwenImageTransformer2DModel", lambda layers: layers.pop(NAMES[1]), "but 'transformer_blocks.0.attn.to_k' is not"),
        (
            "QwenImageTransformer2DModel",
            lambda layers: layers.update({NAMES[1]: scaled(layers[NAMES[1]])}),
            "must have the same factors of input channels to be 'transformer_blocks.0.attn.to_qkv'",
        ),
        ("FluxTransformer2DModel", lambda layers: None, "query, key and value in float only; quantize with --recipe"),
        ("SD3Transformer2DModel", lambda layers: None, "query, key and value in float only"),
        ("QwenImageTransformer2DModel", lambda layers: layers.update(img_in=other(1.0)), "'img_in' does not"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_named(model: str, change: Callable[[dict], Any], words: str) -> None:
    layers = {name: other(0.5) for name in NAMES}
    change(layers)
    with pytest.raises(ValueError, match=words):
        vllm.joined_layers(model, layers)


def scaled(layer: LayerPlan) -> LayerPlan:
    return replace(layer, smoothed=True, tensors={**layer.tensors, "input_factor": torch.full((32,), 2.0)})


def test_a_class_that_is_not_known_keeps_its_layers() -> None:
    assert vllm_models.joined("PixArtTransformer2DModel", NAMES) == {}
    assert vllm_models.left_float("PixArtTransformer2DModel", "proj_out") == ""
    assert vllm_models.left_float("FluxTransformer2DModel", "transformer_blocks.0.attn.to_out.0") == ""

"""LoRA on quantized models, through diffusers, through PEFT and through our functions: load, weigh, merge, save, train."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import difloat
import families
from difloat import checkpoint, cli
from difloat.cli.options import loras_of
from difloat.layers import install
from difloat.layers.packed import QuantizedLayer
from difloat.lora import adapters
from difloat.lora.peft_layers import PackedConv2d, PackedLinear
from difloat.lora.wrapped import wrapped_layers
from difloat.numbers import formats
from difloat.plan import encode
from difloat.plan.add_delta import add_to_weight
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part, QuantSpec
from test_diffusers import denoiser_plan, output
from tiny import tiny_pixart, tiny_unet

TARGETS = ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_in", "conv_shortcut"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:rounding took away"),  # random adapters on coarse random grids
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # a second adapter
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]


def quantized(pipeline: Any) -> Any:
    """The pipeline with every layer of its denoiser packed."""
    module = adapters._denoiser(pipeline)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = denoiser_plan(module)
    return difloat.apply(pipeline, plan)


def add(module: nn.Module, name: str, targets: list[str] = TARGETS, seed: int = 0, **config: Any) -> None:
    """A random adapter, none of whose factors is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **config}
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), module, name)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = True


def packed_layers(module: nn.Module) -> dict[str, LayerPlan]:
    """Copies of the state of all quantized layers, by their names without wrappers."""
    return {
        name.removesuffix(".base_layer"): copy.deepcopy(layer.plan())
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLayer)
    }


def same(left: dict[str, LayerPlan], right: dict[str, LayerPlan]) -> bool:
    """Whether two models have the same bytes in their quantized layers."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name].tensors[key])
        for name, layer in left.items()
        for key, tensor in layer.tensors.items()
    )


def wrappers(module: nn.Module) -> dict[str, Any]:
    return {name: wrapper for _, name, wrapper in wrapped_layers(module)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two LoRAs of the tiny Stable Diffusion, saved from its float U-Net."""
    folders = []
    for seed in (1, 2):
        pipeline = tiny_unet()
        add(pipeline.unet, "own", seed=seed)
        folders.append(difloat.lora.save(pipeline, tmp_path_factory.mktemp("lora")).parent)
    return folders


@pytest.fixture
def pipeline() -> Any:
    return quantized(tiny_unet())


@pytest.fixture
def adapted(pipeline: Any) -> Any:
    add(pipeline.unet, "a")
    return pipeline


# What the side branch computes


def test_linear_and_convolution_add_the_product_of_their_factors(adapted: Any, generator: torch.Generator):
    kinds = set()
    for wrapper in wrappers(adapted.unet).values():
        base, down, up = wrapper.base_layer, wrapper.lora_A["a"], wrapper.lora_B["a"]
        shape = (2, base.in_features) if isinstance(base, nn.Linear) else (2, base.in_channels, 8, 8)
        x = torch.randn(shape, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(wrapper(x), base(x) + 2 * up(down(x)), rtol=0, atol=0)
        kinds.add((type(wrapper), type(down)))
    assert kinds == {(PackedLinear, nn.Linear), (PackedConv2d, nn.Conv2d)}


def test_life_in_diffusers_load_weigh_switch_off_delete(pipeline: Any, saved: list[Path]):
    unet, bare = pipeline.unet, output(pipeline.unet)
    outputs = {}
    for name, folder in zip("ab", saved, strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)
    for weights in ((1.0, 1.0), (0.5, 0.0), (0.0, 2.0)):
        pipeline.set_adapters(["a", "b"], list(weights))
        outputs[weights] = output(unet)
        assert adapters.weights(pipeline) == pytest.approx({"a": weights[0], "b": weights[1]})
        difloat.lora.set_weights(pipeline, {"a": weights[0], "b": weights[1]})
        assert torch.equal(output(unet), outputs[weights])
    assert len({tensor.sum().item() for tensor in [bare, *outputs.values()]}) == 4
    pipeline.disable_lora()
    assert torch.equal(output(unet), bare) and adapters.weights(pipeline) == {}
    pipeline.enable_lora()
    pipeline.delete_adapters("b")
    pipeline.set_adapters("a", 0.5)
    torch.testing.assert_close(output(unet), outputs[0.5, 0.0])
    pipeline.unload_lora_weights()
    assert torch.equal(output(unet), bare) and checkpoint.plan_of(unet).layers


def test_hot_swap_and_copies(pipeline: Any, saved: list[Path]):
    pipeline.load_lora_weights(saved[0], adapter_name="a")
    first = output(pipeline.unet)
    twin = copy.deepcopy(pipeline.unet)
    pipeline.load_lora_weights(saved[1], adapter_name="a", hotswap=True)
    assert not torch.equal(output(pipeline.unet), first) and torch.equal(output(twin), first)


def test_half_precision_keeps_its_dtype_with_merged_and_unmerged_adapters():
    unet = quantized(tiny_unet().to(torch.bfloat16)).unet
    bare, before = output(unet), packed_layers(unet)
    add(unet, "a")
    unmerged = output(unet)
    difloat.lora.merge(unet)
    merged = output(unet)
    assert unmerged.dtype == merged.dtype == bare.dtype == torch.bfloat16
    assert (merged - unmerged).norm() < 0.7 * (bare - unmerged).norm()
    difloat.lora.unload(unet)  # merged, so the change stays
    assert torch.equal(output(unet), merged) and not same(packed_layers(unet), before)


# Merging


def test_fuse_lora_adds_to_the_packed_weight_and_unfuse_gives_the_bytes_back(adapted: Any):
    unet, before, unmerged = adapted.unet, packed_layers(adapted.unet), output(adapted.unet)
    changes = {name: w.get_delta_weight("a") for name, w in wrappers(unet).items()}
    adapted.fuse_lora(components=["unet"])
    after = packed_layers(unet)
    for name, layer in before.items():
        expected = add_to_weight(layer, changes[name]).layer if name in changes else layer
        assert same({name: expected}, {name: after[name]}), name
    # The merged model is nearer to the unmerged one than the model without LoRA is.
    merged = output(unet)
    adapted.unfuse_lora(components=["unet"])
    assert same(packed_layers(unet), before) and torch.equal(output(unet), unmerged)
    adapted.disable_lora()
    assert (merged - unmerged).norm() < 0.6 * (output(unet) - unmerged).norm()


def test_merging_one_after_another_is_merging_together(adapted: Any):
    unet, before = adapted.unet, packed_layers(adapted.unet)
    add(unet, "b", seed=1)
    difloat.lora.set_weights(adapted, {"a": 0.5, "b": 2.0})
    shares = difloat.lora.merge(adapted)
    together = packed_layers(unet)
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares.keys() == {f"unet.{name}" for name in wrappers(unet)}
    difloat.lora.unmerge(adapted)
    assert same(packed_layers(unet), before)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        for name in ("b", "a"):
            difloat.lora.merge(adapted, [name])
    assert same(packed_layers(unet), together)
    with pytest.raises(ValueError, match="unmerge them first"):
        difloat.lora.set_weights(adapted, {"a": 1.0})


def test_switching_off_while_merged_unmerges(adapted: Any):
    before, unmerged = packed_layers(adapted.unet), output(adapted.unet)
    adapted.fuse_lora(components=["unet"], lora_scale=0.5)
    adapted.disable_lora()
    output(adapted.unet)
    assert same(packed_layers(adapted.unet), before) and unmerged.isfinite().all()


def test_merged_biases_and_their_way_back(pipeline: Any):
    add(pipeline.unet, "a", ["conv1"], lora_bias=True)
    wrapper = next(iter(wrappers(pipeline.unet).values()))
    before = wrapper.base_layer.bias.detach().clone()
    difloat.lora.merge(pipeline)
    torch.testing.assert_close(wrapper.base_layer.bias, before + 2 * wrapper.lora_B["a"].bias)
    difloat.lora.unmerge(pipeline)
    assert torch.equal(wrapper.base_layer.bias, before)


def test_a_merged_model_is_saved_and_loaded(adapted: Any, tmp_path: Path):
    for save in (
        lambda: difloat.save(adapted, tmp_path / "no"),
        lambda: adapted.unet.save_pretrained(tmp_path / "no"),
    ):
        with pytest.raises(ValueError, match="call unload_lora_weights"):
            save()
    assert not (tmp_path / "no" / "unet").exists()
    difloat.lora.merge(adapted)
    adapted.unload_lora_weights()
    merged = output(adapted.unet)
    difloat.save(adapted, tmp_path / "merged")
    assert torch.equal(output(difloat.load(tmp_path / "merged").unet), merged)
    assert all(finding.passed for finding in difloat.verify(tmp_path / "merged"))


def test_one_layer_that_cannot_merge_leaves_all_as_they_were():
    pipeline = quantized(families.sana())
    module = pipeline.transformer
    add(module, "a", ["to_q", "conv_depth"], r=16 * 5 * 2)
    before = packed_layers(module)
    with pytest.raises(ValueError, match="grouped convolution"):
        difloat.lora.merge(pipeline)
    assert same(packed_layers(module), before) and not any(w.merged for w in wrappers(module).values())


def test_layers_that_depend_on_the_timestep_merge_every_variant(generator: torch.Generator):
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.inner(x)

    model, part = Denoiser(), Part(8, QuantSpec(formats.parse("e4m3"), "channel"))
    variants = [
        encode.plan_layer(torch.randn(8, 8, generator=generator), [part], [torch.full((8,), 0.01)])
        for _ in range(2)
    ]
    factors = 0.5 + torch.rand(2, 8, generator=generator)
    joined = encode.join_variants(variants, (0, 1), factors)
    install.apply(model, difloat.Plan("own", "w8a16", {"inner": joined}, timesteps=(0.0, 1.0)))
    add(model, "a", ["inner"])
    x = torch.randn(4, 8, generator=generator)
    with torch.no_grad():
        before = [model(x, torch.tensor(t)) for t in (0.0, 1.0)]
        assert difloat.lora.merge(model)["inner"] > 0.99
        after = [model(x, torch.tensor(t)) for t in (0.0, 1.0)]
    difloat.lora.unmerge(model)
    for merged, unmerged in zip(after, before, strict=True):
        # Three mantissa bits: every weight is off by at most 1/16 of itself; errors of eight add up as their squares do.
        assert (merged - unmerged).norm() < unmerged.norm() / 16
    assert same(packed_layers(model), {"inner": joined})


def test_what_rounding_takes_away_is_said(adapted: Any):
    difloat.lora.set_weights(adapted, {"a": 1e-4})
    with pytest.warns(UserWarning, match="rounding took away more than half"):
        shares = difloat.lora.merge(adapted)
    assert min(shares.values()) < 0.5


# Files


def test_saved_adapters_go_from_float_to_packed_and_back(pipeline: Any, saved: list[Path], tmp_path: Path):
    difloat.lora.load(pipeline, saved[0], "a")
    file = difloat.lora.save(pipeline, tmp_path)
    first, second = load_file(saved[0] / adapters.LORA_FILE), load_file(file)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    again = tiny_unet()
    again.load_lora_weights(tmp_path)
    assert len(wrappers(again.unet)) == len(wrappers(pipeline.unet))
    layers_of = {"unet_lora_layers": peft.get_peft_model_state_dict(pipeline.unet, adapter_name="a")}
    pipeline.save_lora_weights(tmp_path / "diffusers", **layers_of)
    stored = load_file(tmp_path / "diffusers" / adapters.LORA_FILE)
    assert stored.keys() == first.keys() and all(torch.equal(first[key], stored[key]) for key in first)


FAMILIES = {  # with diffusers' LoRA methods and without
    "flux": ["to_q", "proj_mlp", "x_embedder"],
    "sd3": ["to_q", "to_out.0", "proj"],
    "pixart_sigma": ["to_q", "proj", "linear_1"],
    "hunyuandit": ["to_q", "fc1", "proj"],
    "dit": ["to_q", "net.0.proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_merges_unloads(family: str, tmp_path: Path):
    source = getattr(families, family)()
    component, module = adapters._denoiser(source)
    add(module, "s", FAMILIES[family])
    difloat.lora.save(source, tmp_path, "s")
    pipeline = quantized(getattr(families, family)())
    target = adapters._denoiser(pipeline)[1]
    before = packed_layers(target)
    difloat.lora.load(pipeline, tmp_path, "s", 0.5)
    assert same(packed_layers(target), before)  # FLUX's loader would replace packed layers by wider ones
    expected, got = wrappers(module), wrappers(target)
    assert expected.keys() == got.keys() and adapters.weights(pipeline) == {"s": 0.5}
    for name, wrapper in got.items():
        for factor in ("lora_A", "lora_B"):
            left, right = getattr(wrapper, factor)["s"].weight, getattr(expected[name], factor)["s"].weight
            assert torch.equal(left, right)
    assert difloat.lora.merge(pipeline).keys() == {f"{component}.{name}" for name in got}
    difloat.lora.unmerge(pipeline)
    assert same(packed_layers(target), before)
    difloat.lora.unload(pipeline)
    assert not adapters.loaded(pipeline) and checkpoint.plan_of(target).layers.keys() == before.keys()


def test_a_control_lora_of_flux_widens_the_float_weight(tmp_path: Path):
    pipeline: FluxPipeline = quantized(families.flux())
    embedder = pipeline.transformer.x_embedder
    weight = encode.dequantize(embedder.plan())
    state = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 2 * weight.shape[1]),
        "transformer.x_embedder.lora_B.weight": torch.randn(weight.shape[0], 4),
    }
    save_file(state, tmp_path / adapters.LORA_FILE)
    pipeline.load_lora_weights(tmp_path)
    wide = pipeline.transformer.x_embedder.base_layer
    assert type(wide) is nn.Linear and wide.weight.shape == (len(weight), 2 * weight.shape[1])
    assert (
        torch.equal(wide.weight[:, : weight.shape[1]], weight) and not wide.weight[:, weight.shape[1] :].any()
    )


def test_directories_of_peft_and_its_own_merge(tmp_path: Path):
    model = quantized(tiny_pixart()).transformer
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
        )
    wrapped.save_pretrained(tmp_path)
    difloat.lora.load(twin, tmp_path)
    assert torch.equal(output(twin), output(wrapped.base_model.model))
    difloat.lora.merge(twin)
    assert same(packed_layers(twin), packed_layers(wrapped.merge_and_unload()))


def test_keys_without_configuration_count_fully(tmp_path: Path):
    model = quantized(tiny_pixart()).transformer
    name = "transformer_blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.randn(3, 32), f"{name}.lora_B.weight": torch.randn(32, 3)}
    save_file(state, tmp_path / "x.safetensors")
    difloat.lora.load(model, tmp_path / "x.safetensors", "x")
    (wrapper,) = wrappers(model).values()
    expected = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    torch.testing.assert_close(wrapper.get_delta_weight("x"), expected)


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.", ""]
)
@pytest.mark.parametrize("make", [tiny_unet, tiny_pixart])
def test_any_prefix_before_the_layers_is_understood(make: Any, prefix: str, tmp_path: Path):
    pipeline = quantized(make())
    module = adapters._denoiser(pipeline)[1]
    name = next(name for name in packed_layers(module) if name.endswith("attn1.to_q"))
    width = module.get_submodule(name).in_features
    state = {
        f"{prefix}{name}.lora_A.weight": torch.ones(3, width),
        f"{prefix}{name}.lora_B.weight": torch.ones(width, 3),
    }
    save_file(state, tmp_path / "x.safetensors")
    difloat.lora.load(pipeline, tmp_path / "x.safetensors", "x")
    assert list(wrappers(module)) == [name]
    assert bool((wrappers(module)[name].get_delta_weight("x") == 3).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", [tiny_unet, tiny_pixart])
def test_a_lora_that_is_not_finite_is_refused(make: Any, value: float, tmp_path: Path):
    pipeline = quantized(make())
    component, module = adapters._denoiser(pipeline)
    name = next(name for name in packed_layers(module) if name.endswith("attn1.to_q"))
    width = module.get_submodule(name).in_features
    factors = {"A": torch.ones(3, width), "B": torch.full((width, 3), value)}
    save_file(
        {f"{component}.{name}.lora_{k}.weight": t for k, t in factors.items()}, tmp_path / adapters.LORA_FILE
    )
    with pytest.raises(
        ValueError, match=r"LoRA must hold finite numbers, got NaN or Inf in '.*lora_B.weight'"
    ):
        difloat.lora.load(pipeline, tmp_path)
    assert not adapters.loaded(pipeline) and not wrappers(module)


BAD_FILES = {
    "other keys": ({"transformer.proj_out.lora_down.weight": torch.zeros(1)}, "must have keys like"),
    "other model": ({"mid_block.lora_A.weight": torch.zeros(1, 1)}, "is no layer of it"),
    "empty": ({}, "must hold tensors"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_foreign_files_are_refused(kind: str, tmp_path: Path):
    state, words = BAD_FILES[kind]
    save_file(state, tmp_path / adapters.LORA_FILE)
    model = quantized(tiny_pixart())
    with pytest.raises(ValueError, match=words):
        difloat.lora.load(model, tmp_path)
    assert not adapters.loaded(model)


# What is refused


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["to_q"], use_dora=True),
        peft.LoraConfig(target_modules=["conv1"], use_dora=True),
        peft.LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"),
        peft.LoraConfig(target_modules=["to_q"], init_lora_weights="olora"),
        peft.LoraConfig(target_modules=["to_q"], init_lora_weights="orthogonal"),
        peft.LoHaConfig(target_modules=["to_q"]),
        peft.LoKrConfig(target_modules=["to_q"]),
        peft.OFTConfig(target_modules=["to_q"]),
    ],
    ids=lambda config: f"{config.peft_type.value} {getattr(config, 'init_lora_weights', '')}",
)
def test_methods_that_need_the_float_weight_are_refused(config: Any, pipeline: Any):
    before = packed_layers(pipeline.unet)
    with pytest.raises(ValueError, match="on quantized layers must be"):
        peft.inject_adapter_in_model(config, pipeline.unet)
    assert same(packed_layers(pipeline.unet), before) and not wrappers(pipeline.unet)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_plain_starts_are_welcome(start: Any, pipeline: Any):
    settings = {"eva_config": peft.EvaConfig()} if start == "eva" else {}
    add(pipeline.unet, "a", ["to_q", "ff.net.2"], init_lora_weights=start, use_rslora=True, **settings)
    assert output(pipeline.unet).isfinite().all()


def test_float_layers_keep_every_method(pipeline: Any):
    module = tiny_unet().unet
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], use_dora=True), module)
    assert output(module).isfinite().all()


def test_a_model_with_adapters_is_not_quantized():
    pipeline = tiny_unet()
    add(pipeline.unet, "style")
    for action in (difloat.quantize, lambda p: difloat.apply(p, difloat.Plan("rtn", "w4a8", {}))):
        with pytest.raises(ValueError, match=r"no adapters to be quantized, got \['style'\]; call fuse_lora"):
            action(pipeline)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    assert quantized(pipeline)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: difloat.lora.merge(p), "none in use"),
        (lambda p: difloat.lora.merge(p, ["x"]), r"got \['x'\]"),
        (lambda p: difloat.lora.set_weights(p, {"x": 1.0}), r"got \['x'\]"),
        (lambda p: difloat.lora.save(p, "nowhere"), r"one of the loaded LoRAs \[\]"),
    ],
)
def test_what_is_not_loaded_is_named(call: Any, words: str, pipeline: Any):
    with pytest.raises(ValueError, match=words):
        call(pipeline)
    difloat.lora.unmerge(pipeline)  # nothing to do
    difloat.lora.unload(pipeline)


def test_missing_files_and_taken_names_are_refused(adapted: Any, saved: list[Path], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"pytorch_lora_weights\.safetensors or adapter_model"):
        difloat.lora.load(adapted, tmp_path)
    with pytest.raises(ValueError, match="must be new, got 'a'"):
        difloat.lora.load(adapted, saved[0], "a")


# Training


def test_a_lora_learns_on_packed_weights(pipeline: Any):
    unet, before = pipeline.unet, packed_layers(pipeline.unet)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 6, 16, generator=generator)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert all(not isinstance(m, QuantizedLayer) or m.weight.grad is None for m in unet.modules())
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(12):
        loss = (unet(x, torch.tensor([5]), text).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The first convolution's adapter is reached through every quantized layer behind it.
    assert losses[-1] < 0.9 * losses[0] and unet.conv_in.lora_B["default"].weight.grad.abs().max() > 0
    assert all(m.weight.grad is None for m in unet.modules() if isinstance(m, QuantizedLayer))
    assert same(packed_layers(unet), before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("b:0.5", ("b", 0.5)),
        ("c:-1", ("c", -1.0)),
        (r"C:\x", (r"C:\x", 1.0)),
    ],
)
def test_weights_on_the_command_line(text: str, expected: tuple[str, float]):
    assert loras_of([text]) == [expected]


def test_the_guide_runs(
    pipeline: Any, saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "docs/guide.md").read_text(encoding="utf-8").partition("## LoRA")[2]
    snippet = re.search(r"```python\n(.*?)```", guide, re.S)[1]
    command = re.search(r"```\n(difloat generate .*?)\n```", guide)[1]
    monkeypatch.chdir(tmp_path)
    difloat.save(pipeline, "checkpoint-fp4")
    Path("style.safetensors").write_bytes((saved[0] / adapters.LORA_FILE).read_bytes())
    names: dict[str, Any] = {}
    exec(snippet, names)  # what the page shows, nothing else
    assert same(packed_layers(names["pipeline"].unet), packed_layers(pipeline.unet)) and names["arrived"]
    assert load_file(Path("copy") / adapters.LORA_FILE).keys() == load_file("style.safetensors").keys()
    short = ["--steps", "1", "--count", "1", "--prompt", "a red cat"]
    cli.app([*command.split()[1:], *short], standalone_mode=False)
    cli.app(["generate", "checkpoint-fp4", "plain", *short], standalone_mode=False)
    pictures = [Path(folder, "00000.png").read_bytes() for folder in ("pictures", "plain")]
    assert pictures[0] != pictures[1]

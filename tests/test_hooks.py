"""What others hang on a model: either the plan is that of the model without it, bit for bit, or one sentence comes first."""

from __future__ import annotations

import copy
import functools
import tempfile
import types
from collections.abc import Callable

import accelerate
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    ModelHook,
    apply_group_offloading,
    apply_layer_skip,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import difloat
from difloat.layers import hooks, install
from difloat.layers import packed as layers
from difloat.plan.plan import Plan
from test_modes import RECIPES, assert_same, denoiser, loop, plain_plan, planned
from tiny import tiny_pixart

CPU = torch.device("cpu")
LAYER = "transformer_blocks.0.attn1.to_q"


def flux() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 2, 2),
        ).eval()


def flux_loop(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, 4, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 3, 16, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with model.cache_context("cond"):
        for timestep in (0.9, 0.3):
            model(timestep=torch.full((2,), timestep), **arguments, return_dict=False)


def flux_plan(model: nn.Module) -> Plan:
    exclude = ["single_transformer_blocks", "x_embedder", "context_embedder"]
    return difloat.plan(
        model, "rtn", "w8a8", forward_loop=flux_loop, samples=2, progress=False, exclude=exclude
    )


def refused(model: nn.Module, words: str, plan: Plan | None = None) -> None:
    """Neither planned nor carried out nor copied; the denoiser is not called, and no layer changes."""
    calls: list[int] = []
    before = {name: type(module) for name, module in model.named_modules()}
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError, match=words) as error:
        difloat.quantize(model, "rtn", "w8a8", forward_loop=lambda m: calls.append(1), progress=False)
    assert str(error.value).count(". ") == 0
    with pytest.raises(ValueError, match=words):
        difloat.apply(model, plan or Plan("rtn", "w8a8", {}))
    with pytest.raises(ValueError, match=words):
        install.shadow(model)
    handle.remove()
    assert not calls and before == {name: type(module) for name, module in model.named_modules()}


CACHES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "first block": (lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.2)), "FBCHeadBlockHook"),
    "magnitude": (
        lambda m: m.enable_cache(MagCacheConfig(mag_ratios=torch.ones(2), num_inference_steps=2)),
        "MagCacheHeadHook",
    ),
    "taylor": (lambda m: m.enable_cache(TaylorSeerCacheConfig()), "TaylorSeerCacheHook"),
    "pyramid": (
        lambda m: m.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            )
        ),
        "PyramidAttentionBroadcastHook",
    ),
    "faster": (
        lambda m: m.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                current_timestep_callback=lambda: 500,
                tensor_format="BCHW",
            )
        ),
        "FasterCache",
    ),
}


@functools.cache
def flux_plain() -> Plan:
    return flux_plan(flux())


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_refused_and_disabled_ones_leave_nothing(name: str) -> None:
    enable, kind = CACHES[name]
    model = flux()
    enable(model)
    refused(model, rf"got {kind}\w* at '[\w.]+'; call disable_cache\(\)|got {kind}\w* at the model itself")
    model.disable_cache()
    assert_same(flux_plan(model), flux_plain())
    model = difloat.apply(model, flux_plain())
    enable(model)  # afterwards it may
    if name in ("first block", "taylor"):
        with torch.no_grad():
            flux_loop(model)


def offload_groups(model: nn.Module, kind: str, **settings: object) -> None:
    apply_group_offloading(model, CPU, CPU, offload_type=kind, num_blocks_per_group=1, **settings)


class Twice(ModelHook):
    """A hook that nobody knows."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


HELD: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "groups on the disk": (
        lambda m: offload_groups(m, "leaf_level", offload_to_disk_path=tempfile.mkdtemp()),
        "quantize it before enable_group_offload",
    ),
    "sequential from the disk": (
        lambda m: accelerate.disk_offload(m, tempfile.mkdtemp(), CPU),
        "got AlignDevicesHook of accelerate",
    ),
    "over several devices": (
        lambda m: accelerate.hooks.add_hook_to_module(
            m.transformer_blocks[0], accelerate.hooks.AlignDevicesHook(CPU)
        ),
        r"got AlignDevicesHook of accelerate at 'transformer_blocks\.0'",
    ),
    "casting by accelerate": (
        lambda m: accelerate.big_modeling.attach_layerwise_casting_hooks(m, torch.bfloat16, torch.float32),
        "got LayerwiseCastingHook of accelerate",
    ),
    "unknown hook": (
        lambda m: HookRegistry.check_if_exists_or_initialize(m.transformer_blocks[0]).register_hook(
            Twice(), "2"
        ),
        r"got Twice at 'transformer_blocks\.0'; call disable_cache\(\), or remove the hook",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_offloading_casting_and_unknown_chains_are_refused(name: str) -> None:
    hang, words = HELD[name]
    model = denoiser()
    hang(model)
    refused(model, words, plain_plan("rtn"))


def test_skipped_layers_are_refused() -> None:
    model = flux()
    config = LayerSkipConfig([0], "transformer_blocks", skip_attention=False, skip_ff=True)
    apply_layer_skip(model, config)
    refused(model, "must be free of diffusers' hooks to be quantized, got FeedForwardSkipHook")


def test_text_encoders_are_looked_at_before_the_denoiser_runs() -> None:
    pipeline = tiny_pixart()
    accelerate.big_modeling.attach_layerwise_casting_hooks(
        pipeline.text_encoder, torch.bfloat16, torch.float32
    )
    calls: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError, match="got LayerwiseCastingHook of accelerate"):
        difloat.plan(pipeline, "rtn", "w8a8", prompts=["a"], components=["transformer", "text_encoder"])
    assert not calls


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["model offload", "one device"])
def test_hooks_about_where_the_whole_model_is_change_nothing(recipe: str, kind: str) -> None:
    model = denoiser()
    if kind == "model offload":  # what enable_model_cpu_offload does on a machine with an accelerator
        model, _ = accelerate.cpu_offload_with_hook(model, CPU)
    else:
        accelerate.hooks.add_hook_to_module(
            model, accelerate.hooks.AlignDevicesHook(CPU, io_same_device=True)
        )
    hook, forward = model._hf_hook, model.forward
    assert_same(planned(model, recipe), plain_plan(recipe))
    assert model._hf_hook is hook and model.forward is forward
    twin = install.shadow(model)
    assert not {"_hf_hook", "_old_forward", "forward"} & vars(twin).keys()
    difloat.apply(model, plain_plan(recipe))
    assert model._hf_hook is hook
    expected = install.apply(denoiser(), plain_plan(recipe))
    with torch.no_grad():
        outputs = [
            each(torch.ones(2, 4, 8, 8), torch.ones(2, 5, 16), torch.full((2,), 300), return_dict=False)[0]
            for each in (model, expected)
        ]
    assert torch.equal(*outputs)


class Watch:
    """A hook with a state that cannot be copied."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = [output if isinstance(output, Tensor) else output[0]]
        self.modules.append(module)

    def __deepcopy__(self, memo: object) -> Watch:
        raise AssertionError("a hook was copied")


@pytest.mark.parametrize("recipe", RECIPES)
def test_hooks_of_the_user_see_every_copy_and_stay_with_their_layers(recipe: str) -> None:
    model = denoiser()
    watch, before = Watch(), []
    handles = [
        model.get_submodule(name).register_forward_hook(watch)
        for name in ("transformer_blocks.0", LAYER, "transformer_blocks.1")
    ]
    handles.append(
        model.get_submodule(LAYER).register_forward_pre_hook(
            lambda module, args, kwargs: before.append(module), with_kwargs=True
        )
    )
    assert_same(planned(model, recipe), plain_plan(recipe))
    difloat.apply(model, plain_plan(recipe))
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, layers.QuantLinear)
    watch.modules.clear()
    before.clear()
    with torch.no_grad():
        loop(model)
    assert watch.modules.count(layer) == 2 and before.count(layer) == 2
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_hook_that_changes_outputs_is_part_of_the_model() -> None:
    """Doubling by hooks of a block and of a layer is, for the plan and afterwards, like doubling in the model."""

    class Net(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(2)
            )
            self.factor = factor

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                sample = sample + self.factor * block[2](block[1](self.factor * block[0](sample)))
            return sample

    class Hooked(Net):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                sample = sample + block(sample)
            return sample

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return 2.0 * output

    def calls(model: nn.Module) -> None:
        torch.manual_seed(1)
        sample = torch.randn(4, 8)
        for timestep in (900.0, 300.0):
            sample = sample - 0.1 * model(sample, torch.full((4,), timestep))

    x, timestep = torch.linspace(-1, 1, 16).reshape(2, 8), torch.ones(2)
    for recipe, options in (("rtn", {}), ("efficientdm", {"epochs": 1, "rows": 2})):
        plans, outputs = [], []
        for hooked in (False, True):
            model = Hooked(1.0) if hooked else Net(2.0)
            for block in model.blocks if hooked else ():
                block.register_forward_hook(double)
                block[0].register_forward_hook(double)
            plans.append(
                difloat.quantize(
                    model, recipe, "w4a8", forward_loop=calls, samples=4, progress=False, **options
                )
            )
            with torch.no_grad():
                outputs.append(model(x, timestep))
        assert_same(*plans)
        assert torch.equal(*outputs)


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(layer)


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "parametrized weight_norm": (parametrizations.weight_norm, "weight"),
    "parametrized spectral_norm": (parametrizations.spectral_norm, "weight"),
    "parametrized orthogonal": (parametrizations.orthogonal, "weight"),
    "weight_norm": (old_weight_norm, "weight"),
    "spectral_norm": (spectral_norm, "weight"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", amount=0.3), "weight"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", amount=0.3), "bias"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_refused(name: str) -> None:
    compute, key = COMPUTED[name]
    model = denoiser()
    compute(model.get_submodule(LAYER))
    refused(model, rf"the {key} of '{LAYER}' is computed; call torch\.nn\.utils\.", plain_plan("rtn"))


def test_computed_weights_elsewhere_are_none_of_our_business() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1))
            self.linear = nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.linear(self.conv(sample))

    model = Net()
    difloat.quantize(
        model,
        "rtn",
        "w8a8",
        forward_loop=lambda m: m(torch.randn(2, 4, 8), torch.ones(2)),
        samples=2,
        progress=False,
    )
    assert isinstance(model.linear, layers.QuantLinear)
    with torch.no_grad():
        got, expected = (each(torch.ones(1, 4, 8), torch.ones(1)) for each in (model, Net()))
    assert float((got - expected).abs().max()) < 0.1


def test_a_forward_set_on_an_instance_is_refused_unless_a_copy_binds_it() -> None:
    plan = plain_plan("rtn")
    model = denoiser()
    block = model.transformer_blocks[0]
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    refused(model, r"'transformer_blocks\.0' must compute by the forward of its class", plan)
    block.forward = types.MethodType(type(block).forward, block)
    assert_same(planned(model, "rtn"), plan)
    layer = model.get_submodule(LAYER)
    layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, layer)
    refused(model, rf"'{LAYER}' must compute by the forward of its class", plan)
    del layer.forward
    compiled = torch.compile(model, backend="eager")
    refused(
        compiled, "the model itself must compute by the forward of its class .* quantize before torch.compile"
    )

    def doubled(self: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        return (type(self).forward(self, *args, **kwargs)[0] * 2,)

    model.forward = types.MethodType(doubled, model)  # a method of the model: that of a copy calls the copy
    twin = install.apply(install.shadow(model), plan)
    arguments = (torch.ones(2, 4, 8, 8), torch.ones(2, 5, 16), torch.full((2,), 300))
    with torch.no_grad():
        got = twin(*arguments, return_dict=False)[0]
        expected = install.apply(denoiser(), plan)(*arguments, return_dict=False)[0] * 2
    assert torch.equal(got, expected)


def test_a_shadow_computes_with_its_own_modules_whatever_hangs_on_the_model() -> None:
    model, _ = accelerate.cpu_offload_with_hook(flux(), CPU)
    flux_loop(model)  # `cache_context` leaves an empty registry behind
    assert "_diffusers_hook" in vars(model)
    watch = Watch()
    model.register_forward_hook(watch)
    model.register_forward_pre_hook(
        functools.partial(lambda note, module, args: note(module), watch.modules.append)
    )
    twin = install.apply(install.shadow(model), flux_plain())
    outputs: list[Tensor] = []
    with torch.no_grad():
        for each in (twin, install.apply(flux(), flux_plain()), flux()):
            handle = each.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
            flux_loop(each)
            handle.remove()
    assert torch.equal(outputs[1], outputs[3]) and not torch.equal(outputs[1], outputs[5])
    assert watch.modules == [twin] * 4
    assert hooks.carried(model) and not model._forward_hooks.keys() - twin._forward_hooks.keys()
    packed = {name for name, module in twin.named_modules() if isinstance(module, layers.QuantizedLayer)}
    for name, parameter in twin.named_parameters():
        assert name.rpartition(".")[0] in packed or parameter is model.get_parameter(name)


def test_a_copy_of_a_copy_keeps_its_bits() -> None:
    model = denoiser()
    quantized = install.apply(model, plain_plan("lbfp"))
    twin = copy.deepcopy(install.shadow(quantized))
    arguments = (torch.ones(2, 4, 8, 8), torch.ones(2, 5, 16), torch.full((2,), 300))
    with torch.no_grad():
        assert torch.equal(
            twin(*arguments, return_dict=False)[0], quantized(*arguments, return_dict=False)[0]
        )

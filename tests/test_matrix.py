"""Every kind of layer in every mode of diffusers: saved, loaded, offloaded, copied, cast, compiled; same output bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from difloat import checkpoint
from difloat.layers import attention, install, packed
from difloat.numbers import formats
from difloat.plan.encode import join_variants, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import AttentionPlan, Part, QuantSpec
from test_diffusers import PIPELINES, output

FP4, INT6 = formats.parse("e2m1"), formats.parse("int6")
STATIC = QuantSpec(formats.parse("e4m3"))
ONLINE = QuantSpec(formats.parse("e4m3"), "token", online=True)
CHANNEL, GROUP = QuantSpec(FP4, "channel"), QuantSpec(INT6, "group", 5)
TIMESTEPS = (0.0, 5.0, 9.0)  # `output` calls with timestep 5


def encoded(weight: torch.Tensor, parts: list[Part]) -> LayerPlan:
    pieces = weight.split([part.channels for part in parts], dim=1)
    scales = [
        (piece.abs().amax() / part.weight.format.max).repeat(
            part.weight.scale_count(len(piece), part.channels)
        )
        for piece, part in zip(pieces, parts, strict=True)
    ]
    inputs = [None if part.activation.online else torch.rand(1) + 0.01 for part in parts]
    return plan_layer(weight, parts, scales, input_scales=inputs)


def by_timestep(weight: torch.Tensor) -> LayerPlan:
    part = [Part(weight.shape[1], CHANNEL, STATIC)]
    joined = join_variants([encoded(weight, part), encoded(weight * 0.5, part)], (0, 1, 0))
    scales = torch.cat([joined.tensors["input_scale"], torch.rand(1) + 0.01])
    return replace(joined, tensors={**joined.tensors, "input_scale": scales}, input_schedule=(0, 1, 1))


def smoothed(weight: torch.Tensor) -> LayerPlan:
    plan = encoded(weight, [Part(weight.shape[1], CHANNEL, ONLINE)])
    return join_variants([plan], (), torch.rand(1, weight.shape[1]) + 0.5)


def split(weight: torch.Tensor) -> LayerPlan:
    first = weight.shape[1] // 2
    if not first:
        return whole(STATIC, CHANNEL)(weight)
    return encoded(weight, [Part(first, CHANNEL, STATIC), Part(weight.shape[1] - first, GROUP, STATIC)])


def whole(activation: QuantSpec, weight_spec: QuantSpec) -> Callable[[torch.Tensor], LayerPlan]:
    return lambda weight: encoded(weight, [Part(weight.shape[1], weight_spec, activation)])


KINDS = {
    "linear": ("transformer", whole(STATIC, CHANNEL)),
    "conv2d": ("unet", whole(STATIC, CHANNEL)),
    "grouped": ("unet", whole(ONLINE, GROUP)),
    "split": ("unet", split),
    "timesteps": ("transformer", by_timestep),
    "smoothed": ("transformer", smoothed),
    "attention": ("transformer", whole(ONLINE, CHANNEL)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> nn.Module:
    return quantized_denoiser(kind)


def quantized_denoiser(kind: str) -> nn.Module:
    """A denoiser in memory with every layer of one kind."""
    component, plan_of = KINDS[kind]
    model = getattr(PIPELINES[component](), component)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plans = {name: plan_of(layer.weight.detach()) for name, layer in packed.quantizable(model).items()}
    entries = {}
    if kind == "attention":
        grids = AttentionPlan(formats.parse("e4m3"), formats.parse("ue4m4"))
        entries = {name: grids for name, m in model.named_modules() if attention.has_processor(m)}
    timesteps = TIMESTEPS if kind == "timesteps" else ()
    plan = Plan("rtn", "w4a8", plans, {}, {"seed": 0}, attention=entries, timesteps=timesteps)
    checkpoint.mark_quantized(install.apply(model, plan), plan)
    return model


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    return checkpoint.save(model, tmp_path_factory.mktemp("matrix") / "saved", max_shard_bytes=20_000)


def loaded(model: nn.Module, directory: Path, **arguments) -> nn.Module:
    return type(model).from_pretrained(directory, **arguments)


def half_on(model: nn.Module, device: str) -> dict[str, str]:
    """A device map with every second top-level module, blocks among them, on `device`, the rest on the CPU."""
    children = {name: ("cpu", device)[number % 2] for number, (name, _) in enumerate(model.named_children())}
    return children | {name: "cpu" for name, _ in model.named_parameters(recurse=False)}


def on_disk(model: nn.Module, directory: Path, folder: Path) -> nn.Module:
    found = loaded(model, directory, device_map=half_on(model, "disk"), offload_folder=folder)
    assert any(parameter.is_meta for parameter in found.parameters())
    return found


def variant(model: nn.Module, directory: Path, folder: Path) -> nn.Module:
    model.save_pretrained(folder, variant="fp4")
    return loaded(model, folder, variant="fp4")


def offloaded_by_groups(found: nn.Module, **arguments) -> nn.Module:
    cpu = torch.device("cpu")
    apply_group_offloading(found, onload_device=cpu, offload_device=cpu, **arguments)
    return found


def disk_offload(found: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(found, folder, execution_device=torch.device("cpu"))
    return found


MODES = {
    "loaded": lambda model, directory, folder: loaded(model, directory),
    "device_map cpu": lambda model, directory, folder: loaded(model, directory, device_map="cpu"),
    "device_map auto": lambda model, directory, folder: loaded(model, directory, device_map="auto"),
    "state dict on disk": lambda model, directory, folder: loaded(
        model, directory, torch_dtype=torch.float32, device_map="cpu", offload_state_dict=True
    ),
    "device_map disk": on_disk,
    "variant": variant,
    "deepcopy": lambda model, directory, folder: copy.deepcopy(loaded(model, directory)),
    "pickle": lambda model, directory, folder: pickle.loads(pickle.dumps(loaded(model, directory))),
    "to device": lambda model, directory, folder: loaded(model, directory).to("cpu"),
    "sequential offload": lambda model, directory, folder: accelerate.cpu_offload(
        loaded(model, directory), torch.device("cpu")
    ),
    "model offload": lambda model, directory, folder: accelerate.cpu_offload_with_hook(
        loaded(model, directory), torch.device("cpu")
    )[0],
    "disk offload": lambda model, directory, folder: disk_offload(loaded(model, directory), folder),
    "group offload, leaves": lambda model, directory, folder: offloaded_by_groups(
        loaded(model, directory), offload_type="leaf_level"
    ),
    "group offload, blocks": lambda model, directory, folder: offloaded_by_groups(
        loaded(model, directory), offload_type="block_level", num_blocks_per_group=1
    ),
    "group offload to disk": lambda model, directory, folder: offloaded_by_groups(
        loaded(model, directory), offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}

# Parameters beside the blocks are keys of a device map, too, and accelerate knows modules only.
OFFLOADED = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")


@OFFLOADED
@pytest.mark.parametrize("mode", MODES)
def test_output_is_that_of_the_model_in_memory(model, directory, tmp_path, mode) -> None:
    assert torch.equal(output(MODES[mode](model, directory, tmp_path)), output(model))


@OFFLOADED
def test_weights_are_really_away_while_offloaded(model, directory, tmp_path) -> None:
    found = on_disk(model, directory, tmp_path)
    away = [
        module
        for module in found.modules()
        if isinstance(module, packed.QuantizedLayer) and module.weight.is_meta
    ]
    assert away and all(buffer.device.type == "cpu" for module in away for buffer in module.buffers())


def test_shards_load_side_by_side(model, directory, monkeypatch) -> None:
    assert len(list(directory.glob("*.safetensors"))) > 1
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    found = loaded(model, directory, dtype=torch.bfloat16)
    expected = checkpoint.plan_of(model).layers
    for name, layer in checkpoint.plan_of(found).layers.items():
        assert layer.parts == expected[name].parts
        assert all(torch.equal(t, expected[name].tensors[key]) for key, t in layer.tensors.items())


def test_layerwise_casting_rounds_what_is_float_and_nothing_else(model) -> None:
    found, reference = copy.deepcopy(model), copy.deepcopy(model)
    found.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rounded = {name: p for name, p in found.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert rounded and all(name.endswith(".bias") for name in rounded)
    for name, parameter in rounded.items():
        reference.get_parameter(name).data = parameter.detach().float()
    assert torch.equal(output(found), output(reference))
    assert {buffer.dtype for buffer in found.buffers()} == {torch.float32}


# A compiler takes seconds per cell: those by default that had to be taught to it, the others on request.
FAST_CELLS = {("conv2d", "regional"), ("timesteps", "full"), ("attention", "full")}
CELLS = [
    pytest.param(kind, how, marks=[] if (kind, how) in FAST_CELLS else pytest.mark.slow)
    for kind, (component, _) in KINDS.items()
    for how in ("full", "regional")
    if component == "unet" or how == "full"  # PixArt names no repeated blocks
]


def compiled(cell: str, how: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """A model in memory, and a copy that is compiled in whole graphs."""
    torch._dynamo.reset()
    model = quantized_denoiser(cell)
    found = copy.deepcopy(model)
    compile_it = found.compile if how == "full" else found.compile_repeated_blocks
    compile_it(fullgraph=True, backend=backend)
    return model, found


@pytest.mark.parametrize("cell, how", CELLS)
def test_compiled_in_one_graph_it_computes_the_same(cell, how) -> None:
    model, found = compiled(cell, how, "aot_eager")
    assert torch.equal(output(found), output(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by the compiler itself
@pytest.mark.parametrize("cell, how", [("linear", "full"), ("conv2d", "regional")])
def test_compiled_to_machine_code_it_computes_nearly_the_same(cell, how) -> None:
    model, found = compiled(cell, how, "inductor")
    # Float layers and norms are fused: their sums are rounded in another order, then inputs to the same grid.
    assert float((output(found) - output(model)).norm() / output(model).norm()) < 0.02

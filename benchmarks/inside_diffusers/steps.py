"""What `benchmarks/integration.py` tries: each step checks what came out of it, and returns a remark for the table or None.

A step that finds something else than promised raises `Different`, one that a library does not claim to do `NotOffered`;
any other exception is the library's.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from checks import Different, distance, hashes, same, same_tensors, saved, stored
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from libraries import Case
from lora_steps import (
    ATTENTION,
    fuse,
    lora_of,
    lora_on_convolutions,
    save_lora,
    saved_lora,
    train,
    two_loras,
    unfuse,
)
from pipelines import (
    DTYPE,
    PIPELINES,
    codes_and_scales,
    is_quantized,
    output,
    pixart,
    quantized_layers,
    tensors_of,
)
from torch import Tensor, nn

CPU = torch.device("cpu")
Step = Callable[[Case], str | None]


# Loading and saving


def on_the_fly(case: Case) -> str:
    """Layers are quantized and the output is near that of the float model."""
    model, exact = case.on_the_fly(), output(case.load())
    layers = quantized_layers(model)
    off = distance(output(model), exact)
    if not layers or not 0 < off < 0.5:
        raise Different(f"{len(layers)} layers are quantized, output differs by {off:.1%}")
    return f"output differs by {off:.1%}"


def by_pipeline(case: Case) -> None:
    """The same model as by its own from_pretrained, and the pipeline runs."""
    config = PipelineQuantizationConfig(quant_mapping={case.component: case.library.config()})
    pipeline = DiffusionPipeline.from_pretrained(
        case.directory, quantization_config=config, torch_dtype=DTYPE
    )
    same(output(getattr(pipeline, case.component)), output(case.on_the_fly()))
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"use_resolution_binning": False} if case.pipeline == "PixArt" else {}
    result = pipeline(
        "a red cat", num_inference_steps=2, height=16, width=16, output_type="latent", **options
    )
    if not result.images.isfinite().all():
        raise Different("pictures are not finite")


def saved_and_loaded(case: Case) -> None:
    """Plain from_pretrained gives the same codes, scales and output."""
    model = case.on_the_fly()
    found = case.load(saved(case, model))
    before, after = codes_and_scales(model), codes_and_scales(found)
    for part, what in enumerate(("codes", "scales")):
        same_tensors(after[part], before[part], what)
    same(output(found), output(model))


def three_round_trips(case: Case) -> str:
    """The same files each time; the remark is their hash."""
    model = case.on_the_fly()
    found = []
    for number in range(3):
        directory = saved(case, model, str(number))
        found.append(hashes(directory))
        model = case.load(directory)
    if len(set(found)) > 1:
        same_tensors(*(stored(case.folder / name) for name in "10"), "the files")
        same_tensors(*(stored(case.folder / name) for name in "20"), "the files")
        raise Different("the tensors are the same, the header of the file differs")
    return f"sha256 {found[0][:12]}"


def in_other_dtypes(case: Case, part: int) -> None:
    """Loaded in float16 and float32, codes (part 0) or scales (part 1) keep their bits; the output stays finite."""
    model = case.on_the_fly()
    directory = saved(case, model)
    for dtype in (torch.float16, torch.float32):
        found = case.load(directory, torch_dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        what = ("codes", "scales")[part]
        same_tensors(codes_and_scales(found)[part], codes_and_scales(model)[part], f"{what} ({name})")
        distance(output(found, dtype), output(model))


def in_shards(case: Case) -> None:
    """Several files, same output."""
    model = case.on_the_fly()
    directory = saved(case, model, max_shard_size=20_000)
    if len(list(directory.glob("*.safetensors"))) < 2:
        raise Different("one file was written")
    same(output(case.load(directory)), output(model))


def variant(case: Case) -> None:
    """Files with a variant's name, same output."""
    model = case.on_the_fly()
    directory = saved(case, model, variant="low")
    if not list(directory.glob("*.low*.safetensors")):
        raise Different("no file has the name of the variant")
    same(output(case.load(directory, variant="low")), output(model))


def cast(case: Case) -> None:
    """`.to(float16)` keeps the codes, and the model still works."""
    model = case.on_the_fly()
    before = codes_and_scales(model)[0]
    model.to(torch.float16)
    same_tensors(codes_and_scales(model)[0], before, "codes")
    distance(output(model, torch.float16), output(case.load()))


# Life in memory


def as_model(change: Callable[[nn.Module, Path], nn.Module | None]) -> Step:
    """A step: the output is the same after `change`, which returns another model or changes this one."""

    def step(case: Case) -> None:
        model = case.model()
        before = output(model)
        other = change(model, case.folder / "away")
        same(output(model if other is None else other), before)

    return step


def group(disk: bool = False, **arguments: Any) -> Callable[[nn.Module, Path], None]:
    """Group offload of diffusers."""

    def change(model: nn.Module, folder: Path) -> None:
        more = {"offload_to_disk_path": str(folder)} if disk else {}
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments, **more)

    return change


def device_map(case: Case) -> None:
    """Every second part on the disk by `device_map`, same output."""
    model = case.on_the_fly()
    before, directory = output(model), saved(case, model)
    places = {name: ("cpu", "disk")[number % 2] for number, (name, _) in enumerate(model.named_children())}
    places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    found = case.load(directory, device_map=places, offload_folder=case.folder / "away")
    if not any(parameter.is_meta for parameter in found.parameters()):
        raise Different("nothing is on the disk")
    same(output(found), before)


def torch_save(model: nn.Module, folder: Path) -> Any:
    """Through a file of torch.save."""
    folder.mkdir()
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def compiled(case: Case) -> str | None:
    """In one graph; the same output up to 1 percent."""
    model = case.model()
    before = output(model)
    off = distance(output(torch.compile(model, backend="aot_eager", fullgraph=True)), before)
    if off > 0.01:
        raise Different(f"output differs by {off:.1%}")
    return f"output differs by {off:.2%}" if off else None


# Others


def text_encoder(case: Case) -> str:
    """T5 by transformers: quantized while loading, saved, loaded, same output and, saved again, same files."""
    from transformers import T5EncoderModel

    words = torch.tensor([[5, 9, 3, 1]])

    def states(encoder: nn.Module) -> Tensor:
        with torch.no_grad():
            return encoder(words).last_hidden_state

    source = case.shelf / "FLUX" / "text_encoder_2"
    exact = states(T5EncoderModel.from_pretrained(source, dtype=DTYPE))
    config = case.library.text_config()
    model = T5EncoderModel.from_pretrained(source, quantization_config=config, dtype=DTYPE)
    off = distance(states(model), exact)
    if not quantized_layers(model) or not 0 < off < 0.5:
        raise Different(f"{len(quantized_layers(model))} layers are quantized, output differs by {off:.1%}")
    directory = saved(case, model)
    again = T5EncoderModel.from_pretrained(directory, dtype=DTYPE)
    same(states(again), states(model))
    if hashes(saved(case, again, "again")) != hashes(directory):
        raise Different("files differ after a round trip")
    return f"{len(quantized_layers(model))} layers, output differs by {off:.1%}"


def counted(case: Case) -> str:
    """How many convolutions of the model are quantized."""
    total = sum(isinstance(layer, nn.Conv2d) for layer in case.load().modules())
    found = len(_weights(case, convolutions=True))
    return f"{found} of {total}"


def _weights(case: Case, convolutions: bool) -> list[Tensor]:
    """Float weights of the layers that the library quantizes."""
    found = quantized_layers(case.model())
    layers = dict(case.load().named_modules())
    return [layers[n].weight for n in found if isinstance(layers[n], nn.Conv2d) or not convolutions]


def resident(case: Case) -> str:
    """Bytes of a larger PixArt in memory after a call, beyond the float parts, over those of its weights in bfloat16."""
    case = replace(case, source=WIDE)
    numbers = sum(weight.numel() for weight in _weights(case, convolutions=False))
    gc.collect()
    before = _bytes()
    model = case.model()
    output(model)
    gc.collect()
    rest = sum(
        t.untyped_storage().nbytes()
        for name, module in model.named_modules()
        if not is_quantized(module)
        for t in tensors_of(module, name).values()
    )
    biases = sum(
        layer.bias.nbytes
        for layer in quantized_layers(model).values()
        if getattr(layer, "bias", None) is not None
    )
    return f"{(_bytes() - before - rest - biases) / (2 * numbers):.2f}"


def _bytes() -> int:
    """Of the storages of all tensors that are alive."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            if not hasattr(thing, "__tensor_flatten__"):  # what it wraps is alive, too
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


STEPS: dict[str, Step] = {
    "quantized while loading": on_the_fly,
    "by PipelineQuantizationConfig": by_pipeline,
    "saved and loaded: same output": saved_and_loaded,
    "three round trips: same files": three_round_trips,
    "loaded in another dtype: same codes": lambda case: in_other_dtypes(case, 0),
    "loaded in another dtype: same scales": lambda case: in_other_dtypes(case, 1),
    "saved in shards": in_shards,
    "variant": variant,
    "`.to(dtype)` keeps the codes": cast,
    "two LoRAs, on and off": two_loras,
    "LoRA on quantized convolutions": lora_on_convolutions,
    "fuse_lora": fuse,
    "unfuse_lora gives the output back": unfuse,
    "a LoRA is trained": train,
    "LoRA saved and loaded": saved_lora,
    "model offload": as_model(lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU)[0]),
    "sequential offload": as_model(lambda model, folder: accelerate.cpu_offload(model, CPU)),
    "disk offload": as_model(
        lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU)
    ),
    "device_map with disk": device_map,
    "group offload, leaves": as_model(group(offload_type="leaf_level")),
    "group offload, blocks": as_model(group(offload_type="block_level", num_blocks_per_group=1)),
    "group offload to disk": as_model(group(offload_type="leaf_level", disk=True)),
    "deepcopy": as_model(lambda model, folder: copy.deepcopy(model)),
    "pickle": as_model(lambda model, folder: pickle.loads(pickle.dumps(model))),
    "torch.save of the model": as_model(torch_save),
    "torch.compile, one graph": compiled,
    "T5 text encoder, saved and loaded": text_encoder,
    "convolutions quantized": counted,
    "bytes in memory over bfloat16": resident,
}
WIDE = "PixArt of 8 blocks, 512 wide"  # scales and buffers count for no more than in real models
ONLY = {  # steps that say nothing new on the other pipelines
    "LoRA on quantized convolutions": "U-Net",
    "convolutions quantized": "U-Net",
    "T5 text encoder, saved and loaded": "FLUX",
    "bytes in memory over bfloat16": "PixArt",
}


def prepare(shelf: Path) -> None:
    """The float pipelines and two LoRAs of each, and a larger PixArt."""
    torch.manual_seed(0)
    pixart(512, blocks=8).save_pretrained(shelf / WIDE)
    for name, (component, build) in PIPELINES.items():
        torch.manual_seed(0)
        pipeline = build()
        pipeline.save_pretrained(shelf / name)
        for seed, letter in enumerate("ab"):
            model = copy.deepcopy(getattr(pipeline, component))
            torch.manual_seed(seed + 1)
            lora_of(model, ATTENTION)
            save_lora(pipeline, model, component, shelf / "lora" / name / letter, "default")

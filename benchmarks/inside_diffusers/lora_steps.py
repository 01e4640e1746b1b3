"""LoRA in `benchmarks/integration.py`: loaded, switched, fused, trained, saved; by diffusers, or by PEFT where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from checks import Different, NotOffered, distance, same, same_tensors
from libraries import Case
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import call, codes_and_scales, output, quantized_layers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2"]
LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_of(model: nn.Module, targets: list[str], name: str = "default", **more: Any) -> peft.LoraConfig:
    """A random LoRA in a model."""
    settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **more}
    config = peft.LoraConfig(target_modules=targets, **settings)
    model.requires_grad_(False)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name=name)
    else:
        peft.inject_adapter_in_model(config, model, name)
    return config


def load(pipeline: Any, model: nn.Module, folder: Path, name: str) -> None:
    """A LoRA from its folder, by diffusers or, for classes without LoRA there, by PEFT."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, adapter_name=name)
        return
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION)
    peft.inject_adapter_in_model(config, model, name)
    peft.set_peft_model_state_dict(model, load_file(folder / LORA_FILE), adapter_name=name)


def use(pipeline: Any, model: nn.Module, names: list[str]) -> None:
    """Exactly these LoRAs; none switches all off."""
    if hasattr(pipeline, "set_adapters"):
        if names:
            pipeline.enable_lora()
            pipeline.set_adapters(names)
        else:
            pipeline.disable_lora()
        return
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names)


def save_lora(pipeline: Any, model: nn.Module, component: str, folder: Path, name: str) -> None:
    """By the pipeline, or as PEFT writes it."""
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    if hasattr(pipeline, "save_lora_weights"):
        pipeline.save_lora_weights(folder, **{f"{component}_lora_layers": state})
    else:
        folder.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / LORA_FILE)


def two_loras(case: Case) -> None:
    """Each changes the output as it does in the float model; off, the output is the one from before."""
    model = case.model()
    pipeline, bare = case.wrapped(model), output(model)
    exact = case.load()
    outside, start = case.wrapped(exact), output(exact)
    for name in "ab":
        load(pipeline, model, case.shelf / "lora" / case.pipeline / name, name)
        load(outside, exact, case.shelf / "lora" / case.pipeline / name, name)
    for names in (["a"], ["b"], ["a", "b"]):
        use(pipeline, model, names)
        use(outside, exact, names)
        change, expected = output(model).float() - bare.float(), output(exact).float() - start.float()
        cosine = float(torch.nn.functional.cosine_similarity(change.flatten(), expected.flatten(), dim=0))
        if not cosine > 0.5:
            raise Different(f"LoRA {'+'.join(names)} changes something else (cosine {cosine:.2f})")
    use(pipeline, model, [])
    same(output(model), bare, "output without LoRA")


def lora_on_convolutions(case: Case) -> None:
    """On quantized convolutions, the output changes."""
    if case.library.float_convolutions:
        raise NotOffered("convolutions stay floating point")
    model = case.model()
    if not any(name.split(".")[-1] in CONVOLUTIONS for name in quantized_layers(model)):
        raise Different("no convolution is quantized")
    bare = output(model)
    lora_of(model, CONVOLUTIONS)
    if not distance(output(model), bare) > 0:
        raise Different("output is that without LoRA")


def merge(pipeline: Any, model: nn.Module, component: str, back: bool = False) -> None:
    """LoRAs into the weights, or out of them."""
    if hasattr(pipeline, "fuse_lora"):
        (pipeline.unfuse_lora if back else pipeline.fuse_lora)(components=[component])
        return
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.unmerge() if back else layer.merge()


def fused(case: Case) -> tuple[Any, nn.Module, Tensor, Tensor]:
    """A pipeline with a LoRA, its denoiser, and the outputs without and with it."""
    model = case.model()
    pipeline, bare = case.wrapped(model), output(model)
    load(pipeline, model, case.shelf / "lora" / case.pipeline / "a", "a")
    use(pipeline, model, ["a"])
    return pipeline, model, bare, output(model)


def fuse(case: Case) -> str:
    """Weights change, and the output is nearer to that with the LoRA than the output without it is."""
    pipeline, model, bare, wanted = fused(case)
    before = codes_and_scales(model)[0]
    merge(pipeline, model, case.component)
    found = output(model)
    left = distance(found, wanted) / distance(bare, wanted)
    after = codes_and_scales(model)[0]
    if after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before):
        raise Different("codes are those from before")
    if not left < 0.8:
        raise Different(f"output is {left:.0%} as far from that with the LoRA as without it")
    return f"{1 - left:.0%} of the change arrived"


def unfuse(case: Case) -> None:
    """The very output from before."""
    pipeline, model, _, wanted = fused(case)
    merge(pipeline, model, case.component)
    merge(pipeline, model, case.component, back=True)
    same(output(model), wanted)


def train(case: Case) -> str:
    """The loss falls, codes and scales stay, and only the LoRA has gradients."""
    model = case.model()
    if case.library.no_training and case.pipeline == "U-Net":
        raise NotOffered(case.library.no_training)
    before = codes_and_scales(model)
    lora_of(model, ATTENTION, init_lora_weights=True)
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    target = torch.randn(call(model).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (call(model).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    if not losses[-1] < losses[0]:
        raise Different(f"loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    strangers = [n for n, p in model.named_parameters() if p.grad is not None and "lora_" not in n]
    if strangers:
        raise Different(f"{strangers[0]} has a gradient")
    for found, expected, what in zip(codes_and_scales(model), before, ("codes", "scales"), strict=True):
        same_tensors(found, expected, what)
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def saved_lora(case: Case) -> None:
    """Saved from one quantized model and loaded into another: same output."""
    model = case.model()
    pipeline = case.wrapped(model)
    lora_of(model, ATTENTION)
    save_lora(pipeline, model, case.component, case.folder / "lora", "default")
    other = case.model()
    load(case.wrapped(other), other, case.folder / "lora", "again")
    same(output(other), output(model))

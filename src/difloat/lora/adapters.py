"""LoRA on quantized models: loading, weighting, merging, saving.

Everything that diffusers and PEFT offer works on quantized layers too. The functions here do the same for every model, also for
those that diffusers gives no LoRA methods (PixArt, HunyuanDiT, DiT), and say what merging cost. They take a pipeline or a
module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from difloat.cache_entries import whole_file
from difloat.layers.packed import QuantizedLayer
from difloat.lora.files import LORA_FILE, Stored, read
from difloat.lora.wrapped import components, is_wrapper, loaded, weights, wrapped_layers


def load(
    pipeline_or_module: Any, source: str | os.PathLike[str], name: str = "default", weight: float = 1.0
) -> None:
    """Load a LoRA and use it together with those that are in use.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> trained = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style")
    >>> file = difloat.lora.save(trained, "style")                         # as diffusers and PEFT write it
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = difloat.quantize(model, "rtn", "w8a16", progress=False)
    >>> difloat.lora.load(model, file, "style", weight=0.8)
    >>> difloat.lora.weights(model)
    {'style': 0.8}

    A pipeline with `load_lora_weights` loads by that, so it reads every dialect that diffusers reads. For other pipelines and
    for modules the keys must be those of PEFT, `<layer>.lora_A.weight`. They may have one prefix before the names of the
    denoiser's layers, such as the component's name, `diffusion_model.` or `base_model.model.`. Keys with another prefix than
    the component's name are read so in every pipeline.

    Args:
        pipeline_or_module: A float or quantized pipeline or module.
        source: A safetensors file, or a directory as diffusers or PEFT save it.
        name: A name for the LoRA that is not taken yet.
        weight: The factor of its change.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name is taken, the file is no LoRA of this model, or a value in it is not finite. Nothing is loaded
            then.
    """
    if name in (taken := loaded(pipeline_or_module)):
        raise ValueError(f"name of a LoRA must be new, got {name!r} beside {taken}; choose another")
    stored = read(Path(source))
    in_use = weights(pipeline_or_module)
    component, module = _denoiser(pipeline_or_module)
    prefix = stored.prefix(module)
    by_diffusers = hasattr(pipeline_or_module, "load_lora_weights") and not stored.by_peft
    if by_diffusers and prefix in (None, f"{component}."):
        file = stored.file
        pipeline_or_module.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    else:
        _inject(module, stored, prefix or "", name)
    if name not in loaded(pipeline_or_module):
        raise ValueError(
            f"LoRA must be of this model, but {stored.file.name} fits no layer of it; load it into its own"
        )
    set_weights(pipeline_or_module, {**in_use, name: weight})


def save(pipeline_or_module: Any, directory: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write a LoRA as diffusers does, and return the file. Float and quantized models of the same architecture load it.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> trained = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style")
    >>> difloat.lora.save(trained, "style").name
    'pytorch_lora_weights.safetensors'

    Args:
        pipeline_or_module: A pipeline or module with LoRAs. A component of a pipeline has its name before its keys.
        directory: The directory to write, which is made if it does not exist. A LoRA in it is replaced.
        name: The name of the LoRA, or None if there is only one.

    Raises:
        ValueError: if there is no LoRA of that name.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft import get_peft_model_state_dict

    found = loaded(pipeline_or_module)
    if name is None and len(found) == 1:
        name = found[0]
    if name is None or name not in found:
        raise ValueError(f"name must be one of the loaded LoRAs {found}, got {name!r}; choose one")
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, module in components(pipeline_or_module).items():
        configs: dict[str, Any] = getattr(module, "peft_config", {})
        if name in configs:
            prefix = f"{component}." if component else ""
            own = get_peft_model_state_dict(module, adapter_name=name)
            state |= {prefix + key: tensor.detach().contiguous() for key, tensor in own.items()}
            # A set has another order in every process, and equal LoRAs give equal bytes.
            config |= {
                prefix + key: sorted(value) if isinstance(value, set) else value
                for key, value in configs[name].to_dict().items()
            }
    target = Path(directory) / LORA_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        writer: Any = LoraBaseMixin  # its annotations forbid None, its body asks for it
        writer.write_lora_layers(state, str(partial.parent), True, partial.name, None, True, config)
    return target


def set_weights(pipeline_or_module: Any, weights: Mapping[str, float]) -> None:
    """Use exactly these LoRAs, with these factors. An empty mapping switches all off and keeps them loaded.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style")
    >>> difloat.lora.set_weights(model, {"style": 0.5})
    >>> difloat.lora.weights(model)
    {'style': 0.5}

    Raises:
        ValueError: if one is not loaded, or LoRAs are merged, whose weights are fixed.
    """
    from diffusers.utils import set_adapter_layers, set_weights_and_activate_adapters

    if unknown := sorted(weights.keys() - set(loaded(pipeline_or_module))):
        raise ValueError(
            f"LoRAs must be loaded before they are used, got {unknown}; load them with difloat.lora.load"
        )
    if any(wrapper.merged for _, _, wrapper in wrapped_layers(pipeline_or_module)):
        raise ValueError(
            "LoRAs must not be merged to change their weights, got merged ones; unmerge them first"
        )
    for module in components(pipeline_or_module).values():
        set_adapter_layers(module, enabled=bool(weights))
        if weights:
            set_weights_and_activate_adapters(module, list(weights), list(weights.values()))


def merge(pipeline_or_module: Any, names: Sequence[str] | None = None) -> dict[str, float]:
    """Add LoRAs to the packed weights and round again, until `unmerge`. The model is then as fast as without them.

    >>> import difloat, peft
    >>> model, config = nn.Sequential(nn.Linear(16, 16)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    >>> _ = difloat.quantize(model, "rtn", "w8a16", progress=False)
    >>> _ = peft.inject_adapter_in_model(config, model, "style")
    >>> round(difloat.lora.merge(model)["0"], 1)                           # the share of the change that arrived
    1.0
    >>> difloat.lora.unmerge(model)

    Low-bit grids take small changes badly. Where every weight moves by less than half a step, nothing arrives. A LoRA that
    stays unmerged, or is merged into the float model before that is quantized, arrives whole.

    Args:
        pipeline_or_module: A pipeline or module with LoRAs, whose float and quantized layers are both merged.
        names: The names of the LoRAs, or None for those in use.

    Returns:
        The share of the change (its squared norm) that survived rounding, by the names of the quantized layers.

    Raises:
        ValueError: if there is no such LoRA, or a layer cannot take one (grouped convolutions). Nothing is merged then.
    """
    chosen = list(weights(pipeline_or_module)) if names is None else list(names)
    if not chosen or (unknown := set(chosen) - set(loaded(pipeline_or_module))):
        got = sorted(unknown) if chosen else "none in use"
        raise ValueError(
            f"LoRAs must be loaded before they are merged, got {got}; load them with difloat.lora.load"
        )
    done: list[Any] = []
    shares = {}
    try:
        for prefix, name, wrapper in wrapped_layers(pipeline_or_module):
            if any(each in wrapper.scaling for each in chosen):
                wrapper.merge(adapter_names=chosen)
                done.append(wrapper)
                if isinstance(wrapper.get_base_layer(), QuantizedLayer):
                    shares[prefix + name] = wrapper.share
    except BaseException:
        for wrapper in done:
            wrapper.unmerge()
        raise
    return shares


def unmerge(pipeline_or_module: Any) -> None:
    """Undo `merge` or `fuse_lora`. Quantized layers get back the very bytes that they had.

    >>> import difloat, peft
    >>> model, config = nn.Sequential(nn.Linear(16, 16)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    >>> _ = difloat.quantize(model, "rtn", "w8a16", progress=False)
    >>> before = model[0].packed.clone()
    >>> _ = peft.inject_adapter_in_model(config, model, "style")
    >>> _ = difloat.lora.merge(model)
    >>> difloat.lora.unmerge(model)
    >>> bool((model[0].base_layer.packed == before).all())
    True
    """
    for _, _, wrapper in wrapped_layers(pipeline_or_module):
        if wrapper.merged:
            wrapper.unmerge()


def unload(pipeline_or_module: Any) -> None:
    """Take all LoRAs out of the model. Those that are merged stay in the weights for good.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style")
    >>> difloat.lora.unload(model)
    >>> model
    Sequential(
      (0): Linear(in_features=16, out_features=16, bias=True)
    )
    """
    from diffusers.loaders import PeftAdapterMixin

    for module in components(pipeline_or_module).values():
        if any(is_wrapper(layer) for layer in module.modules()):
            # Its body asks nothing of the class; DiT and PixArt, which diffusers gives no LoRA methods, take it too.
            PeftAdapterMixin.unload_lora(module)  # type: ignore[arg-type]


def _denoiser(pipeline_or_module: Any) -> tuple[str, nn.Module]:
    if isinstance(pipeline_or_module, nn.Module):
        return "", pipeline_or_module
    from difloat.calibration.collect import denoiser_of

    return denoiser_of(pipeline_or_module)


def _inject(module: nn.Module, stored: Stored, prefix: str, name: str) -> None:
    """Put a LoRA with PEFT's keys into a module, or raise a ValueError if it is none or does not fit."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    state, config = stored.for_peft(module, prefix)
    inject_adapter_in_model(config, module, name, state_dict=state)
    set_peft_model_state_dict(module, state, name)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = True  # type: ignore[assignment]

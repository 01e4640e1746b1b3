"""LoRA on quantized models: loading, weighting, merging, saving.

Everything that diffusers and PEFT offer works on quantized layers too; the functions here do the same for every model, also
those that diffusers gives no LoRA methods (PixArt, HunyuanDiT, DiT), and say what merging cost. They take a pipeline or a
module.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from difloat.cache_entries import whole_file
from difloat.layers import install
from difloat.layers.packed import QuantizedLayer, when_first_made

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = (
    "lora_adapter_metadata"  # key of a safetensors header under which diffusers keeps the configuration
)
_FACTOR = re.compile(r"\.lora_(A|B)\.(weight|bias)$")


def on_wrapped(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Hook of torch, called whenever a module gets a child: lets wrappers of PEFT know packed weights.

    Raises:
        ValueError: if the wrapper is of a method that needs the float weight.
    """
    if name == "base_layer" and isinstance(child, QuantizedLayer) and _is_wrapper(parent):
        from difloat.lora.peft_layers import adopt

        adopt(parent)


# Nothing is hung on torch by importing difloat: without a packed layer there is nothing to look out for.
when_first_made.append(partial(register_module_module_registration_hook, on_wrapped))


def load(
    pipeline_or_module: Any, source: str | os.PathLike[str], name: str = "default", weight: float = 1.0
) -> None:
    """Load a LoRA and use it beside those that are in use.

    A pipeline with `load_lora_weights` does it by that, so every dialect is read that diffusers reads. For other pipelines and
    for modules the keys must be those of PEFT, `<layer>.lora_A.weight`, with any one prefix before the names of the denoiser's
    layers (the component's name, `diffusion_model.`, `base_model.model.`) or none. Keys with another prefix than the
    component's name are read so in every pipeline.

    Args:
        pipeline_or_module: Float or quantized.
        source: A safetensors file, or a directory as diffusers or PEFT save it.
        name: How to call it; not taken yet.
        weight: Factor of its change.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name is taken, the file is no LoRA of this model, or a value in it is not finite; nothing is
            loaded then.
    """
    if name in (taken := loaded(pipeline_or_module)):
        raise ValueError(f"name of a LoRA must be new, got {name!r} beside {taken}; choose another")
    file = _file_of(Path(source))
    stored, header = _contents(file)
    in_use = weights(pipeline_or_module)
    component, module = _denoiser(pipeline_or_module)
    prefix = _prefix(stored, module)
    by_diffusers = hasattr(pipeline_or_module, "load_lora_weights") and file.name != _PEFT_FILE
    if by_diffusers and prefix in (None, f"{component}."):
        pipeline_or_module.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    else:
        _inject(module, file, header, stored, prefix or "", name)
    if name not in loaded(pipeline_or_module):
        raise ValueError(
            f"LoRA must be of this model, but {file.name} fits no layer of it; load it into its own"
        )
    set_weights(pipeline_or_module, {**in_use, name: weight})


def save(pipeline_or_module: Any, directory: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write a LoRA as diffusers does; float and quantized models of the same architecture load it. Returns the file.

    Args:
        pipeline_or_module: Of a pipeline every component's part of the LoRA is written, its name before the keys.
        directory: Made if it does not exist; a LoRA that is there is replaced.
        name: Of the LoRA; None if there is only one.

    Raises:
        ValueError: if there is no LoRA of that name.
    """
    from peft import get_peft_model_state_dict

    found = loaded(pipeline_or_module)
    if name is None and len(found) == 1:
        name = found[0]
    if name is None or name not in found:
        raise ValueError(f"name must be one of the loaded LoRAs {found}, got {name!r}; choose one")
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, module in _components(pipeline_or_module).items():
        configs: dict[str, Any] = getattr(module, "peft_config", {})
        if name not in configs:
            continue
        prefix = f"{component}." if component else ""
        own = get_peft_model_state_dict(module, adapter_name=name)
        state |= {prefix + key: tensor.detach().cpu().contiguous() for key, tensor in own.items()}
        settings = configs[name].to_dict()
        config |= {prefix + key: _plain(value) for key, value in settings.items()}
    target = Path(directory) / LORA_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", _METADATA: json.dumps(config, indent=2, sort_keys=True)}
    with whole_file(target) as partial:
        safetensors.torch.save_file(state, partial, metadata=header)
    return target


def set_weights(pipeline_or_module: Any, weights: Mapping[str, float]) -> None:
    """Use exactly these LoRAs, with these factors; none at all switches them off and keeps them loaded.

    Raises:
        ValueError: if one is not loaded, or LoRAs are merged, whose weights are fixed.
    """
    if unknown := sorted(weights.keys() - set(loaded(pipeline_or_module))):
        raise ValueError(
            f"LoRAs must be loaded before they are used, got {unknown}; load them with difloat.lora.load"
        )
    wrappers = list(_wrappers(pipeline_or_module))
    if any(wrapper.merged for _, _, wrapper in wrappers):
        raise ValueError(
            "LoRAs must not be merged to change their weights, got merged ones; unmerge them first"
        )
    for _, _, wrapper in wrappers:
        wrapper.enable_adapters(bool(weights))
        if weights:
            own = [name for name in weights if name in wrapper.scaling]
            wrapper.set_adapter(own)
            for name in own:
                wrapper.set_scale(name, weights[name])


def weights(pipeline_or_module: Any) -> dict[str, float]:
    """The LoRAs in use and their factors; what `set_weights` takes."""
    found: dict[str, float] = {}
    for _, _, wrapper in _wrappers(pipeline_or_module):
        if not wrapper.disable_adapters:
            for name in wrapper.active_adapters:
                if name in wrapper.scaling and name not in found:
                    now = wrapper.scaling[name]
                    wrapper.set_scale(name, 1.0)
                    found[name] = float(now / wrapper.scaling[name])
                    wrapper.scaling[name] = now
    return found


def loaded(pipeline_or_module: Any) -> list[str]:
    """Names of all adapters that are loaded, in use or not."""
    names: dict[str, None] = {}
    for _, _, wrapper in _wrappers(pipeline_or_module):
        for kind in wrapper.adapter_layer_names:
            names |= dict.fromkeys(getattr(wrapper, kind, ()))
    return list(names)


def merge(pipeline_or_module: Any, names: Sequence[str] | None = None) -> dict[str, float]:
    """Add LoRAs to the packed weights and round again, until `unmerge`; the model is as fast as without them then.

    Low-bit grids take small changes badly: where every weight moves by less than half a step, nothing arrives. To keep all
    of it, leave the LoRA unmerged, or merge it into the float model and quantize that.

    Args:
        pipeline_or_module: With LoRAs; both float and quantized layers are merged.
        names: Which; None for those in use.

    Returns:
        For every quantized layer what share of the change (its squared norm) survived rounding, by name.

    Raises:
        ValueError: if there is no such LoRA or a layer cannot take one (grouped convolutions); nothing is merged then.
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
        for prefix, name, wrapper in _wrappers(pipeline_or_module):
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
    """Undo `merge` (or `fuse_lora`): quantized layers get the very bytes back that they had; does nothing without."""
    for _, _, wrapper in _wrappers(pipeline_or_module):
        if wrapper.merged:
            wrapper.unmerge()


def unload(pipeline_or_module: Any) -> None:
    """Take all LoRAs out of the model; what is merged stays in the weights, for good."""
    for module in _components(pipeline_or_module).values():
        found = [(name, layer) for name, layer in module.named_modules() if _is_wrapper(layer)]
        for name, wrapper in found:
            install.replace(module, name, wrapper.get_base_layer())
        if found and hasattr(module, "peft_config"):
            del module.peft_config
        if found and hasattr(module, "_hf_peft_config_loaded"):
            module._hf_peft_config_loaded = False  # type: ignore[assignment]


def refuse(pipeline_or_module: Any, purpose: str) -> None:
    """ValueError if adapters are loaded: their wrappers hide the layers that a plan names."""
    if found := loaded(pipeline_or_module):
        raise ValueError(
            f"model must have no adapters to be {purpose}, got {found}; call fuse_lora (if they shall stay in the weights) "
            "and unload_lora_weights first"
        )


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around another; without PEFT imported there are none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def _components(pipeline_or_module: Any) -> dict[str, nn.Module]:
    """Modules of a pipeline by name; a module on its own under the empty one."""
    if isinstance(pipeline_or_module, nn.Module):
        return {"": pipeline_or_module}
    return {n: c for n, c in pipeline_or_module.components.items() if isinstance(c, nn.Module)}


def _wrappers(pipeline_or_module: Any) -> Iterator[tuple[str, str, Any]]:
    """Every wrapped layer: prefix of its component, its name, the wrapper."""
    for component, module in _components(pipeline_or_module).items():
        for name, layer in module.named_modules():
            if _is_wrapper(layer):
                yield f"{component}." if component else "", name, layer


def _denoiser(pipeline_or_module: Any) -> tuple[str, nn.Module]:
    if isinstance(pipeline_or_module, nn.Module):
        return "", pipeline_or_module
    from difloat.calibration.collect import denoiser_of

    return denoiser_of(pipeline_or_module)


def _file_of(source: Path) -> Path:
    candidates = [source] if source.is_file() else [source / LORA_FILE, source / _PEFT_FILE]
    for file in candidates:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"LoRA must be a safetensors file or a directory with {LORA_FILE} or {_PEFT_FILE}, got {str(source)!r}; check the path"
    )


def _contents(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a LoRA's file; ValueError if one is not finite, which every picture would be then."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    else:
        stored, header = torch.load(file, map_location="cpu", weights_only=True), {}
    for key, tensor in stored.items():
        if (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and not bool(tensor.float().isfinite().all())
        ):
            raise ValueError(
                f"LoRA must hold finite numbers, got NaN or Inf in {key!r:.200} of {file.name}; download it again or train "
                "it with a lower rate"
            )
    return stored, header


def _prefix(stored: Mapping[str, Tensor], module: nn.Module) -> str | None:
    """What stands before the layers' names in all keys of a LoRA; None if they are not all PEFT's, of layers of `module`."""
    inside = {name for name, _ in module.named_modules() if name}
    targets = {_FACTOR.sub("", key) for key in stored}
    if not stored or any(_FACTOR.search(key) is None for key in stored):
        return None
    words = min(targets, key=len).split(".")
    prefixes = ["".join(f"{word}." for word in words[:count]) for count in range(len(words))]
    return next(
        (p for p in prefixes if all(t.startswith(p) and t[len(p) :] in inside for t in targets)), None
    )


def _inject(
    module: nn.Module,
    file: Path,
    header: Mapping[str, str],
    stored: Mapping[str, Tensor],
    prefix: str,
    name: str,
) -> None:
    """Put a LoRA of PEFT's keys into a module; ValueError if it is none or does not fit."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    state = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    inside = dict(module.named_modules())
    for key in state:
        target = _FACTOR.sub("", key)
        if target == key:
            raise ValueError(
                f"LoRA must have keys like '<layer>.lora_A.weight', got {key!r:.200}; convert it with diffusers first"
            )
        if target not in inside:
            raise ValueError(
                f"LoRA must be of this model, but {target!r:.200} is no layer of it, whatever of it is taken for a prefix; "
                "load it into its own"
            )
    if not state:
        raise ValueError(f"LoRA must hold tensors, got none in {str(file)!r}; download it again")
    inject_adapter_in_model(_config_of(file, header, prefix, state), module, name, state_dict=state)
    set_peft_model_state_dict(module, state, name)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = True  # type: ignore[assignment]


def _config_of(file: Path, header: Mapping[str, str], prefix: str, state: Mapping[str, Tensor]) -> Any:
    """PEFT's configuration of a LoRA: from the header, beside the file, or from the shapes with all factors 1."""
    from peft import LoraConfig

    if _METADATA in header:
        settings = {key.removeprefix(prefix): value for key, value in json.loads(header[_METADATA]).items()}
        return LoraConfig(**settings)
    if (file.parent / _PEFT_CONFIG).is_file():
        return LoraConfig.from_pretrained(str(file.parent))
    ranks = {_FACTOR.sub("", key): len(tensor) for key, tensor in state.items() if ".lora_A." in key}
    exact = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}
    return LoraConfig(
        target_modules=sorted(ranks),
        rank_pattern=exact,
        alpha_pattern=dict(exact),
        lora_bias=any(key.endswith(".lora_B.bias") for key in state),
    )


def _plain(value: Any) -> Any:
    """What JSON can hold, as diffusers writes it."""
    return sorted(value) if isinstance(value, set) else value

"""The layers that PEFT wraps around others: finding them, reading their adapters, and teaching them packed weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from difloat.layers.packed import QuantizedLayer, when_first_made


def on_wrapped(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Let a wrapper of PEFT know packed weights. Torch calls this hook whenever a module gets a child.

    Raises:
        ValueError: if the wrapper is of a method that needs the float weight.
    """
    if name == "base_layer" and isinstance(child, QuantizedLayer) and is_wrapper(parent):
        from difloat.lora.peft_layers import adopt

        adopt(parent)


# Nothing is hung on torch by importing difloat: without a packed layer there is nothing to look out for.
when_first_made.append(partial(register_module_module_registration_hook, on_wrapped))


def components(pipeline_or_module: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name. A module on its own has the empty name."""
    if isinstance(pipeline_or_module, nn.Module):
        return {"": pipeline_or_module}
    return {n: c for n, c in pipeline_or_module.components.items() if isinstance(c, nn.Module)}


def wrapped_layers(pipeline_or_module: Any) -> Iterator[tuple[str, str, Any]]:
    """Every wrapped layer, as the prefix of its component, its name, and the wrapper."""
    for component, module in components(pipeline_or_module).items():
        for name, layer in module.named_modules():
            if is_wrapper(layer):
                yield f"{component}." if component else "", name, layer


def loaded(pipeline_or_module: Any) -> list[str]:
    """The names of all adapters that are loaded, whether they are in use or not.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> difloat.lora.loaded(peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style"))
    ['style']
    """
    names: dict[str, None] = {}
    for _, _, wrapper in wrapped_layers(pipeline_or_module):
        for kind in wrapper.adapter_layer_names:
            names |= dict.fromkeys(getattr(wrapper, kind, ()))
    return list(names)


def weights(pipeline_or_module: Any) -> dict[str, float]:
    """The LoRAs in use and their factors, as `set_weights` takes them.

    >>> import difloat, peft
    >>> config = peft.LoraConfig(target_modules=["0"], r=2)
    >>> difloat.lora.weights(peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(16, 16)), "style"))
    {'style': 1.0}
    """
    found: dict[str, float] = {}
    for _, _, wrapper in wrapped_layers(pipeline_or_module):
        if not wrapper.disable_adapters:
            for name in wrapper.active_adapters:
                if name in wrapper.scaling and name not in found:
                    # PEFT keeps weight times alpha / rank only, so the weight is found by setting it to 1 for a moment.
                    now = wrapper.scaling[name]
                    wrapper.set_scale(name, 1.0)
                    found[name] = float(now / wrapper.scaling[name])
                    wrapper.scaling[name] = now
    return found


def refuse(pipeline_or_module: Any, purpose: str) -> None:
    """Raise a ValueError if adapters are loaded, whose wrappers hide the layers that a plan names."""
    if found := loaded(pipeline_or_module):
        raise ValueError(
            f"model must have no adapters to be {purpose}, got {found}; call fuse_lora (if they shall stay in the weights) "
            "and unload_lora_weights first"
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around another. Without PEFT imported there is none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)

"""Layers that PEFT wrapped around others: which there are, what they hold, and how they get to know packed weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from difloat.layers.packed import QuantizedLayer, when_first_made


def on_wrapped(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Hook of torch, called whenever a module gets a child: lets wrappers of PEFT know packed weights.

    Raises:
        ValueError: if the wrapper is of a method that needs the float weight.
    """
    if name == "base_layer" and isinstance(child, QuantizedLayer) and is_wrapper(parent):
        from difloat.lora.peft_layers import adopt

        adopt(parent)


# Nothing is hung on torch by importing difloat: without a packed layer there is nothing to look out for.
when_first_made.append(partial(register_module_module_registration_hook, on_wrapped))


def components(pipeline_or_module: Any) -> dict[str, nn.Module]:
    """Modules of a pipeline by name; a module on its own under the empty one."""
    if isinstance(pipeline_or_module, nn.Module):
        return {"": pipeline_or_module}
    return {n: c for n, c in pipeline_or_module.components.items() if isinstance(c, nn.Module)}


def wrapped_layers(pipeline_or_module: Any) -> Iterator[tuple[str, str, Any]]:
    """Every wrapped layer: prefix of its component, its name, the wrapper."""
    for component, module in components(pipeline_or_module).items():
        for name, layer in module.named_modules():
            if is_wrapper(layer):
                yield f"{component}." if component else "", name, layer


def loaded(pipeline_or_module: Any) -> list[str]:
    """Names of all adapters that are loaded, in use or not."""
    names: dict[str, None] = {}
    for _, _, wrapper in wrapped_layers(pipeline_or_module):
        for kind in wrapper.adapter_layer_names:
            names |= dict.fromkeys(getattr(wrapper, kind, ()))
    return list(names)


def weights(pipeline_or_module: Any) -> dict[str, float]:
    """The LoRAs in use and their factors; what `set_weights` takes."""
    found: dict[str, float] = {}
    for _, _, wrapper in wrapped_layers(pipeline_or_module):
        if not wrapper.disable_adapters:
            for name in wrapper.active_adapters:
                if name in wrapper.scaling and name not in found:
                    now = wrapper.scaling[name]
                    wrapper.set_scale(name, 1.0)
                    found[name] = float(now / wrapper.scaling[name])
                    wrapper.scaling[name] = now
    return found


def refuse(pipeline_or_module: Any, purpose: str) -> None:
    """ValueError if adapters are loaded: their wrappers hide the layers that a plan names."""
    if found := loaded(pipeline_or_module):
        raise ValueError(
            f"model must have no adapters to be {purpose}, got {found}; call fuse_lora (if they shall stay in the weights) "
            "and unload_lora_weights first"
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around another; without PEFT imported there are none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)

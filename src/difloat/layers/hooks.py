"""Changes that other libraries make to a model: hooks of torch, diffusers and accelerate, new `forward`s, computed weights.

Methods run copies of a model that share its tensors (`install.shadow`). A chain of hooks that is copied still calls the modules
it was made for, so a copy with other layers would compute without them, unnoticed. So every kind of hook is known here, and is
kept, left out or refused.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from difloat.layers import offloading
from difloat.layers.quantizable import quantizable
from difloat.layers.timestep_clock import Clock

# The ways out for hooks of diffusers that are no caches.
_REMEDIES = {
    "GroupOffloadingHook": "quantize it before enable_group_offload",
    "LayerExecutionTrackerHook": "quantize it before enable_group_offload",
    "LazyPrefetchGroupOffloadingHook": "quantize it before enable_group_offload",
    "LayerwiseCastingHook": "load it without layerwise casting and quantize that",
    "ContextParallelSplitHook": "quantize it before enable_parallelism",
    "ContextParallelGatherHook": "quantize it before enable_parallelism",
}
_TORCH = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CARRIED = (
    *_TORCH,
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def check(model: nn.Module) -> None:
    """Refuse a model that computes something else than its modules say, or that does not hold its weights itself.

    Raises:
        ValueError: if a cache of diffusers is enabled, weights are offloaded or cast by hooks, a weight is computed
            (`parametrize`, `weight_norm`, `prune`), or a `forward` was put on an instance.
    """
    layers = quantizable(model)
    for name, module in model.named_modules():
        where = f"{name!r}" if name else "the model itself"
        for hook in offloading.of_diffusers(module).values():
            kind = type(hook).__name__
            raise ValueError(
                f"model must be free of diffusers' hooks to be quantized, got {kind} at {where}; "
                f"{_REMEDIES.get(kind, 'call disable_cache(), or remove the hook, and enable it again afterwards')}"
            )
        for hook in offloading.of_accelerate(module):
            if not _harmless(hook, model is module):
                raise ValueError(
                    f"model must hold its weights itself to be quantized, got {type(hook).__name__} of accelerate at "
                    f"{where}; call remove_all_hooks() of the pipeline, or quantize before offloading"
                )
        if not _own_forward(module, name in layers):
            raise ValueError(
                f"{where} must compute by the forward of its class to be quantized, got one that was set on the instance; "
                "quantize before torch.compile, or delete it, or write a subclass"
            )
    for name, layer in layers.items():
        computed = [
            key for key in ("weight", "bias") if getattr(layer, key, None) is not layer._parameters.get(key)
        ]
        if computed:
            raise ValueError(
                f"layers must have plain parameters to be quantized, but the {computed[0]} of {name!r} is computed; call "
                "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove"
            )
        if layer.weight.is_meta:
            raise ValueError(
                f"weights must be in memory to be quantized, but {name!r} is on the meta device; load without offloading"
            )


def shared(model: nn.Module) -> dict[int, Any]:
    """The hooks that a copy of a model shares with it, as a memo for deepcopy. Hooks bound to its modules are not shared."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in (hook for kind in _TORCH for hook in getattr(module, kind).values()):
            if not isinstance(hook, Clock | types.MethodType):
                memo[id(hook)] = hook
        for name in ("_hf_hook", "_diffusers_hook"):
            if name in vars(module):
                memo[id(vars(module)[name])] = vars(module)[name]
    return memo


def strip(model: nn.Module) -> None:
    """Take hooks about the place of weights, which `check` lets pass, out of a copy, in place."""
    for module in model.modules():
        own = vars(module)
        own.pop("_diffusers_hook", None)
        if own.pop("_hf_hook", None) is not None:
            for name in ("_old_forward", "forward"):
                own.pop(name, None)


def carried(model: nn.Module) -> bool:
    """Whether `strip` would change a copy of `model`."""
    return any({"_hf_hook", "_diffusers_hook"} & vars(module).keys() for module in model.modules())


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Let torch's hooks of a layer go on with the layer that takes its place. Their handles still remove them."""
    for name in _CARRIED:
        setattr(new, name, getattr(old, name))


def _harmless(hook: Any, at_top: bool) -> bool:
    """Whether a hook of accelerate only moves the whole model, or its inputs, between devices."""
    kind = type(hook).__name__
    return at_top and (kind == "CpuOffload" or (kind == "AlignDevicesHook" and not hook.offload))


def _own_forward(module: nn.Module, is_layer: bool) -> bool:
    """Whether a module computes by its class's forward, or by a method that a copy would bind to itself."""
    if "forward" not in vars(module):
        return True
    forward = vars(module).get("_old_forward", vars(module)["forward"])
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    return forward.__func__ is type(module).forward or not (is_layer or "_old_forward" in vars(module))

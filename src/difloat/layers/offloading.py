"""Offloading and casting hooks, which are taken off a model while it is quantized, and put back afterwards.

`enable_model_cpu_offload`, `enable_sequential_cpu_offload`, `enable_group_offload` and layerwise casting of diffusers all wrap
`forward`. A copy of such a model would call the original, and its weights are not where they seem. So the hooks are off for the
time of the work, and the weights are plain parameters. Afterwards the same kind of hook holds the layers that are there then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from difloat.layers.packed import QuantizedLayer

# The names of hooks in diffusers.
_GROUPS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
_CASTING = "layerwise_casting"
_WRAPPED = ("_hf_hook", "_old_forward", "forward")


def onload_device(module: nn.Module) -> torch.device | None:
    """The device where the hooks of a module bring its weights or inputs when it is called, or None without such hooks."""
    for part in module.modules():
        for hook in [*of_accelerate(part), *of_diffusers(part).values()]:
            config = getattr(hook, "config", None)
            for found in (getattr(hook, "execution_device", None), getattr(config, "onload_device", None)):
                if found is not None:
                    return torch.device(found)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of a module are moved by hooks."""
    return _whole(module) or _sequential(module) is not None or _grouped(module) is not None


def of_diffusers(module: nn.Module) -> dict[str, Any]:
    """The hooks of diffusers at this very module, by name."""
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else dict(registry.hooks)


def of_accelerate(module: nn.Module) -> list[Any]:
    """The hooks of accelerate at this very module."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


@contextmanager
def lifted(model: nn.Module, *, onload: bool = False) -> Iterator[None]:
    """Let a model hold its weights itself inside a ``with`` block, in the dtype that it computes in.

    Afterwards hooks of the same kind hold them again. Layers may be replaced inside. Hooks of an unknown kind stay, and
    `hooks.check` names them. Layers that are quantized inside are not cast any more, since they are smaller than casting
    makes them.

    Args:
        model: A module. Without hooks nothing happens.
        onload: Whether the whole model is brought to the device where it computes for that time, and back afterwards.
    """
    there = onload_device(model)
    with ExitStack() as stack:
        if _whole(model):
            stack.enter_context(_without_wrapper(model))
        elif (hook := _sequential(model)) is not None:
            stack.callback(_take_sequential(model, hook))
        elif (config := _grouped(model)) is not None:
            stack.callback(_take_groups(model, config))
        stack.enter_context(_uncast(model))
        _tidy(model)
        if onload and there is not None:
            stack.enter_context(_on(model, there))
        yield


@contextmanager
def all_lifted(pipeline_or_module: Any) -> Iterator[None]:
    """`lifted` for a module, or for every module of a pipeline at once."""
    one = isinstance(pipeline_or_module, nn.Module)
    parts = [pipeline_or_module] if one else list(getattr(pipeline_or_module, "components", {}).values())
    with ExitStack() as stack:
        for part in parts:
            if isinstance(part, nn.Module):
                stack.enter_context(lifted(part))
        yield


def _tidy(model: nn.Module) -> None:
    """Take away what hooks leave behind, which a layer that takes another's place would go on with."""
    for part in model.modules():
        own = vars(part)
        if "_diffusers_hook" in own and not own["_diffusers_hook"].hooks:
            del own["_diffusers_hook"]
        forward = own.get("forward")
        if getattr(forward, "__self__", None) is part and forward.__func__ is type(part).forward:  # type: ignore[union-attr]
            del own["forward"]


def _whole(model: nn.Module) -> bool:
    """Whether hooks of accelerate at the top only move the model as a whole, or its inputs."""
    hooks = of_accelerate(model)
    fine = all(
        type(hook).__name__ == "CpuOffload"
        or (type(hook).__name__ == "AlignDevicesHook" and not hook.offload)
        for hook in hooks
    )
    return (
        bool(hooks) and fine and not any(of_accelerate(part) for part in model.modules() if part is not model)
    )


def _sequential(model: nn.Module) -> Any:
    """One of the hooks of `accelerate.cpu_offload` on the whole model. None if there are none, or others, or a disk's."""
    hooks = [hook for part in model.modules() for hook in of_accelerate(part)]
    if any(type(hook).__name__ != "AlignDevicesHook" for hook in hooks) or not of_accelerate(model):
        return None
    away = [hook for hook in hooks if hook.offload]
    alike = {(str(hook.execution_device), hook.offload_buffers) for hook in away}
    in_memory = all(isinstance(getattr(hook.weights_map, "dataset", None), dict) for hook in away)
    waiting = [hook for hook in hooks if not hook.offload and not hook.io_same_device]
    return away[0] if len(alike) == 1 and in_memory and not waiting else None


def _grouped(model: nn.Module) -> Any:
    """The settings of `apply_group_offloading` on the whole model. None if there are none, or several, or a disk's."""
    found = [
        hook.config
        for part in model.modules()
        for name, hook in of_diffusers(part).items()
        if name == _GROUPS[0]
    ]
    same = all(config is found[0] for config in found)
    return found[0] if found and same and found[0].offload_to_disk_path is None else None


@contextmanager
def _without_wrapper(model: nn.Module) -> Iterator[None]:
    own = vars(model)
    kept = {name: own.pop(name) for name in _WRAPPED if name in own}
    old = kept.get("_old_forward")
    if old is not None and getattr(old, "__func__", None) is not type(model).forward:
        own["forward"] = old  # somebody else's, and `hooks.check` says whose
    try:
        yield
    finally:
        own.update(kept)


def _take_sequential(model: nn.Module, hook: Any) -> Callable[[], object]:
    """Take the hooks off, and return a function that puts them back."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    whole = {type(part).__name__ for part in model.modules() if _preloads(part)}
    device, buffers = hook.execution_device, hook.offload_buffers
    remove_hook_from_module(model, recurse=True)
    return lambda: cpu_offload(
        model, device, offload_buffers=buffers, preload_module_classes=sorted(whole) or None
    )


def _preloads(part: nn.Module) -> bool:
    return any(hook.offload and hook.place_submodules for hook in of_accelerate(part))


def _take_groups(model: nn.Module, config: Any) -> Callable[[], object]:
    """Take the hooks off, and return a function that puts them back."""
    from diffusers.hooks import HookRegistry, apply_group_offloading

    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in _GROUPS:
        registry.remove_hook(name, recurse=True)
    model.to(config.offload_device)  # a group that was used last can still be where it computes
    names = ("offload_type", "num_blocks_per_group", "non_blocking", "record_stream", "low_cpu_mem_usage")
    lists = ("block_modules", "exclude_kwargs")
    settings = {name: getattr(config, name) for name in (*names, *lists)}
    settings |= {"use_stream": config.stream is not None}
    return lambda: apply_group_offloading(model, config.onload_device, config.offload_device, **settings)


@contextmanager
def _uncast(model: nn.Module) -> Iterator[None]:
    """Switch layerwise casting off: every weight has the dtype that it is computed in, with the value that is stored."""
    cast: list[tuple[nn.Module, Any, dict[str, Tensor]]] = []
    try:
        for part in model.modules():
            hook = of_diffusers(part).get(_CASTING)
            if hook is not None and type(hook).__name__ == "LayerwiseCastingHook":
                stored = {name: tensor.data for name, tensor in _tensors(part)}
                cast.append((part, hook, stored))
                # The one of diffusers only warns that precision was lost, which `_cast_again` makes up for.
                hook.deinitalize_hook = lambda module: module
                vars(part)["_diffusers_hook"].remove_hook(_CASTING, recurse=False)
                del hook.deinitalize_hook
                part.to(hook.compute_dtype)
        yield
    finally:
        present = {id(part) for part in model.modules()}
        for part, hook, stored in cast:
            if id(part) in present and not isinstance(part, QuantizedLayer):
                _cast_again(part, hook, stored)


def _cast_again(part: nn.Module, hook: Any, stored: dict[str, Tensor]) -> None:
    from diffusers.hooks import HookRegistry

    for name, tensor in _tensors(part):
        # The stored tensor comes back as it was, also where the dtype of computing is the narrower one.
        tensor.data = stored[name].to(tensor.device)
    HookRegistry.check_if_exists_or_initialize(part).register_hook(hook, _CASTING)


def _tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    return [*part.named_parameters(), *part.named_buffers()]


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model on a device inside a ``with`` block, and back afterwards."""
    before = next((tensor.device for tensor in model.parameters()), device)
    model.to(device)
    try:
        yield
    finally:
        model.to(before)

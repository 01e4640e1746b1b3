"""Devices: their names, the device of a model or pipeline, moving it there, and its random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from difloat.layers import offloading
from difloat.pipelines import denoiser_of

_PREFERRED = ("cuda", "xpu", "mps")
_NAMES = "auto, cpu, cuda, cuda:1 and so on, xpu or mps"


def resolve(name: torch.device | str) -> torch.device:
    """The device of a name such as "cpu", "cuda", "cuda:1", "xpu" or "mps".

    >>> resolve("cpu")
    device(type='cpu')

    "auto" is the first of CUDA, XPU, MPS and CPU that is here. Any other accelerator that torch itself knows is taken by its
    name as well.

    Raises:
        ValueError: if there is no such device, or not on this machine.
    """
    if name == "auto":
        return torch.device(next((kind for kind in _PREFERRED if _count(kind)), "cpu"))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be one of {_NAMES}, got {name!r}; choose one of these") from None
    found = torch.accelerator.current_accelerator()
    known = {"cpu", *_PREFERRED} | ({found.type} if found is not None else set())
    if device.type not in known:
        raise ValueError(f"device must be one of {_NAMES}, got {name!r}; choose one of these")
    if (device.index or 0) >= _count(device.type):
        here = [kind for kind in sorted(known) if _count(kind)]
        counted = ", ".join(
            kind if _count(kind) == 1 else f"{kind} (0 to {_count(kind) - 1})" for kind in here
        )
        raise ValueError(
            f"device must be one that torch finds on this machine, got {str(name)!r} where there are {counted}; "
            "choose one of these, or install a torch built for it"
        )
    return device


def home(model: Any) -> torch.device:
    """The device that a module or pipeline computes on: where its hooks bring it if offloaded, else that of its parameters.

    Modules without parameters compute on the CPU.
    """
    if not isinstance(model, nn.Module):
        own = getattr(model, "_execution_device", None)
        return home(denoiser_of(model)[1]) if own is None else torch.device(own)
    there = offloading.onload_device(model)
    if there is not None:
        return there
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def move(model: Any, device: torch.device | str | None) -> Any:
    """Put a module or pipeline on a device, where it stays, and return it. None leaves it where it is.

    An offloaded one comes to its device by itself, and stays offloaded if that is the device.

    Raises:
        ValueError: if there is no such device, or offloading computes on another one.
    """
    if device is None:
        return model
    wanted = resolve(device)
    modules = [model] if isinstance(model, nn.Module) else list(model.components.values())
    if any(isinstance(part, nn.Module) and offloading.is_offloaded(part) for part in modules):
        now = home(model)
        if now.type != wanted.type or wanted.index not in (None, now.index or 0):
            raise ValueError(
                f"an offloaded model must stay on the device that it is offloaded from, {now}, got {str(device)!r}; leave "
                "device out, or call remove_all_hooks() of the pipeline before"
            )
        return model
    return model.to(wanted)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU and on a device inside a ``with`` block, and restore them afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if device.type in ("cpu", "meta"):
            yield
            return
        module: Any = torch.get_device_module(device)
        which = () if device.type == "mps" else (device,)  # torch.mps knows one device only
        before = module.get_rng_state(*which)
        try:
            with module.device(device) if hasattr(module, "device") else nullcontext():
                module.manual_seed(seed)
            yield
        finally:
            module.set_rng_state(before, *which)


def _count(kind: str) -> int:
    """The number of devices of a kind on this machine."""
    if kind == "cpu":
        return 1
    module: Any = torch.get_device_module(kind)
    return int(module.device_count()) if module.is_available() else 0

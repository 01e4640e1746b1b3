"""A model on the meta device gets the layers of a plan, before the loader of diffusers or transformers fills them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from difloat.checkpoint.layout import CheckpointError, check_stored
from difloat.layers import attention, install, packed
from difloat.layers.packed import QuantizedLayer
from difloat.layers.timestep_clock import Clock
from difloat.plan.plan import LayerPlan, Plan


def allocate(model: nn.Module, plan: Plan) -> None:
    """Swap every planned layer for an empty quantized one, in place.

    Raises:
        CheckpointError: if the plan is of another model.
    """
    modules = dict(model.named_modules())
    for name, layer_plan in plan.layers.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear | nn.Conv2d) or tuple(old.weight.shape) != layer_plan.shape:
            raise CheckpointError(
                f"plan must fit {type(model).__name__}, but {name!r:.200} of shape {layer_plan.shape} is no layer of it; "
                "config.json is of another model"
            )
        layer = packed.empty_like(old)
        install.swap(model, name, layer)
        layer.allocate(layer_plan, "meta")
    finish(model, plan)


def finish(model: nn.Module, plan: Plan) -> None:
    """What a plan says besides its layers: quantized attention, and the clock that layers read the timestep off."""
    attention.install(model, plan.attention)
    if plan.timesteps:
        install.set_clock(model, Clock(model, plan.timesteps))


def cast_in_float32(model: nn.Module, kept: Collection[str]) -> None:
    """Layers that cast their input do so to float32 where their float weight would be loaded as that: parts of names."""
    for name, module in model.named_modules():
        if (
            isinstance(module, QuantizedLayer)
            and module.input_dtype is not None
            and set(kept) & set(name.split("."))
        ):
            module.input_dtype = torch.float32


def check_names(model: nn.Module, found: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuse a checkpoint with other tensors than the model's, which a loader would leave empty or drop with a warning.

    Raises:
        CheckpointError: if one is missing or one too many.
    """
    expected = set(model.state_dict())
    for wrong, what in (
        (expected - set(found) - set(optional), "missing"),
        (set(found) - expected, "one too many"),
    ):
        if wrong:
            raise CheckpointError(
                f"checkpoint must hold the tensors of {type(model).__name__}, but {min(wrong)!r:.200} is {what}; "
                "download or save it again"
            )


def place(model: nn.Module, name: str, value: Tensor, device: torch.device | str) -> None:
    """Put one stored tensor (uint8 or float32) into its layer. CheckpointError if it is a vector that cannot be right."""
    layer_name, _, key = name.rpartition(".")
    layer = model.get_submodule(layer_name)
    assert isinstance(layer, QuantizedLayer)
    if key == "weight":
        layer.hold(value.to(device))
        return
    expected = getattr(layer, key)
    if value.shape != expected.shape:
        raise CheckpointError(
            f"tensor {name!r:.200} must have the shape {list(expected.shape)}, got {list(value.shape)}; "
            "download or save it again"
        )
    check_stored(name, layer, value)
    setattr(layer, key, value.to(device))


def without_values(plan: LayerPlan) -> LayerPlan:
    """The plan with its tensors on the meta device: shapes and dtypes only."""
    return replace(plan, tensors={name: tensor.to("meta") for name, tensor in plan.tensors.items()})


def as_stored(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is written: packed weights of the plan as uint8, which some layers hold as int8, and each layer once.

    A layer that is registered under two names has its tensors in the state dict twice; the plan knows the first name.
    """
    weights = {f"{name}.weight" for name in plan.layers}
    planned = {state[name].data_ptr(): name for name in weights if name in state}
    again = {
        name.removesuffix("weight")
        for name, tensor in state.items()
        if name not in weights and name.endswith(".weight") and tensor.data_ptr() in planned
    }
    return {
        name: tensor.view(torch.uint8) if name in weights and tensor.dtype == torch.int8 else tensor
        for name, tensor in state.items()
        if f"{name.rpartition('.')[0]}." not in again
    }


def other_names(model: nn.Module, plan: Plan) -> set[str]:
    """Names in the model's state dict that planned layers have besides those in the plan, being registered twice."""
    modules = dict(model.named_modules(remove_duplicate=False))
    planned = {id(modules[name]) for name in plan.layers if name in modules}
    again = {name for name, module in modules.items() if id(module) in planned and name not in plan.layers}
    return {name for name in model.state_dict() if name.rpartition(".")[0] in again}

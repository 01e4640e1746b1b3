"""How a model gets quantized layers and loses them again: plans carried out and undone, swaps, copies that share tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from difloat import torch_modes
from difloat.layers import attention, dtype_readers, hooks
from difloat.layers.low_rank_branch import product
from difloat.layers.packed import QuantConv2d, QuantizedLayer, QuantLinear, empty_like, quantizable, weight_of
from difloat.layers.quantizable import places
from difloat.layers.timestep_clock import Clock
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerPlan, Plan


def shadow(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer, so that layers can be swapped in the copy only.

    Hooks of torch act on the copy too. Tensors made in inference mode are copied, as autograd refuses them.

    Args:
        model: The model, which stays as it is.
        frozen: Whether the copy's parameters are views that need no gradient.

    Raises:
        ValueError: if the model has hooks whose copies would compute with the model itself (`hooks.check`).
    """
    hooks.check(model)
    # deepcopy takes what its memo holds instead of copying it.
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo = hooks.shared(model) | {id(tensor): tensor for tensor in tensors}
    memo |= {id(t): torch_modes.normal(t) for t in model.buffers() if t.is_inference()}
    for parameter in model.parameters():
        if frozen or parameter.is_inference():
            wanted = parameter.requires_grad and not frozen
            memo[id(parameter)] = nn.Parameter(torch_modes.normal(parameter).detach(), requires_grad=wanted)
    twin = copy.deepcopy(model, memo)
    hooks.strip(twin)
    return twin


def workable(model: nn.Module) -> nn.Module:
    """The model itself, or its `shadow` where it has hooks about devices, or tensors made in inference mode."""
    tensors = [*model.parameters(), *model.buffers()]
    return shadow(model) if hooks.carried(model) or any(t.is_inference() for t in tensors) else model


def leave_inference_mode(model: nn.Module) -> None:
    """Replace tensors of quantized layers that were made in inference mode by ones that autograd accepts, in place."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.is_inference():
                    wanted = parameter.requires_grad
                    setattr(layer, name, nn.Parameter(torch_modes.normal(parameter), requires_grad=wanted))
            for name, buffer in layer.named_buffers(recurse=False):
                setattr(layer, name, torch_modes.normal(buffer))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name of a model, and wherever else the module of that name is registered."""
    for parent, child in places(model, name):
        setattr(parent, child, module)


def install(model: nn.Module, name: str, plan: LayerPlan, device: torch.device | str | None = None) -> None:
    """Swap one float or quantized layer of a model for a quantized one, in place.

    Args:
        model: The model.
        name: The dotted name of the layer.
        plan: The formats, scales and codes of the layer.
        device: Where the new layer is put, or None for the device of the old one.

    Raises:
        ValueError: if there is no such layer or its shape is another one.
    """
    layers = dict(model.named_modules())
    old = layers.get(name)
    if not isinstance(old, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"plan must name linear or convolution layers of the model, got {name!r}; was it made for another model?"
        )
    shape = old.float_shape if isinstance(old, QuantizedLayer) else tuple(old.weight.shape)
    if shape != plan.shape:
        raise ValueError(
            f"layer {name!r} must have the planned shape {plan.shape}, got {shape}; use the model the plan was made for"
        )
    home = old.weight.device
    layer = empty_like(old)
    swap(model, name, layer)
    layer.load(plan, home if device is None else device)


def swap(model: nn.Module, name: str, layer: QuantLinear | QuantConv2d) -> None:
    """Put a quantized layer in the place of a layer. If the parent asks for the weight's dtype, it answers as that one did."""
    old = model.get_submodule(name)
    hooks.hand_over(old, layer)
    names = (other for other, module in model.named_modules(remove_duplicate=False) if module is old)
    if any(dtype_readers.use_of(model, other) for other in names):
        layer.answer_as(old.input_dtype if isinstance(old, QuantizedLayer) else weight_of(model, name).dtype)
    replace(model, name, layer)


@torch_modes.plain()
def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out a plan in place: swap every planned layer, quantize every planned attention, and return the model.

    Raises:
        ValueError: if the plan does not fit. The model is unchanged then.
    """
    check(model, plan)
    clock = Clock(model, plan.timesteps) if plan.timesteps else None
    for name, layer in plan.layers.items():
        install(model, name, layer)
    attention.install(model, plan.attention)
    if clock is not None:
        set_clock(model, clock)
    leave_inference_mode(model)
    return model


def check(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan of another model, and a model with hooks that would lose or keep its layers.

    Raises:
        ValueError: if the plan or a hook does not fit.
    """
    hooks.check(model)
    float_layers = quantizable(model)
    for name, layer in plan.layers.items():
        if name not in float_layers or tuple(float_layers[name].weight.shape) != tuple(layer.shape):
            raise ValueError(
                f"plan must fit the model, but {name!r} of shape {tuple(layer.shape)} is no float layer of it; "
                "use the model the plan was made for, not yet quantized"
            )
    attention.check(model, plan.attention)


def set_clock(model: nn.Module, clock: Clock) -> None:
    """Let the layers that depend on the timestep read it off a clock, which reads it off the model's calls."""
    remove_clock(model)
    model.register_forward_pre_hook(clock, with_kwargs=True)
    model.register_forward_hook(clock.leave, always_call=True)
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.plan().schedules:
            module.clock = clock


def clock_of(model: nn.Module) -> Clock | None:
    """The clock among the forward pre-hooks of a denoiser, or None."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Clock)), None)


def remove_clock(model: nn.Module) -> None:
    """Undo `set_clock`. Without a clock nothing happens."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, Clock):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, after in list(model._forward_hooks.items()):
        if isinstance(getattr(after, "__self__", None), Clock):
            del model._forward_hooks[key]
            model._forward_hooks_always_called.pop(key, None)


@contextmanager
def as_in_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Let layers that depend on the timestep be called alone inside a ``with`` block, as in a call with these arguments."""
    clock = clock_of(model)
    with nullcontext() if clock is None else clock.during(args, kwargs):
        yield


@torch_modes.plain()
def restore(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Turn every quantized layer back into a plain float layer with the dequantized weight, in place, and return the model.

    A low-rank pair is added to the weight that it stands beside. Attention computes in high precision again.

    Raises:
        ValueError: if a layer has several weights, chosen by timestep. The model is unchanged then.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and (module.schedule or (module.side and module.side.schedule)):
            raise ValueError(
                f"layers must have one weight each to become float, but {name!r} has one per stretch of timesteps; "
                "quantize with one stretch or adapter"
            )
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLayer):
            replace(model, name, _plain(module, dtype))
    attention.restore(model)
    remove_clock(model)
    return model


def _plain(module: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    plain = copy.copy(module)
    # Changing the class keeps everything that others hung on the module, which a new layer would lack.
    plain.__class__ = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d  # type: ignore[assignment]
    plain._parameters = {name: module._parameters[name] for name in ("weight", "bias")}
    plain._buffers = {}
    weight = dequantize(module.plan())
    if module.side is not None:
        weight = weight + product(module.side_down, module.side_up)
    plain.weight = nn.Parameter(weight.to(dtype))
    bias = module._parameters["bias"]
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    return plain

"""Quantized layers, and how a model gets them.

`QuantLinear` and `QuantConv2d` are plain subclasses of the float layers with a packed uint8 `weight` parameter and plain float
buffers: no tensor subclass, so offloading, deepcopy, `torch.compile` and PEFT treat them as what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difloat import attention, parents
from difloat.kernels import beside, ops, row_ops
from difloat.parents import PackedWeight
from difloat.quantizer import VARIED, LayerPlan, Plan, dequantize
from difloat.side import low_rank, product
from difloat.slots import VECTORS, RowSlot, Slot, row_slots_of, slots_of
from difloat.specs import SIDE, Band, Part, Side, weight_formats
from difloat.timesteps import Clock
from difloat.units import blocks, inside_blocks, places, quantizable

__all__ = [
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "apply",
    "blocks",
    "clock_of",
    "empty_like",
    "inside_blocks",
    "install",
    "quantizable",
    "remove_clock",
    "replace",
    "restore",
    "set_clock",
    "shadow",
    "weight_of",
]

_LINEAR = (ops.linear, row_ops.linear)
_CONV2D = (ops.conv2d, row_ops.conv2d)


class QuantizedLayer(PackedWeight):
    """What both layer types share: packed state, decoding of the weight, the sum over parts."""

    parts: tuple[Part, ...] = ()
    bands: tuple[Band, ...] = ()  # of rows, where these have several widths
    slots: tuple[Slot | RowSlot, ...] = ()
    float_shape: tuple[int, ...] = ()
    smoothed: bool = False
    schedule: tuple[int, ...] = ()
    input_schedule: tuple[int, ...] = ()
    side: Side | None = None
    clock: Clock | None = None  # set where there is a schedule
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_factor: Tensor
    row_band: Tensor
    side_down: Tensor
    side_up: Tensor

    def allocate(self, plan: LayerPlan, device: torch.device | str) -> None:
        """Replace the float weight by empty packed state as planned; values are loaded afterwards."""
        self.parts, self.float_shape = plan.parts, tuple(plan.shape)
        self.smoothed, self.schedule = plan.smoothed, plan.schedule
        self.input_schedule, self.bands, self.side = plan.input_schedule, plan.bands, plan.side
        self.slots = (
            row_slots_of(plan.parts, plan.bands) if plan.bands else slots_of(plan.shape[0], plan.parts)
        )
        for name, tensor in plan.tensors.items():
            if name == "weight":
                self.hold(torch.empty_like(tensor, device=device))
            else:
                self.register_buffer(name, torch.empty_like(tensor, device=device))

    def load(self, plan: LayerPlan, device: torch.device | str) -> None:
        """Take over the stored tensors of a plan."""
        self.allocate(plan, "meta")
        for name, tensor in plan.tensors.items():
            if name == "weight":
                self.hold(tensor.to(device))
            else:
                setattr(self, name, tensor.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move like any module, but a change of the model's dtype leaves scales and zero points in float32."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        if self.input_dtype is not None:
            self.input_dtype = fn(torch.empty(0, dtype=self.input_dtype)).dtype
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def plan(self) -> LayerPlan:
        """The layer's state as a plan entry; tensors are shared, not copied."""
        kind: Literal["linear", "conv2d"] = "linear" if len(self.float_shape) == 2 else "conv2d"
        fields = (self.smoothed, self.schedule, self.input_schedule, self.bands, self.side)
        empty = LayerPlan(kind, self.float_shape, self.parts, {}, *fields)
        return with_changes(
            empty, tensors={name: self._tensor(name).detach() for name in empty.tensor_shapes()}
        )

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.packed if name == "weight" else getattr(self, name)
        return tensor

    def current(self, name: str) -> Tensor:
        """A stored tensor: of several variants the one for the timestep of the denoiser's call."""
        tensor = self._tensor(name)
        schedule = self.schedule if name in VARIED else self.input_schedule
        if self.side is not None and name in SIDE:
            schedule = self.side.schedule
        if not schedule:
            return tensor
        if self.clock is None:
            raise RuntimeError(
                "a layer that depends on the timestep must be part of a denoiser, got one on its own; apply a plan"
            )
        entry = self.clock.entry().to(tensor.device).reshape(1)  # a number would break a compiled graph
        number = torch.tensor(schedule, device=tensor.device).index_select(0, entry)
        return tensor.unflatten(0, (max(schedule) + 1, -1)).index_select(0, number)[0]

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [o, i, *k] that the codes stand for; of a smoothed layer without undoing the factors."""
        pieces = []
        for part, slot in zip(self.parts, self.slots, strict=True):
            packed, scale, zero_point, *_ = stored = self._stored(slot)
            if isinstance(slot, RowSlot):
                pieces.append(row_ops.dequantize(packed, scale, zero_point, stored[-1], slot.text))
                continue
            name, group_size = part.weight.format.name, part.weight.group_size or 0
            pieces.append(ops.dequantize(packed, scale, zero_point, name, part.channels, group_size))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def weight_formats(self) -> str:
        """Names of the weight's formats, as reports show them."""
        return weight_formats(self.float_shape[0], self.parts, self.bands)

    def _stored(self, slot: Slot | RowSlot) -> list[Any]:
        """What the operators take of one part between input and bias, for the timestep of the denoiser's call."""
        if isinstance(slot, RowSlot):
            return self._stored_rows(slot)
        if len(self.slots) == 1 and not self.schedule and not self.input_schedule:
            return [self.packed, *(self._buffers.get(name) for name in VECTORS)]
        pairs = zip(VECTORS, slot.vectors, strict=True)
        vectors = [None if where is None else self.current(name)[where] for name, where in pairs]
        return [self.current("weight")[:, slot.columns], *vectors]

    def _stored_rows(self, slot: RowSlot) -> list[Any]:
        """`_stored` with a list of tensors per band for everything of the weight."""
        weight = self.current("weight")[0]
        packed = [weight[b.stretch].unflatten(0, (b.rows, -1))[:, b.slot.columns] for b in slot.bands]
        vectors = [
            [self.current(name)[where] for b in slot.bands if (where := b.slot.vectors[n]) is not None]
            for n, name in enumerate(VECTORS)
        ]
        scale, zero_point = (found[0] if found else None for found in vectors[2:])  # the same in all bands
        return [packed, *vectors[:2], scale, zero_point, self.row_band]

    def _with_side(self, out: Tensor, x: Tensor) -> Tensor:
        """What the packed weight gives for the input `x`, and the low-rank branch on the same input added."""
        if self.side is None:
            return out
        assert isinstance(self, nn.Linear | nn.Conv2d)
        return out + low_rank(self, x, self.current("side_down"), self.current("side_up"))

    def _smooth(self, x: Tensor, axis: int) -> Tensor:
        """The input times its factors, channel by channel."""
        if not self.smoothed:
            return x
        factor = self.current("input_factor").to(x.dtype)
        return x * (factor if axis == -1 else factor.reshape(-1, 1, 1))

    def _sum_of_parts(
        self, x: Tensor, axis: int, operators: tuple[Callable[..., Tensor], ...], *geometry: Any
    ) -> Tensor:
        """The operator (for rows alike, for rows of several widths) on every part of the smoothed input.

        The bias goes with the first part.
        """
        x, operator = self._smooth(self._cast(x), axis), operators[bool(self.bands)]
        if len(self.slots) == 1:
            return operator(x, *self._stored(self.slots[0]), self.bias, self.slots[0].text, *geometry)
        pieces = x.split([slot.channels for slot in self.slots], dim=axis)
        terms = [
            operator(piece, *self._stored(slot), None if number else self.bias, slot.text, *geometry)
            for number, (piece, slot) in enumerate(zip(pieces, self.slots, strict=True))
        ]
        return sum(terms[1:], terms[0])


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer with packed weights; constructed as `nn.Linear`, quantized by `load`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., i] to [..., o], in the dtype of `input`; that name, too, is the one of the float layer."""
        x = input
        if self.side is None or len(self.slots) > 1 or self.bands or self.smoothed:
            return self._with_side(self._sum_of_parts(x, -1, _LINEAR), x)
        stored = (*self._stored(self.slots[0]), self.bias)
        factors = self.current("side_down"), self.current("side_up")
        return beside.linear(self._cast(x), stored, self.slots[0].text, *factors)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with packed weights; constructed as `nn.Conv2d`, quantized by `load`."""

    def forward(self, input: Tensor) -> Tensor:
        """[b, i, h, w] to [b, o, h', w'], in the dtype of `input`."""
        return self._with_side(self._convolved(input), input)

    def _convolved(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = (0, 0)
        elif isinstance(self.padding, str):
            # "same" with an even kernel pads more behind than before: pad both alike and drop the first lines.
            left, right, top, bottom = self._reversed_padding_repeated_twice
            wide = (max(top, bottom), max(left, right))
            out = self._sum_of_parts(x, 1, _CONV2D, self.stride, wide, self.dilation, self.groups)
            return out[:, :, bottom - top :, right - left :]
        return self._sum_of_parts(x, 1, _CONV2D, self.stride, padding, self.dilation, self.groups)


def empty_like(module: nn.Linear | nn.Conv2d) -> QuantLinear | QuantConv2d:
    """A quantized layer of the same geometry, not quantized yet, whose bias is the very same parameter."""
    has_bias = module.bias is not None
    layer: QuantLinear | QuantConv2d
    if isinstance(module, nn.Linear):
        layer = QuantLinear(module.in_features, module.out_features, has_bias, device="meta")
    else:
        layer = QuantConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            has_bias,
            module.padding_mode,
            device="meta",
        )
    layer.bias = module.bias
    layer.train(module.training)
    return layer


def shadow(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer: layers can be swapped without touching `model`.

    With `frozen` its parameters are views that need no gradient; those of `model` stay as they are.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): tensor for tensor in tensors}
    if frozen:
        memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of the layer `name`."""
    return model.get_parameter(f"{name}.weight")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name` (dotted) inside `model`, and wherever else the module of that name is registered."""
    for parent, child in places(model, name):
        setattr(parent, child, module)


def install(model: nn.Module, name: str, plan: LayerPlan, device: torch.device | str | None = None) -> None:
    """Swap one float or quantized layer of `model` for a quantized one, in place; None: on the device of the old one.

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
    """Put a quantized layer in the place of the layer `name`; it answers as that one did if the parent asks for a dtype."""
    old = model.get_submodule(name)
    names = (other for other, module in model.named_modules(remove_duplicate=False) if module is old)
    if any(parents.use_of(model, other) for other in names):
        layer.answer_as(old.input_dtype if isinstance(old, QuantizedLayer) else weight_of(model, name).dtype)
    replace(model, name, layer)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out a plan in place: swap every planned layer, quantize every planned attention; returns `model`.

    Raises:
        ValueError: if the plan does not fit; the model is then unchanged.
    """
    check(model, plan)
    clock = Clock(model, plan.timesteps) if plan.timesteps else None
    for name, layer in plan.layers.items():
        install(model, name, layer)
    attention.install(model, plan.attention)
    if clock is not None:
        set_clock(model, clock)
    return model


def check(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan of another model; ValueError."""
    float_layers = quantizable(model)
    for name, layer in plan.layers.items():
        if name not in float_layers or tuple(float_layers[name].weight.shape) != tuple(layer.shape):
            raise ValueError(
                f"plan must fit the model, but {name!r} of shape {tuple(layer.shape)} is no float layer of it; "
                "use the model the plan was made for, not yet quantized"
            )
    attention.check(model, plan.attention)


def set_clock(model: nn.Module, clock: Clock) -> None:
    """Let every layer of `model` that depends on the timestep read it off `clock`, and the clock off the model's calls."""
    remove_clock(model)
    model.register_forward_pre_hook(clock, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.plan().schedules:
            module.clock = clock


def clock_of(model: nn.Module) -> Clock | None:
    """The clock among the forward pre-hooks of a denoiser."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Clock)), None)


def remove_clock(model: nn.Module) -> None:
    """Undo `set_clock`; does nothing without one."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, Clock):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def restore(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Turn every quantized layer back into a plain float layer with the dequantized weight, in place; returns `model`.

    A low-rank pair beside a weight is added to it. Attention computes in high precision again.

    Raises:
        ValueError: if a layer has several weights, chosen by timestep; the model is then unchanged.
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
    plain.__class__ = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d  # type: ignore[assignment]
    plain._parameters = dict(module._parameters)
    plain._buffers = {}
    weight = dequantize(module.plan())
    if module.side is not None:
        weight = weight + product(module.side_down, module.side_up)
    plain.weight = nn.Parameter(weight.to(dtype))
    bias = module._parameters["bias"]
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    return plain

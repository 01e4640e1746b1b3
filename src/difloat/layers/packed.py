"""Quantized layers; `install` says how a model gets them.

`QuantLinear` and `QuantConv2d` are plain subclasses of the float layers with a packed uint8 `weight` parameter and plain float
buffers: no tensor subclass, so offloading, deepcopy, `torch.compile` and PEFT treat them as what they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difloat import torch_modes
from difloat.kernels import beside, checks, row_operators
from difloat.kernels import operators as ops
from difloat.layers.dtype_readers import PackedWeight
from difloat.layers.low_rank_branch import low_rank
from difloat.layers.quantizable import blocks, inside_blocks, quantizable
from difloat.layers.stored_pieces import VECTORS, RowSlot, Slot, row_slots_of, slots_of
from difloat.layers.timestep_clock import Clock
from difloat.plan.plan import VARIED, LayerPlan
from difloat.plan.specs import SIDE, Band, Part, Side, weight_formats

__all__ = [
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "blocks",
    "empty_like",
    "inside_blocks",
    "quantizable",
    "weight_of",
]

when_first_made: list[Callable[[], object]] = []  # what others set up only once a process has a packed layer

_LINEAR = (ops.linear, row_operators.linear)
_CONV2D = (ops.conv2d, row_operators.conv2d)


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

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizedLayer:
        """Also how a layer is copied and unpickled, so no way to get one passes by what waits for the first."""
        with contextlib.suppress(IndexError):  # nothing waits, or another thread took it
            while when_first_made:
                when_first_made.pop()()
        return super().__new__(cls)

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
                setattr(self, name, torch_modes.normal(tensor.to(device)))

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
                pieces.append(row_operators.dequantize(packed, scale, zero_point, stored[-1], slot.text))
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
        if self.smoothed or len(self.slots) > 1:  # factors broadcast, and pieces fall short, without a word
            channels = sum(slot.channels for slot in self.slots) * getattr(self, "groups", 1)
            checks.width(x, axis if axis >= 0 else x.dim() - 1, channels)
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
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            has_bias,
            module.padding_mode,
            device="meta",
        )
    layer.bias = module.bias
    layer.train(module.training)
    return layer


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of the layer `name`."""
    return model.get_parameter(f"{name}.weight")

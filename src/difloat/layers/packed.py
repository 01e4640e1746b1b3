"""Quantized layers, which are linear layers and convolutions with packed weights.

`QuantLinear` and `QuantConv2d` are plain subclasses of the float layers with a packed uint8 `weight` parameter and plain float
buffers. There is no tensor subclass, so offloading, deepcopy, `torch.compile` and PEFT treat them as what they are.

>>> import difloat
>>> model = nn.Sequential(nn.Linear(8, 16))
>>> _ = difloat.quantize(model, "rtn", "w4a8", keep_8bit=(), progress=False)
>>> model[0].weight.shape, model[0].weight.dtype                     # 8 codes of 4 bits in 4 bytes
(torch.Size([16, 4]), torch.uint8)
>>> model[0].dequantized_weight().shape
torch.Size([16, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difloat import torch_modes
from difloat.kernels import checks, operators, rotation
from difloat.kernels.geometry import Geometry
from difloat.layers import prepared
from difloat.layers.dtype_readers import HoldsPackedWeight
from difloat.layers.low_rank_branch import low_rank
from difloat.layers.quantizable import blocks, inside_blocks, quantizable
from difloat.layers.timestep_clock import Clock
from difloat.plan.plan import VARIED, LayerPlan
from difloat.plan.specs import SIDE, Band, Part, Rotation, Side, weight_formats
from difloat.plan.weight import Branch, Inputs, Layout, Weight

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

_STORED = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
when_first_made: list[Callable[[], object]] = []  # set up by others once a process has a packed layer


class QuantizedLayer(HoldsPackedWeight):
    """The base of both layer types: packed state, decoding of the weight, and the choice of what a timestep uses."""

    parts: tuple[Part, ...] = ()
    bands: tuple[Band, ...] = ()  # of rows, where these have several widths
    layout: Layout  # where the stored tensors hold which rectangle
    float_shape: tuple[int, ...] = ()
    smoothed: bool = False
    schedule: tuple[int, ...] = ()
    input_schedule: tuple[int, ...] = ()
    side: Side | None = None
    rotation: Rotation | None = None
    clock: Clock | None = None  # set where there is a schedule
    _prepared: dict[Any, prepared.Prepared] | None = None  # calls by dtype, device and class of token counts
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_factor: Tensor
    row_band: Tensor
    side_down: Tensor
    side_up: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizedLayer:
        """Make a layer, after whatever waits for the first one. Copies and unpickled layers come through here as well."""
        while when_first_made:
            try:
                setup = when_first_made.pop()
            except IndexError:  # another thread took it
                break
            setup()
        return super().__new__(cls)

    def allocate(self, plan: LayerPlan, device: torch.device | str) -> None:
        """Replace the float weight by empty packed tensors as planned. Their values are loaded afterwards."""
        self.parts, self.float_shape = plan.parts, tuple(plan.shape)
        self.smoothed, self.schedule = plan.smoothed, plan.schedule
        self.input_schedule, self.bands, self.side = plan.input_schedule, plan.bands, plan.side
        self.layout, self.rotation, self._prepared = plan.layout, plan.rotation, {}
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

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle, without the prepared calls, which hold addresses."""
        return {**self.__dict__, "_prepared": None if self._prepared is None else {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move the layer like any module, but keep scales and zero points in float32 when the model's dtype changes."""
        # Rounding scales to half precision would change every value that the codes stand for.
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
        """The layer's state as an entry of a plan, whose tensors are shared and not copied."""
        kind: Literal["linear", "conv2d"] = "linear" if len(self.float_shape) == 2 else "conv2d"
        fields = (self.smoothed, self.schedule, self.input_schedule, self.bands, self.side, self.rotation)
        empty = LayerPlan(kind, self.float_shape, self.parts, *fields, tensors={})
        return with_changes(
            empty, tensors={name: self._tensor(name).detach() for name in empty.tensor_shapes()}
        )

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.packed if name == "weight" else getattr(self, name)
        return tensor

    def current(self, name: str) -> Tensor:
        """A stored tensor. Of several variants it is the one for the timestep of the denoiser's call.

        Raises:
            RuntimeError: if the layer depends on the timestep but is part of no denoiser.
        """
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
        """The float32 weight [o, i, *k] that the codes stand for. Factors and rotation are not undone."""
        return operators.decode(self.packed_weight()[0])

    def weight_formats(self) -> str:
        """The names of the weight's formats, as reports show them."""
        return weight_formats(self.float_shape[0], self.parts, self.bands)

    def packed_weight(self) -> tuple[Weight, tuple[Inputs, ...]]:
        """The weight without its branch, and the stored scales of the inputs, for the timestep of the denoiser's call."""
        tensors = {name: self.current(name) for name in _STORED if name in self._buffers}
        tensors["weight"] = self.current("weight")
        if self.bands:
            tensors["row_band"] = self.row_band
        return self.layout.weight(tensors), self.layout.stored_inputs(tensors)

    def _with_side(self, out: Tensor, x: Tensor) -> Tensor:
        """The result of the packed weight for an input, plus the low-rank branch on the same input."""
        if self.side is None:
            return out
        assert isinstance(self, nn.Linear | nn.Conv2d)
        return out + low_rank(self, x, self.current("side_down"), self.current("side_up"))

    def geometry(self) -> Geometry | None:
        """The geometry of a convolution. None for linear layers, and where padding is not equally many zeros on both sides."""
        return None

    def _smooth(self, x: Tensor, axis: int) -> Tensor:
        """The input multiplied by the smoothing factors, channel by channel."""
        if not self.smoothed:
            return x
        factor = self.current("input_factor").to(x.dtype)
        return x * (factor if axis == -1 else factor.reshape(-1, 1, 1))

    def _smoothed(self, x: Tensor, axis: int) -> Tensor:
        """The input as the parts read it: cast, and multiplied by the smoothing factors or rotated."""
        x = self._cast(x)
        if self.rotation is not None:
            checks.width(x, x.dim() - 1, self.float_shape[1])
            return rotation.rotate(x, self.rotation)
        if not self.smoothed:
            return x
        channels = sum(part.channels for part in self.parts) * getattr(self, "groups", 1)
        checks.width(x, axis if axis >= 0 else x.dim() - 1, channels)  # factors broadcast without a word
        return self._smooth(x, axis)


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer with packed weights, constructed as `nn.Linear` and quantized by `load`.

    >>> import difloat
    >>> model = nn.Sequential(nn.Linear(8, 16))
    >>> _ = difloat.quantize(model, "rtn", "w4a8", progress=False)
    >>> isinstance(model[0], QuantLinear), model(torch.zeros(2, 8)).shape
    (True, torch.Size([2, 16]))
    """

    def forward(self, input: Tensor) -> Tensor:
        """The result [..., o] for an input [..., i], in its dtype. The argument has the name that the float layer's has."""
        out = prepared.computed(self, input, -1)
        if out is not None:
            return self._with_side(out, input) if self.side is not None else out
        weight, inputs = self.packed_weight()
        apart = self.smoothed or self.rotation is not None or len(self.parts) > 1 or bool(self.bands)
        if self.side is not None and not apart:
            branch = Branch(self.current("side_down"), self.current("side_up"))
            weight = Weight(weight.columns, weight.row_band, branch, weight.texts)
            return operators.linear(self._cast(input), weight, inputs, self.bias)
        out = operators.linear(self._smoothed(input, -1), weight, inputs, self.bias)
        return self._with_side(out, input)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with packed weights, constructed as `nn.Conv2d` and quantized by `load`.

    >>> import difloat
    >>> model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    >>> _ = difloat.quantize(model, "rtn", "w4a8", progress=False)
    >>> isinstance(model[0], QuantConv2d), model(torch.zeros(1, 4, 8, 8)).shape
    (True, torch.Size([1, 6, 8, 8]))
    """

    def forward(self, input: Tensor) -> Tensor:
        """The result [b, o, h', w'] for an input [b, i, h, w], in its dtype."""
        out = prepared.computed(self, input, 1)
        if out is None:
            out = self._convolved(input)
        return self._with_side(out, input) if self.side is not None else out

    def geometry(self) -> Geometry | None:
        """The geometry of the convolution, or None where padding is not equally many zeros on both sides."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    def _convolved(self, x: Tensor) -> Tensor:
        weight, inputs = self.packed_weight()
        x, geometry, behind = self._padded(x)
        out = operators.conv2d(self._smoothed(x, 1), weight, inputs, self.bias, geometry)
        return out if behind is None else out[:, :, behind[0] :, behind[1] :]

    def _padded(self, x: Tensor) -> tuple[Tensor, Geometry, tuple[int, int] | None]:
        """The padded input, the geometry of the convolution on it, and how many first lines and columns of the result drop."""
        padding, drop = self.padding, None
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):
            # "same" with an even kernel pads more behind than before: pad both alike and drop the first lines.
            left, right, top, bottom = self._reversed_padding_repeated_twice
            padding, drop = (max(top, bottom), max(left, right)), (bottom - top, right - left)
        assert not isinstance(padding, str)
        return x, Geometry(self.stride, padding, self.dilation, self.groups), drop


def empty_like(module: nn.Linear | nn.Conv2d) -> QuantLinear | QuantConv2d:
    """A layer of the same geometry that can be quantized, without a weight yet, whose bias is the very same parameter.

    >>> empty_like(nn.Linear(8, 16))
    QuantLinear(in_features=8, out_features=16, bias=True)
    """
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
    """The weight of the layer with a dotted name."""
    return model.get_parameter(f"{name}.weight")

"""Trainable counterparts of quantized layers: low-rank adapters in front of the rounding or beside it, and learned ranges.

Such a layer trains what is deployed, in one of two ways. Merged, it computes ``Q_x(x) Q_w(W + sum_k c_k up_k down_k)`` with a
frozen float weight W. Adapters are merged before the weight is rounded, so that each can be packed as a weight of its own
(QALoRA, arXiv:2310.03270, and TALoRA, arXiv:2505.21591). As a side branch it computes
``Q_x(x) Q_w(W) + sum_k c_k up_k (down_k x)``, with one packed weight, and pairs that stay float16 and read the unrounded input.
The one-hot choice c depends on the timestep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difloat.kernels import operators, rotation
from difloat.layers.low_rank_branch import low_rank
from difloat.plan import encode
from difloat.plan import plan as quantizer
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import expand_scale, fake_quantize
from difloat.plan.specs import Part, Side

# Adapters become a packed weight each, or stay beside one packed weight.
Carry = Literal["merged", "side"]

Init = Literal["zero", "error"]

_SMALLEST_SCALE = 1e-8
_LEAST_STEPS = 14  # of e2m1
_START = 0.02  # size of the adapters' first product, in steps of the weight's grid


@final
class Adaptive(nn.Module):
    """The trainable counterpart of one planned layer.

    Attributes:
        down: The first factors of the adapters, [adapters, rank, i, *k]. They are absent with rank 0.
        up: The second factors of the adapters, [adapters, o, rank].
        weight_scales: One vector per part, as the plan stores them, and band after band where rows have several widths.
        input_scale: [entries, parts], with one row per entry of the timestep grid or one in all. It is absent where inputs are
            online or not quantized.
        input_zero_point: [entries, parts] for the parts that have one, with the rows of the input scale.
        wrapped: The layer it stands for, in a list.
        base: The frozen weight [o, i, *k] that adapters are added to.
        choice: The one-hot choice [adapters] of the current call.
        entry: The entry of the timestep grid in the current call.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        plan: LayerPlan,
        *,
        adapters: int,
        rank: int,
        entries: int,
        init: Init = "zero",
        carry: Carry = "merged",
        generator: torch.Generator,
    ) -> None:
        """Start as a plan with one weight and no branch says. Rank 0 leaves adapters out.

        Where the plan rounds a weight elsewhere than to nearest (learned rounding), W is the rounded value. With `init` "error"
        the frozen W is the dequantized weight, and the one adapter starts as the largest directions of the rounding error
        (after MPQ-DMv2, arXiv:2507.04290, inferred). On the float weight the same start would add the error twice.

        Input ranges by timestep that the plan has already stay apart, whatever `entries` says, and the grid must be the plan's.
        Tensors of the plan may be on any device. This layer is on the device of the one it stands for.

        Raises:
            ValueError: if several adapters should start from the error: they would be equal.
        """
        super().__init__()
        device = layer.weight.device
        plan = replace(plan, tensors={name: tensor.to(device) for name, tensor in plan.tensors.items()})
        self.plan, self.adapters, self.rank, self.carry = plan, adapters, rank, carry
        self.choice: Tensor | None = None
        self.entry = 0
        self.wrapped = [layer]  # in a list: the user's own layer is neither a submodule nor saved
        bands = plan.split_rows()
        order = torch.arange(plan.shape[0])
        if plan.bands:
            order = plan.tensors["row_band"].argsort(stable=True)
        self._bands = [band.parts for band in bands]
        self._rows = order.split([band.shape[0] for band in bands])
        self.weight_scales = nn.ParameterList(v for b in bands for v in _of_parts(b, "weight_scale"))
        self._zero_points = [v for band in bands for v in _of_parts(band, "weight_zero_point")]
        for name in ("input_scale", "input_zero_point"):
            if name in plan.tensors:
                setattr(self, name, nn.Parameter(_by_entry(plan, name, entries)))
        self.base = self._as_planned(layer.weight.detach())
        if rank and init == "error":
            self._start_from_error()
        elif rank:
            self._add_adapters(generator)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer it stands for, for models that read its dtype or device."""
        return self.wrapped[0].weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer it stands for."""
        return self.wrapped[0].bias

    @torch.no_grad()
    def _as_planned(self, weight: Tensor) -> Tensor:
        """The float weight, or the planned value where rounding to nearest would give another code."""
        stored = self._divided(weight.float())
        tensors = self._encoded(stored).tensors
        rounded = replace(self.plan, tensors={**self.plan.tensors, **tensors})
        same = encode.stored_values(rounded) == encode.stored_values(self.plan)
        if (
            self.plan.rotation is not None
        ):  # in the weight itself one code would change all channels of its block
            return self.plan.rotation.backward(stored.where(same, encode.stored_values(self.plan))).to(weight)
        return torch.where(same, weight, encode.dequantize(self.plan).to(weight))

    def _start_from_error(self) -> None:
        if self.adapters != 1:
            raise ValueError(
                f"adapters that start from the rounding error must be one per layer, got {self.adapters}; say adapters=1"
            )
        weight = self.base.float()
        self.base = encode.dequantize(self.plan).to(weight)
        error = self._divided(weight - self.base)
        left, sizes, right = torch.linalg.svd(
            error.flatten(1), full_matrices=False
        )  # [o, n], [n], [n, i * k]
        self.rank = min(self.rank, len(sizes))
        roots = sizes[: self.rank].sqrt()  # both factors get the same size
        self.up = nn.Parameter((left[:, : self.rank] * roots)[None])
        down = roots[:, None] * right[: self.rank]  # [r, i * k]
        self.down = nn.Parameter(down.reshape(1, self.rank, *weight.shape[1:]))

    def _add_adapters(self, generator: torch.Generator) -> None:
        out_channels, in_channels, *kernel = self.plan.shape
        bound = 1 / math.sqrt(in_channels * math.prod(kernel))  # kaiming_uniform with a = sqrt(5)
        down = torch.empty(self.adapters, self.rank, in_channels, *kernel)  # [adapters, r, i, *k]
        down.uniform_(-bound, bound, generator=generator)
        # All-zero second factors would make the adapters equal and leave the router without gradient.
        size = _START * self.step() / (bound * math.sqrt(self.rank / 3))
        up = size * torch.randn(
            self.adapters, out_channels, self.rank, generator=generator
        )  # [adapters, o, r]
        device = self.base.device
        self.down, self.up = nn.Parameter(down.to(device)), nn.Parameter(up.to(device))

    def step(self) -> float:
        """The mean distance of neighbouring values of the weight's grid, which is the unit of the adapters' learning rate.

        Grids with fewer values than e2m1 count as if they had as many over the same range, since the few large steps of 2 and
        3 bits are no reason to move weights faster.
        """
        total, scales = 0.0, iter(self.weight_scales)
        for parts, rows in zip(self._bands, self._rows, strict=True):
            for part in parts:
                format = part.weight.format
                distance = (format.max - format.min) / max(_LEAST_STEPS, len(format.values) - 1)
                total += len(rows) * distance * float(next(scales).detach().mean())
        return total / (self.plan.shape[0] * len(self.plan.parts))

    def merged(self, choice: Tensor) -> Tensor:
        """The float weight, divided by the factors of a smoothed input, plus the adapters weighted by a choice [adapters].

        Adapters are added last, so that a step of theirs is one of the grid for every channel. Those that are carried beside
        the weight are left out.
        """
        weight = self._divided(self.base.float())
        if self.rank and self.carry == "merged":
            change = torch.einsum("h,hor,hri->oi", choice, self.up, self.down.flatten(2))  # [o, i * k]
            weight = weight + change.view_as(weight)
        return weight

    def _divided(self, weight: Tensor) -> Tensor:
        """The weight divided by the factors of the input, or rotated like it, so that both together give the same product."""
        if not self.plan.smoothed:
            return self.plan.rotated(weight)
        return weight / self.plan.tensors["input_factor"].reshape(1, -1, *[1] * (weight.dim() - 2))

    def quantized(self, weight: Tensor) -> Tensor:
        """A merged weight on the grids of its rows and parts, with straight-through gradients to it and to the scales."""
        vectors = zip(self.weight_scales, self._zero_points, strict=True)
        bands = []
        for parts, rows in zip(self._bands, self._rows, strict=True):
            rounded = []
            for piece, part in zip(
                weight[rows].split([p.channels for p in parts], dim=1), parts, strict=True
            ):
                spec, (scale, zero) = part.weight, next(vectors)
                spread = expand_scale(scale.clamp_min(_SMALLEST_SCALE), spec, piece.shape)
                offset = expand_scale(zero, spec, piece.shape) if spec.zero_point else None
                rounded.append(fake_quantize(piece, spec.format, spread, offset))
            bands.append(torch.cat(rounded, dim=1))
        return bands[0] if len(bands) == 1 else torch.cat(bands)[torch.cat(self._rows).argsort()]

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input, smoothed or rotated and on the grids of its parts, with the ranges of the current entry."""
        axis = -1 if self.plan.kind == "linear" else 1
        if self.plan.rotation is not None:
            x = rotation.rotate(x, self.plan.rotation)
        if self.plan.smoothed:
            factor = self.plan.tensors["input_factor"].to(x.dtype)
            x = x * (factor if axis == -1 else factor.reshape(-1, 1, 1))
        channels = [part.channels for part in self.plan.parts]
        pieces = [x] if len(channels) == 1 else x.split(channels, dim=axis)
        scale_at, zero_at, rounded = 0, 0, []
        for piece, part in zip(pieces, self.plan.parts, strict=True):
            spec = part.activation
            if spec is None or spec.online:
                rounded.append(_online(piece, part))
                continue
            scale = _row(self.input_scale, self.entry)[scale_at].clamp_min(_SMALLEST_SCALE)
            scale_at += 1
            zero = None
            if spec.zero_point:
                zero = _row(self.input_zero_point, self.entry)[zero_at]
                zero_at += 1
            rounded.append(fake_quantize(piece.float(), spec.format, scale, zero).to(x.dtype))
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=axis)

    def forward(self, input: Tensor) -> Tensor:
        """The quantized result of the layer it stands for."""
        x, layer = input, self.wrapped[0]
        choice = torch.ones(1, device=x.device) if self.choice is None else self.choice
        weight = self.quantized(self.merged(choice)).to(x.dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
        rounded = self.quantized_input(x)
        out = (
            F.linear(rounded, weight, bias)
            if isinstance(layer, nn.Linear)
            else layer._conv_forward(rounded, weight, bias)
        )
        return out + self.branch(x, choice) if self.rank and self.carry == "side" else out

    def branch(self, x: Tensor, choice: Tensor) -> Tensor:
        """The float16 pairs on the unrounded input, weighted by a choice [adapters], as one product of all ranks together."""
        up = _as_stored(self.up) * choice[:, None, None]  # [adapters, o, r]
        return low_rank(self.wrapped[0], x, _as_stored(self.down).flatten(0, 1), torch.cat(list(up), dim=1))

    @torch.no_grad()
    def packed(self, schedule: Sequence[int]) -> LayerPlan:
        """The layer as trained, with one packed weight for every adapter that is used, or one with these adapters beside it.

        Args:
            schedule: The adapter for every entry of the timestep grid.
        """
        used = sorted(set(schedule)) if self.rank else [0]
        places = [used.index(adapter) for adapter in schedule] if len(used) > 1 else []
        beside = bool(self.rank) and self.carry == "side"
        every = torch.eye(max(1, self.adapters), device=self.base.device)
        inputs = {
            n: getattr(self, n).detach() for n in ("input_scale", "input_zero_point") if hasattr(self, n)
        }
        entries = max((len(rows) for rows in inputs.values()), default=1)
        if "input_scale" in inputs:
            inputs["input_scale"] = inputs["input_scale"].clamp_min(_SMALLEST_SCALE)
        plans = []
        for adapter in used[:1] if beside else used:
            bare = self._encoded(self.merged(every[adapter]))
            tensors = {**self.plan.tensors, **bare.tensors, **{n: v.reshape(-1) for n, v in inputs.items()}}
            plans.append(replace(self.plan, tensors=tensors))
        schedule_of_inputs = tuple(range(entries)) if entries > 1 else ()
        plans[0] = replace(plans[0], input_schedule=schedule_of_inputs)
        joined = encode.join_variants(plans, [] if beside else places)
        joined = replace(joined, smoothed=self.plan.smoothed)
        return self._with_side(joined, used, places) if beside else joined

    def _with_side(self, plan: LayerPlan, used: list[int], places: list[int]) -> LayerPlan:
        """The planned layer with the used pairs beside it, or a ValueError if one is not finite in float16."""
        pairs = {"side_down": self.down[used].flatten(0, 1), "side_up": self.up[used].flatten(0, 1)}
        stored = {name: factors.detach().half() for name, factors in pairs.items()}
        if not all(bool(factors.isfinite().all()) for factors in stored.values()):
            raise ValueError(
                "adapters beside a weight must be finite in float16, got larger values; train with a lower adapter_rate"
            )
        return replace(plan, tensors={**plan.tensors, **stored}, side=Side(self.rank, tuple(places)))

    def _encoded(self, weight: Tensor) -> LayerPlan:
        """A merged weight with the scales as trained, without inputs."""
        vectors = zip(self.weight_scales, self._zero_points, strict=True)
        bands = []
        for parts, rows in zip(self._bands, self._rows, strict=True):
            pairs = [next(vectors) for _ in parts]
            scales = [scale.detach().clamp_min(_SMALLEST_SCALE) for scale, _ in pairs]
            weight_only = [Part(part.channels, part.weight) for part in parts]
            zeros = [zero for _, zero in pairs]
            bands.append(encode.plan_layer(weight[rows], weight_only, scales, weight_zero_points=zeros))
        return encode.join_rows(bands, torch.cat(self._rows))


def stored_bytes(plan: LayerPlan, adapters: int, rank: int, carry: Carry) -> int:
    """The bytes that adapters add to a layer planned without them, if all of them are used."""
    if not adapters or not rank:
        return 0
    if carry == "merged":
        return (adapters - 1) * sum(
            plan.tensors[name].nbytes for name in quantizer.VARIED if name in plan.tensors
        )
    shapes = Side(rank, tuple(range(adapters))).tensor_shapes(plan.shape)
    return sum(plan.dtype_of(name).itemsize * math.prod(shape) for name, shape in shapes.items())


def _as_stored(factors: Tensor) -> Tensor:
    """The factors rounded to float16, with the gradient of the identity, since in float16 small gradients would vanish."""
    return factors + (factors.half().float() - factors).detach()


def _of_parts(plan: LayerPlan, name: str) -> list[Tensor]:
    """A stored weight vector, cut into its parts, which are empty where a part has none."""
    vectors = [
        piece.scale if name == "weight_scale" else piece.zero_point for piece in plan.weight().pieces()
    ]
    return [torch.zeros(0) if vector is None else vector.clone() for vector in vectors]


def _by_entry(plan: LayerPlan, name: str, entries: int) -> Tensor:
    """A copy of stored input scales or zero points as rows [entries, parts] for the entries of the timestep grid."""
    if not plan.input_schedule:
        return plan.tensors[name].repeat(entries, 1)
    ranges = plan.tensors[name].unflatten(0, (max(plan.input_schedule) + 1, -1))
    return ranges[list(plan.input_schedule)]


def _row(rows: Tensor | nn.Module, entry: int) -> Tensor:
    assert isinstance(rows, Tensor)
    return rows[entry if len(rows) > 1 else 0]


def _online(x: Tensor, part: Part) -> Tensor:
    spec = part.activation
    if spec is None:
        return x
    per_token = spec.granularity in ("token", "group")
    return operators.fake_quantize_input(
        x, None, None, spec.format.name, per_token, spec.group_size or 0, spec.zero_point
    )

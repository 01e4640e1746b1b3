"""The model that is fine-tuned: trainable layers in the place of quantized ones, and a router of adapters by timestep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difloat.layers import attention, hooks, install
from difloat.layers.timestep_clock import Clock
from difloat.methods.training.twin_layer import Adaptive, Carry, Init
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import AttentionPlan

_ROUTER_WIDTH = 128
_FASTEST = 1.0  # radians over half of the trajectory: an untrained router's table varies slowly

Allocation = Literal["learned", "halves", "random"]  # how the adapter of a layer in a step is chosen


@dataclass(frozen=True)
class Adapters:
    """What every layer learns beside its weight.

    Attributes:
        count: How many adapters a layer has, of which one is active at a time.
        rank: The rank of the adapters. With 0 a layer learns ranges and scales only.
        left_out: The layers that learn ranges and scales only, whatever the rank.
        input_ranges_by_timestep: Whether static input ranges are learned apart for every timestep.
        carry: Whether adapters are merged into weights or stay beside them (`twin_layer`).
        init: "zero", or "error" for a start at the largest directions of the rounding error (`twin_layer.Adaptive`).
        allocation: Whether a router learns which adapter a timestep has, or `fixed_table` says it.
    """

    count: int
    rank: int
    left_out: tuple[str, ...] = ()
    input_ranges_by_timestep: bool = False
    carry: Carry = "merged"
    init: Init = "zero"
    allocation: Allocation = "learned"


@final
class Router(nn.Module):
    """The choice of every layer's adapter in a step: a sinusoidal embedding, two layers, and a straight-through one-hot.

    This follows arXiv:2505.21591. The width and one router for all layers are our choice, and so are the low frequencies. With
    those usual for timesteps (up to 1,000 radians) an untrained router changes its mind between any two steps, and training has
    to undo that first. Every layer starts with logits of mean zero over the trajectory, so that all layers use several
    adapters, because one that is never used has no gradient.
    """

    def __init__(self, layers: int, adapters: int, generator: torch.Generator) -> None:
        """Make a router for so many layers with so many adapters each."""
        super().__init__()
        self.shape = (layers, adapters)
        self.inner = nn.Linear(_ROUTER_WIDTH, _ROUTER_WIDTH)
        self.outer = nn.Linear(_ROUTER_WIDTH, layers * adapters)
        bound = 1 / math.sqrt(_ROUTER_WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
            places = [self.logits(float(place)).flatten() for place in torch.linspace(0, 1, 65)]
            self.outer.bias.sub_(torch.stack(places).mean(0))

    def logits(self, place: float) -> Tensor:
        """The logits [layers, adapters] at a place from 0, the sampler's last step, to 1, its first."""
        angles = (2 * place - 1) * torch.linspace(0, _FASTEST, _ROUTER_WIDTH // 2).to(self.inner.weight)
        hidden = F.silu(self.inner(torch.cat([angles.sin(), angles.cos()])))
        return self.outer(hidden).reshape(self.shape)

    def forward(self, place: float) -> Tensor:
        """The one-hot choice [layers, adapters], with the gradient of the softmax."""
        shares = self.logits(place).softmax(-1)  # [layers, adapters]
        hard = F.one_hot(shares.argmax(-1), self.shape[1]).to(shares)
        # Forward it is the one-hot, backward the softmax.
        return hard + shares - shares.detach()


def fixed_table(
    allocation: Allocation, entries: int, layers: int, adapters: int, generator: torch.Generator
) -> Tensor:
    """The adapter of every layer at every entry of the grid, [entries, layers], where no router learns it.

    With "halves" adapters follow each other along the trajectory, equally long, in all layers alike. With "random" they are
    drawn apart for every layer and entry.
    """
    if allocation == "random":
        return torch.randint(adapters, (entries, layers), generator=generator)
    turns = torch.arange(entries - 1, -1, -1) * adapters // entries
    return turns[:, None].expand(entries, layers).contiguous()


@final
class Student(nn.Module):
    """A denoiser whose planned layers are trainable. Everything else is the user's own and frozen.

    Attributes:
        grid: The timesteps that adapters and input ranges are learned for, in ascending order.
        twins: The trainable layers by their position in `names`.
        router: The router, or None with one adapter or a fixed choice.
        adapters: What the layers learn.
    """

    _mixed: torch.dtype | None = None  # what `mixed_precision` says

    def __init__(
        self,
        model: nn.Module,
        plans: Mapping[str, LayerPlan],
        attention_plans: Mapping[str, AttentionPlan],
        grid: Sequence[float],
        adapters: Adapters,
        generator: torch.Generator,
    ) -> None:
        """Build the trainable layers. The model stays untouched.

        Args:
            model: The float denoiser.
            plans: The layers at the start of training.
            attention_plans: The quantized attention of the same plan.
            grid: The timesteps, in the unit of the denoiser's argument.
            adapters: What the layers learn.
            generator: The generator that draws the first values.
        """
        super().__init__()
        shadow = install.shadow(model, frozen=True)
        self.grid, self.names, self.adapters = tuple(grid), list(plans), adapters
        self._clock = Clock(shadow, self.grid)
        self.twins = nn.ModuleList(
            Adaptive(
                model.get_submodule(name),  # type: ignore[arg-type]
                plan,
                adapters=adapters.count,
                rank=0 if name in adapters.left_out else adapters.rank,
                entries=len(grid) if adapters.input_ranges_by_timestep else 1,
                init=adapters.init,
                carry=adapters.carry,
                generator=generator,
            )
            for name, plan in plans.items()
        )
        for name, twin in zip(self.names, self.twins, strict=True):
            hooks.hand_over(shadow.get_submodule(name), twin)
            install.replace(shadow, name, twin)
        attention.install(shadow, attention_plans)
        self.router, self._table = None, torch.zeros(len(grid), len(plans), dtype=torch.long)
        if adapters.count > 1 and adapters.allocation == "learned":
            device = next(model.parameters()).device
            self.router = Router(len(plans), adapters.count, generator).to(device)
        elif adapters.count > 1:
            self._table = fixed_table(adapters.allocation, len(grid), len(plans), adapters.count, generator)
        self._model = [shadow]  # in a list: its frozen tensors are neither trained nor saved

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser with rows that all have one timestep."""
        entry = int(self._clock.nearest(args, kwargs))
        choices = self._choices(entry)
        for number, twin in enumerate(self.twins):
            assert isinstance(twin, Adaptive)
            twin.entry = entry
            twin.choice = None if choices is None else choices[number]
        device = next(self._model[0].parameters()).device.type
        with torch.autocast(device, self._mixed, enabled=self._mixed is not None):
            return self._model[0](*args, **kwargs)

    def _choices(self, entry: int) -> Tensor | None:
        """The one-hot choice [layers, adapters] of a grid entry, or None with one adapter."""
        if self.router is not None:
            choices: Tensor = self.router(self.place(entry))
            return choices
        if self.adapters.count < 2:
            return None
        device = next(self._model[0].parameters()).device
        return F.one_hot(self._table[entry], self.adapters.count).float().to(device)

    @contextmanager
    def mixed_precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, calls compute under `torch.autocast` in `dtype`, or in the dtypes of the weights if it is None."""
        before, self._mixed = self._mixed, dtype
        try:
            yield
        finally:
            self._mixed = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Restore ranges and adapters after a call between a step's forward and backward pass.

        Where activations are checkpointed the backward pass computes blocks of the step again.
        """
        before = [(twin.entry, twin.choice) for twin in self.twins]
        yield
        for twin, (entry, choice) in zip(self.twins, before, strict=True):
            twin.entry, twin.choice = entry, choice

    def module(self, name: str) -> nn.Module:
        """A module of the denoiser, as it stands in the student."""
        return self._model[0].get_submodule(name)

    def place(self, entry: int) -> float:
        """The place of a grid entry along the sampler's steps, from 0 for the last step to 1 for the first."""
        return entry / max(1, len(self.grid) - 1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """The adapter of every layer at every entry of the grid, [entries, layers]."""
        if self.router is None:
            return self._table
        return torch.stack([self.router.logits(self.place(n)).argmax(-1) for n in range(len(self.grid))])

    def packed(self) -> dict[str, LayerPlan]:
        """The packed plans of all layers as trained."""
        table = self.table()
        return {
            name: twin.packed(table[:, number].tolist())  # type: ignore[operator]
            for number, (name, twin) in enumerate(zip(self.names, self.twins, strict=True))
        }

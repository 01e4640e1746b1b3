"""The model that is fine-tuned: trainable twins in the place of layers, and a router that chooses adapters by timestep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

Allocation = Literal["learned", "halves", "random"]  # who says which adapter a layer uses in a step


@final
class Router(nn.Module):
    """Which adapter every layer uses in a step: sinusoidal embedding, two layers, straight-through one-hot.

    What arXiv:2505.21591 says of it; width and one router for all layers are our choice. So are the low frequencies: with those
    usual for timesteps (up to 1,000 radians) an untrained router changes its mind between any two steps, and training has to
    undo that first. Every layer starts with logits of mean zero over the trajectory, so that all layers use several adapters:
    one that is never used has no gradient.
    """

    def __init__(self, layers: int, adapters: int, generator: torch.Generator) -> None:
        """For so many layers with so many adapters each."""
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
        """[layers, adapters]; `place` from 0, the sampler's last step, to 1, its first."""
        angles = (2 * place - 1) * torch.linspace(0, _FASTEST, _ROUTER_WIDTH // 2).to(self.inner.weight)
        hidden = F.silu(self.inner(torch.cat([angles.sin(), angles.cos()])))
        return self.outer(hidden).reshape(self.shape)

    def forward(self, place: float) -> Tensor:
        """One-hot [layers, adapters], with the gradient of the softmax."""
        shares = self.logits(place).softmax(-1)
        hard = F.one_hot(shares.argmax(-1), self.shape[1]).to(shares)
        return hard + shares - shares.detach()


def fixed_table(
    allocation: Allocation, entries: int, layers: int, adapters: int, generator: torch.Generator
) -> Tensor:
    """Adapter of every layer at every entry of the grid that nothing learns, [entries, layers], for comparison.

    "halves": adapters one after the other along the trajectory, equally long, all layers alike; "random": drawn apart for every
    layer and entry.
    """
    if allocation == "random":
        return torch.randint(adapters, (entries, layers), generator=generator)
    turns = torch.arange(entries - 1, -1, -1) * adapters // entries
    return turns[:, None].expand(entries, layers).contiguous()


@final
class Student(nn.Module):
    """A denoiser whose planned layers are trainable twins; everything else is the user's own, frozen.

    Attributes:
        grid: The timesteps that adapters and input ranges are learned for, ascending.
        twins: The trainable layers by their position in `names`.
        router: None with one adapter, or where nobody learns which one is used.
        allocation: Who says which adapter is used.
        carry: How adapters are carried out.
        adapter_init: What they started from.
    """

    _mixed: torch.dtype | None = None  # what `mixed_precision` says

    def __init__(
        self,
        model: nn.Module,
        plans: Mapping[str, LayerPlan],
        attention_plans: Mapping[str, AttentionPlan],
        grid: Sequence[float],
        *,
        adapters: int,
        rank: int,
        input_ranges_by_timestep: bool,
        carry: Carry = "merged",
        without_adapters: Sequence[str] = (),
        adapter_init: Init = "zero",
        allocation: Allocation = "learned",
        generator: torch.Generator,
    ) -> None:
        """Build the twins; `model` stays untouched.

        Args:
            model: The float denoiser.
            plans: Its layers, where training starts.
            attention_plans: Of the same plan.
            grid: Timesteps, in the unit of the denoiser's argument.
            adapters: Per layer; one is active at a time.
            rank: Of the adapters.
            input_ranges_by_timestep: Learn static input ranges apart for every entry of the grid.
            carry: How adapters are carried out, see `adapters`.
            without_adapters: Layers that learn ranges only.
            adapter_init: See `Adaptive`.
            allocation: Of several adapters to timesteps: by a router that learns it, or by `fixed_table`.
            generator: Draws the first values.
        """
        super().__init__()
        shadow = install.shadow(model, frozen=True)
        self.grid, self.names, self.carry, self.adapter_init = tuple(grid), list(plans), carry, adapter_init
        self.allocation, self.adapters, self._clock = allocation, adapters, Clock(shadow, self.grid)
        self.twins = nn.ModuleList(
            Adaptive(
                model.get_submodule(name),  # type: ignore[arg-type]
                plan,
                adapters=adapters,
                rank=0 if name in without_adapters else rank,
                entries=len(grid) if input_ranges_by_timestep else 1,
                init=adapter_init,
                carry=carry,
                generator=generator,
            )
            for name, plan in plans.items()
        )
        for name, twin in zip(self.names, self.twins, strict=True):
            hooks.hand_over(shadow.get_submodule(name), twin)
            install.replace(shadow, name, twin)
        attention.install(shadow, attention_plans)
        self.router, self._table = None, torch.zeros(len(grid), len(plans), dtype=torch.long)
        if adapters > 1 and allocation == "learned":
            device = next(model.parameters()).device
            self.router = Router(len(plans), adapters, generator).to(device)
        elif adapters > 1:
            self._table = fixed_table(allocation, len(grid), len(plans), adapters, generator)
        self._model = [shadow]  # in a list: its frozen tensors are neither trained nor saved

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser; all rows must have one timestep."""
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
        """One-hot [layers, adapters] of a grid entry; None with one adapter."""
        if self.router is not None:
            choices: Tensor = self.router(self.place(entry))
            return choices
        if self.adapters < 2:
            return None
        device = next(self._model[0].parameters()).device
        return F.one_hot(self._table[entry], self.adapters).float().to(device)

    @contextmanager
    def mixed_precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, calls compute under `torch.autocast` in `dtype`; None computes in the dtypes of the weights."""
        before, self._mixed = self._mixed, dtype
        try:
            yield
        finally:
            self._mixed = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For a call between a step's forward and backward pass: ranges and adapters are afterwards what they were.

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
        """Where a grid entry lies along the sampler's steps: 0 the last one, 1 the first."""
        return entry / max(1, len(self.grid) - 1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Adapter of every layer at every entry of the grid, [entries, layers]."""
        if self.router is None:
            return self._table
        return torch.stack([self.router.logits(self.place(n)).argmax(-1) for n in range(len(self.grid))])

    def packed(self) -> dict[str, LayerPlan]:
        """All layers as trained."""
        table = self.table()
        return {
            name: twin.packed(table[:, number].tolist())  # type: ignore[operator]
            for number, (name, twin) in enumerate(zip(self.names, self.twins, strict=True))
        }

"""The model that is fine-tuned: trainable twins in the place of layers, and a router that chooses adapters by timestep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difloat import attention, hooks, install
from difloat.methods.adapters import Adaptive, Carry, Init
from difloat.quantizer import LayerPlan
from difloat.specs import AttentionPlan
from difloat.timesteps import Clock

_ROUTER_WIDTH = 128


@final
class Router(nn.Module):
    """Which adapter every layer uses at a timestep: sinusoidal embedding, two layers, straight-through one-hot.

    What arXiv:2505.21591 says of it; width and one router for all layers are our choice.
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

    def logits(self, timestep: float) -> Tensor:
        """[layers, adapters]; `timestep` from 0 to 1, the start of the schedule."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), _ROUTER_WIDTH // 2))
        angles = timestep * frequencies.to(self.inner.weight)
        hidden = F.silu(self.inner(torch.cat([angles.sin(), angles.cos()])))
        return self.outer(hidden).reshape(self.shape)

    def forward(self, timestep: float) -> Tensor:
        """One-hot [layers, adapters], with the gradient of the softmax."""
        shares = self.logits(timestep).softmax(-1)
        hard = F.one_hot(shares.argmax(-1), self.shape[1]).to(shares)
        return hard + shares - shares.detach()


@final
class Student(nn.Module):
    """A denoiser whose planned layers are trainable twins; everything else is the user's own, frozen.

    Attributes:
        grid: The timesteps that adapters and input ranges are learned for, ascending.
        twins: The trainable layers by their position in `names`.
        router: None with one adapter.
        carry: How adapters are carried out.
        adapter_init: What they started from.
    """

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
            generator: Draws the first values.
        """
        super().__init__()
        shadow = install.shadow(model, frozen=True)
        self.grid, self.names, self.carry = tuple(grid), list(plans), carry
        self.adapter_init = adapter_init
        self._clock = Clock(shadow, self.grid)
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
        self.router = None
        if adapters > 1:
            device = next(model.parameters()).device
            self.router = Router(len(plans), adapters, generator).to(device)
        self._model = [shadow]  # in a list: its frozen tensors are neither trained nor saved

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser; all rows must have one timestep."""
        entry = int(self._clock.nearest(args, kwargs))
        choices = None if self.router is None else self.router(self.scaled(entry))
        for number, twin in enumerate(self.twins):
            assert isinstance(twin, Adaptive)
            twin.entry = entry
            twin.choice = None if choices is None else choices[number]
        return self._model[0](*args, **kwargs)

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

    def scaled(self, entry: int) -> float:
        """A grid entry's timestep from 0 to 1."""
        return self.grid[entry] / max(self.grid[-1], 1e-12)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Adapter of every layer at every entry of the grid, [entries, layers]."""
        if self.router is None:
            return torch.zeros(len(self.grid), len(self.names), dtype=torch.long)
        return torch.stack([self.router.logits(self.scaled(n)).argmax(-1) for n in range(len(self.grid))])

    def packed(self) -> dict[str, LayerPlan]:
        """All layers as trained."""
        table = self.table()
        return {
            name: twin.packed(table[:, number].tolist())  # type: ignore[operator]
            for number, (name, twin) in enumerate(zip(self.names, self.twins, strict=True))
        }

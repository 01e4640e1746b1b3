"""Learned rounding: every weight goes to the grid value below or above it, whichever keeps the block's output.

One loop serves integer and floating-point grids. A weight between its grid neighbours ``low`` and ``high`` becomes
``low + (high - low) * h(v)``, with the rectified sigmoid h of AdaRound (arXiv:2004.10568 Eq. 23). The distance of the
neighbours stays at its initial value, which on a floating-point grid is the step of the binade of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difloat import torch_modes
from difloat.methods.soft_rounding import SoftWeight
from difloat.methods.trace import Call, select, tensors_of
from difloat.plan.coded import Coded
from difloat.plan.rules import Draft


@dataclass(frozen=True)
class RoundingSettings:
    """How rounding is learned.

    Attributes:
        iterations: Optimiser steps per block.
        rows: Denoiser rows in one step. There are fewer where they would have more than `positions` positions.
        positions: The most tokens or pixels of the block's output in one step, which has one row at least.
        learning_rate: The rate of Adam for the rounding variables.
        regularization: The weight of the term that drives h to 0 or 1.
        warmup: The share of the iterations without that term.
        beta: The exponent of that term, which falls linearly from the first to the second value after the warm-up.
        scale_aware: Whether rounding variables are in units of the weight (arXiv:2503.15465 Eq. 8) instead of unitless.
        precision: The precision of the block's matrix products. The variables, the loss and Adam are always float32.
        held_out: The share of the rows that are not learned from and judge the result. With 0 all rows do both.
        checks: How often the hard rounding is judged on the way. The best one is kept.
    """

    iterations: int = 400
    rows: int = 16
    positions: int = 4096
    learning_rate: float = 0.3
    regularization: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    scale_aware: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    held_out: float = 0.0
    checks: int = 1


@dataclass(frozen=True)
class Learned:
    """The result for one block: every layer's values on the grid, and the relative output error before and after."""

    weights: dict[str, Tensor]
    error_nearest: float
    error_learned: float


def learn_rounding(
    block: nn.Module,
    drafts: Mapping[str, Draft | Coded],
    inputs: Call,
    targets: list[Tensor],
    settings: RoundingSettings,
    generator: torch.Generator,
    on_step: Callable[[], object] = lambda: None,
) -> Learned:
    """Learn the rounding of the layers of one block.

    The loss is the squared error of the block's output, relative to the size of that output so that one regularisation fits all
    blocks, plus ``regularization * sum(1 - |2h - 1|**beta)``. If the learned rounding is worse than the start (rounding to
    nearest, or the codes of a plan) on the rows that judge, the start is returned.

    Args:
        block: The module, which stays untouched.
        drafts: The layers of the block by their names inside it ("" for the block itself), as floats or with codes.
        inputs: The arguments of the block for all rows.
        targets: The outputs of the block in full precision, [rows, ...] each.
        settings: How rounding is learned.
        generator: The generator that draws the rows of every step.
        on_step: A function that is called after every step, for progress bars.
    """
    soft = {name: SoftWeight(draft, settings.scale_aware) for name, draft in drafts.items()}
    loss_of = _Reconstruction(block, inputs, targets, settings)
    optimizer = torch.optim.Adam([s.variable for s in soft.values()], lr=settings.learning_rate, fused=True)
    # Judged on all rows, or those held out: the loss of a step is of a few rows, and of soft weights.
    taught, judges = _shared_out(loss_of.count, settings.held_out)
    best = {name: _nearest(draft) for name, draft in drafts.items()}
    error = start_error = loss_of.total(best, judges)
    every = -(-settings.iterations // settings.checks)
    for iteration in range(settings.iterations):
        # With repeats, so that a step is the same whatever the steps before it drew.
        index = torch.randint(taught, (min(loss_of.rows, taught),), generator=generator)
        beta = _beta(iteration / settings.iterations, settings)
        for each in soft.values():
            each.pull = None if beta is None else (settings.regularization, beta)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of({name: s.soft() for name, s in soft.items()}, index)
        torch_modes.check_gradients(loss)
        loss.backward()
        optimizer.step()
        on_step()
        if (iteration + 1) % every == 0 or iteration + 1 == settings.iterations:
            hard = {name: s.hard() for name, s in soft.items()}
            now = loss_of.total(hard, judges)
            if now <= error:
                best, error = hard, now
    return Learned(best, start_error, error)


def _shared_out(count: int, held_out: float) -> tuple[int, Tensor]:
    """How many of the rows, from the first on, are learned from, and the numbers of those that judge."""
    held = min(round(held_out * count), count - 1)
    return count - held, torch.arange(count - held if held else 0, count)


def _nearest(draft: Draft | Coded) -> Tensor:
    low, high, position = draft.grid_neighbours()  # [o, i, *k] each
    return torch.where(position > 0.5, high, low)


def _beta(progress: float, settings: RoundingSettings) -> float | None:
    """The exponent of the regulariser at a progress in [0, 1), or None during the warm-up."""
    if progress < settings.warmup:
        return None
    start, end = settings.beta
    return start + (end - start) * (progress - settings.warmup) / (1 - settings.warmup)


class _Reconstruction:
    """The relative squared error of a block's output under other weights, summed over channels (BRECQ, arXiv:2102.05426)."""

    def __init__(
        self, block: nn.Module, inputs: Call, targets: list[Tensor], settings: RoundingSettings
    ) -> None:
        self.block, self.inputs, self.targets = block, inputs, targets
        self.count = targets[0].shape[0]
        positions = targets[0][0].numel() // _channels(targets[0])
        self.rows = max(1, min(settings.rows, settings.positions // positions))
        self.half = settings.precision == "bfloat16"
        self.weights = [
            _channels(target) / target.float().square().mean().clamp_min(1e-12) for target in targets
        ]
        # No gradients in the user's model. They would cost time and memory, and torch 2.13 crashes on the CPU when it
        # makes those of a GroupNorm whose channels-last input needs none.
        self.fixed = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def __call__(self, weights: Mapping[str, Tensor], index: Tensor) -> Tensor:
        args, kwargs = select(self.inputs, self.count, index)
        named = {f"{name}.weight" if name else "weight": weight for name, weight in weights.items()}
        # Rounding variables are float32, but a block computes in the dtype of its weights.
        parameters = {name: w.to(self.fixed[name].dtype) for name, w in named.items()}
        with torch.autocast(self.targets[0].device.type, torch.bfloat16, enabled=self.half):
            outputs = tensors_of(functional_call(self.block, self.fixed | parameters, args, kwargs))
        return sum(  # type: ignore[return-value]
            (output.float() - target[index].float()).square().mean() * weight
            for output, target, weight in zip(outputs, self.targets, self.weights, strict=True)
        )

    @torch.no_grad()
    def total(self, weights: Mapping[str, Tensor], rows: Tensor) -> float:
        """The error over some rows."""
        chunks = rows.split(self.rows)
        return float(sum(float(self(weights, chunk)) * len(chunk) for chunk in chunks)) / len(rows)


def _channels(target: Tensor) -> int:
    return target.shape[1] if target.dim() == 4 else target.shape[-1]


def relative_error(outputs: Any, targets: Any) -> float:
    """The squared error of outputs relative to the squared size of their targets."""
    difference = sum(float((o - t).square().sum()) for o, t in zip(outputs, targets, strict=True))
    return difference / max(sum(float(t.square().sum()) for t in targets), 1e-30)

"""Held forward passes: same results as running through, in step with changed weights, and nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from difloat.methods.paused_forwards import Passes


class Skips(nn.Module):
    """Three blocks with a long skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor, note: str = "") -> torch.Tensor:
        first = self.blocks[0](x + shift)
        middle = self.blocks[1](first.relu())
        return self.blocks[2](middle + first)


def calls_of(count: int, generator: torch.Generator) -> list:
    return [
        ((torch.randn(rows, 6, generator=generator),), {"shift": torch.ones(6), "note": "a"})
        for rows in range(2, 2 + count)
    ]


def threads() -> int:
    return sum(thread.is_alive() for thread in threading.enumerate())


def test_inputs_and_outputs_are_those_of_a_plain_pass(generator) -> None:
    model, calls = Skips(), calls_of(3, generator)
    before = threads()
    with Passes(model, calls) as passes, torch.no_grad():
        x = torch.cat([args[0] for args, _ in calls]) + 1
        first = model.blocks[0](x)
        torch.testing.assert_close(passes.enter("blocks.0")[0][0], x)
        torch.testing.assert_close(passes.leave("blocks.0")[0], first)
        middle = model.blocks[1](first.relu())
        torch.testing.assert_close(passes.enter("blocks.2")[0][0], middle + first)
        torch.testing.assert_close(passes.leave("blocks.2")[0], model.blocks[2](middle + first))
    assert threads() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_waiting_pass_runs_on_with_changed_weights(generator) -> None:
    model, calls = Skips(), calls_of(2, generator)
    with Passes(model, calls) as passes, torch.no_grad():
        (x,), _ = passes.enter("blocks.1")
        model.blocks[1].weight.zero_()
        model.blocks[1].bias.fill_(3.0)
        (entered,), _ = passes.enter("blocks.2")
        first = model.blocks[0](torch.cat([args[0] for args, _ in calls]) + 1)
        torch.testing.assert_close(entered, first + 3)
        assert len(x) == len(entered) == 5


def test_an_earlier_module_is_not_reached_again_and_is_named(generator) -> None:
    before = threads()
    with (
        pytest.raises(ValueError, match=r"'blocks.0' must be called"),
        Passes(Skips(), calls_of(2, generator)) as passes,
    ):
        passes.leave("blocks.2")
        passes.enter("blocks.0")
    assert threads() == before


def test_what_the_model_raises_arrives_and_no_thread_stays() -> None:
    before = threads()
    bad = [((torch.zeros(2, 6),), {"shift": torch.zeros(7)})]
    with pytest.raises(RuntimeError, match="size"), Passes(Skips(), bad * 2) as passes:
        passes.enter("blocks.0")
    assert threads() == before

"""Who says which adapter a layer uses in a step: a router whose table is smooth from the start, halves, or chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from difloat import recipes
from difloat.calibration.collect import CalibrationSettings, collect_from_loop
from difloat.methods.task import Task
from difloat.methods.training.student import Router, fixed_table
from difloat.plan.rules import Bits

LAYERS = 100


def switches(table: Tensor) -> Tensor:
    """How often every layer changes its adapter along the entries of a table."""
    return (table[1:] != table[:-1]).sum(0)


def untrained(seed: int, adapters: int = 2, steps: int = 50) -> Tensor:
    router = Router(LAYERS, adapters, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.stack([router.logits(n / (steps - 1)).argmax(-1) for n in range(steps)])


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_router_hardly_switches(seed: int) -> None:
    changed = switches(untrained(seed))
    assert float((changed <= 2).float().mean()) >= 0.99 and int(changed.max()) <= 3
    assert float(changed.float().mean()) < 1.5


def test_every_adapter_is_used_from_the_start_so_that_each_has_a_gradient() -> None:
    for seed in range(5):
        table = untrained(seed)
        assert all((table == adapter).any(0).all() for adapter in range(2))


def test_more_steps_are_no_more_switches() -> None:
    few, many = (switches(untrained(3, steps=steps)).float().mean() for steps in (20, 1000))
    assert float(many) == pytest.approx(float(few), abs=0.1)


def test_a_router_can_learn_any_of_many_phases() -> None:
    """Low frequencies bound where it starts, not where it ends."""
    router = Router(2, 2, torch.Generator().manual_seed(0))
    places = torch.linspace(0, 1, 12)
    wanted = torch.stack(
        [(4 * places).long() % 2, (2 * places).long().clamp(max=1)], 1
    )  # four phases, and two
    optimizer = torch.optim.AdamW(router.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(300):
        logits = torch.stack([router.logits(float(place)) for place in places])
        nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = torch.stack([router.logits(float(place)).argmax(-1) for place in places])
    assert float((learned == wanted).float().mean()) > 0.9


@pytest.mark.parametrize(("entries", "adapters"), [(50, 2), (7, 3), (2, 4), (1, 2)])
def test_halves_are_equal_stretches_from_the_first_step_on(entries: int, adapters: int) -> None:
    table = fixed_table("halves", entries, 3, adapters, torch.Generator())
    in_order = table.flip(0)  # of the sampler
    assert table.shape == (entries, 3) and (table == table[:, :1]).all()
    assert int(in_order[0, 0]) == 0 and (in_order.diff(dim=0) >= 0).all()
    counts = in_order[:, 0].bincount(minlength=adapters)
    assert int(counts.max() - counts.min()) <= 1


def test_random_tables_belong_to_the_seed() -> None:
    one, same, other = (
        fixed_table("random", 50, LAYERS, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert 20 < float(switches(one).float().mean()) < 30


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(sample)) + torch.cos(timestep.reshape(-1, 1).float() / 300)
        return self.third(torch.tanh(self.second(hidden)))


def sample_with(module: nn.Module) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in (900, 700, 500, 300, 100):
        x = x - 0.1 * module(x, torch.full((4,), timestep))


def prepared() -> Task:
    torch.manual_seed(0)
    model = Denoiser()
    data = collect_from_loop(model, sample_with, CalibrationSettings(samples=20), progress=False)
    return Task(model, data, Bits.parse("w4a8"), progress=False)


OPTIONS = {"epochs": 2, "rows": 4, "rank": 2, "dfa": False, "keep_8bit": ()}


@pytest.mark.parametrize("carry", ["merged", "side"])
@pytest.mark.parametrize("allocation", ["learned", "halves", "random"])
def test_msfp_packs_what_the_allocation_says(allocation: str, carry: str) -> None:
    task = prepared()
    options = {**OPTIONS, "allocation": allocation, "carry": carry}
    plan = recipes.plan(task, "msfp", "w4a8", options)
    table = torch.tensor(plan.measured["router"])
    assert plan.options["allocation"] == allocation and table.shape == (5, 3)
    if allocation == "halves":
        assert table.flip(0)[:, 0].tolist() == [0, 0, 0, 1, 1]
    if carry == "merged":
        for number, layer in enumerate(plan.layers.values()):
            own = table[:, number].tolist()
            used = sorted(set(own))
            assert list(layer.schedule) == ([used.index(one) for one in own] if len(used) > 1 else [])
    again = recipes.plan(task, "msfp", "w4a8", options)
    assert again.measured["losses"] == plan.measured["losses"]


def test_an_interrupted_run_is_not_gone_on_with_under_another_allocation(tmp_path) -> None:
    task = replace(prepared(), work_dir=tmp_path)
    runs = [
        recipes.plan(task, "msfp", "w4a8", {**OPTIONS, "allocation": one}) for one in ("halves", "random")
    ]
    assert runs[0].measured["losses"] != runs[1].measured["losses"]


def test_an_allocation_needs_several_adapters() -> None:
    with pytest.raises(ValueError, match="allocation must come with several adapters, got allocation=halves"):
        recipes.plan(prepared(), "msfp", "w4a8", {**OPTIONS, "adapters": 1, "allocation": "halves"})
    with pytest.raises(ValueError, match="router_rate must come with a router"):
        recipes.plan(prepared(), "msfp", "w4a8", {**OPTIONS, "allocation": "halves", "router_rate": 0.1})

"""Which row comes before which, from the calls of samplers, against what the samplers really did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difloat.calibration.collect import CalibrationSettings, collect, collect_from_loop
from difloat.calibration.trajectory import Course, conditional_part, rows_before, rows_beside
from tiny import PROMPTS, tiny_ddim, tiny_unet

# diffusers hands torch tensors to numpy 2 in its schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def points(calls: list[tuple[float, int]]) -> list[tuple[int, int, int]]:
    course, found = Course(), []
    for timestep, batch in calls:
        course.advance(timestep, batch)
        found.append((course.passes, course.repeat, course.step))
    return found


def test_steps_go_on_in_one_direction() -> None:
    assert points([(9, 2), (5, 2), (1, 2), (9, 2), (5, 2)]) == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 0, 2),
        (2, 0, 0),
        (2, 0, 1),
    ]
    assert points([(0.1, 2), (0.5, 2), (0.1, 2)]) == [(1, 0, 0), (1, 0, 1), (2, 0, 0)]
    assert points([(9, 2), (5, 1)]) == [(1, 0, 0), (2, 0, 0)]  # another batch is another picture


def test_guidance_in_two_calls_makes_two_trajectories() -> None:
    assert points([(9, 1), (9, 1), (5, 1), (5, 1)]) == [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]


def test_rows_before_are_of_the_same_trajectory_or_missing() -> None:
    rows = [
        ("a", 0, 0),
        ("b", 0, 1),
        ("a", 0, 2),
        ("a", 0, 1),
        ("", 0, 1),
        ("b", 0, 3),
        ("a", 1, 1),
        ("a", 1, 2),
    ]
    assert rows_before(rows) == [0, None, 3, 0, None, None, None, 6]


def test_rows_beside_are_the_other_part_of_the_same_point_or_missing() -> None:
    rows = [
        ("a", 1, 0),
        ("a", 0, 0),
        ("b", 1, 0),
        ("a", 2, 0),
        ("", 0, 0),
        ("", 1, 0),
        ("a", 1, 3),
        ("a", 0, 2),
    ]
    assert rows_beside(rows, "xxxxxxxx") == [1, None, None, 0, None, None, None, None]
    assert rows_beside(rows, "xyxyxyxy") == [None] * 8  # a corrector's call, of another sample


def test_the_conditional_part_shows_more_different_conditions() -> None:
    assert conditional_part([0, 1, 0, 1], ["", "cat", "", "dog"]) == 1
    assert conditional_part([0, 1, 0, 1], ["cat", "", "dog", ""]) == 0
    assert conditional_part([0, 1, 0, 1], ["", "cat", "", "cat"]) is None
    assert conditional_part([0, 0], ["a", "b"]) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rows_beside_are_of_the_same_sample_without_its_prompt(seed: int) -> None:
    settings = CalibrationSettings(samples=40, steps=4, prompts_per_batch=3, seed=seed)
    data = collect(tiny_unet(), PROMPTS, settings, progress=False)
    pairs = [(row, other) for row, other in enumerate(data.beside) if other is not None]
    assert len(pairs) > 12  # of 20 at most: the halves of guidance are kept together
    for row, other in pairs:
        (mine, mine_too), (its, its_too) = (data.batch([number]) for number in (row, other))
        assert torch.equal(mine[0], its[0]) and data.timesteps[row] == data.timesteps[other]
        assert not torch.equal(mine_too["encoder_hidden_states"], its_too["encoder_hidden_states"])
    assert data.conditional_part == 1


@pytest.mark.parametrize("make", [tiny_unet, tiny_ddim])
def test_the_row_before_is_what_the_sampler_saw_one_step_earlier(make) -> None:
    pipeline = make()
    seen: list[torch.Tensor] = []  # samples of all calls, in order
    handle = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True
    )
    settings = CalibrationSettings(samples=40, steps=4, prompts_per_batch=3)
    data = collect(pipeline, PROMPTS if make is tiny_unet else None, settings, progress=False)
    handle.remove()
    place = {}
    for number, batch in enumerate(seen):
        for index, row in enumerate(batch):
            place.setdefault(row.numpy().tobytes(), []).append((number, index))

    def places(row: int) -> list[tuple[int, int]]:
        args, kwargs = data.batch([row])
        return place[args[0][0].numpy().tobytes()]

    kept = [(row, before) for row, before in enumerate(data.before) if before not in (None, row)]
    assert len(kept) > 5
    for row, before in kept:
        assert {(number - 1, index) for number, index in places(row)} & set(places(before))
        now, then = (data.batch([number])[1].get("encoder_hidden_states") for number in (row, before))
        assert now is None or torch.equal(now, then)  # the same prompt, the same half of guidance
    first = max(data.timesteps)
    assert {data.timesteps[row] for row, before in enumerate(data.before) if before == row} == {first}


def test_a_loop_has_trajectories_and_clean_latents_have_none() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layer(sample)

    def loop(module: nn.Module) -> None:
        for _ in range(2):
            x = torch.randn(3, 4)
            for timestep in (900, 500, 100):
                x = x - module(x, torch.full((3,), timestep))

    data = collect_from_loop(Denoiser(), loop, CalibrationSettings(samples=18), progress=False)
    assert None not in data.before
    for row, before in enumerate(data.before):
        step = {900.0: 900.0, 500.0: 900.0, 100.0: 500.0}
        assert data.timesteps[before] == step[data.timesteps[row]]
    settings = CalibrationSettings(samples=8, steps=2, prompts_per_batch=2, timesteps="clean")
    assert set(collect(tiny_unet(), PROMPTS, settings, progress=False).before) == {None}

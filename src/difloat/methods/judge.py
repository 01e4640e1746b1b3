"""Whether an optional part of a plan is worth having, judged on trajectories that the part did not learn from.

What counts is what the sampler goes on with: with guidance ``u + g (c - u)``. Of every held-out trajectory the squared errors
of that, at the points that calibration kept of it, weighed by timestep, are summed before and after. Their ratio in dB is one
number per trajectory, and a mean over them with its interval says whether the part is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difloat.calibration.batch_axis import predict
from difloat.calibration.collect import Calibration
from difloat.layers import install
from difloat.methods.intervals import Estimate, mean_interval
from difloat.methods.post_training import Outcome
from difloat.methods.sensitivity import Probe, guided_points, seen_by_sampler
from difloat.methods.task import Task
from difloat.plan.plan import Plan

_SHARE = 4  # one trajectory in so many is held out
_FEWEST = 2  # trajectories of which there is an interval
JUDGED = 3
"""Passes over held-out rows that a verdict takes: full precision, without the part, with it."""


@dataclass(frozen=True)
class Verdict:
    """What became of an optional part.

    Attributes:
        part: The name of the part.
        kept: Whether the plan has it.
        gain: The fall of the squared error of the guided output in dB, as a mean over trajectories with its interval.
        trajectories: How many were held out.
        rows: How many rows the denoiser computed for it.
        pictures: The same in full-precision pictures, None where calibration has no measure of one.
    """

    part: str
    kept: bool
    gain: Estimate
    trajectories: int
    rows: int
    pictures: float | None

    def report(self) -> dict[str, Any]:
        """Plain data for a plan's measurements."""
        return {**vars(self), "gain": vars(self.gain)}


def apart(data: Calibration, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from, and those of the trajectories that are held out.

    Raises:
        ValueError: if the rows are of too few trajectories to hold some out.
    """
    names = sorted(set(data.trajectories))
    count = len(names) // _SHARE
    if count < _FEWEST:
        raise ValueError(
            f"rows must come from at least {_FEWEST * _SHARE} trajectories, so that some can be held out, got {len(names)}; "
            f"calibrate with more rows and trajectories={_FEWEST * _SHARE} or more"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {names[number] for number in order[:count]}
    rows = list(range(len(data)))
    return [r for r in rows if data.trajectories[r] not in held], [
        r for r in rows if data.trajectories[r] in held
    ]


def judge(
    task: Task,
    held: Sequence[int],
    part: str,
    before: Outcome,
    after: Outcome,
    *,
    guidance: float,
    weights: Mapping[float, float],
    strict: bool,
) -> Verdict:
    """Compare two outcomes on held-out rows.

    Args:
        task: Model and all rows.
        held: The rows that are held out.
        part: What `after` has and `before` has not.
        before: The layers without the part.
        after: The layers with it.
        guidance: The sampler's scale g, where rows come in pairs.
        weights: The weight of a squared error at every timestep.
        strict: Whether the part is kept only if the whole 95 % interval of its gain lies above zero, or if its mean does.
    """
    probes = _by_trajectory(task, held, weights)
    exact = _outputs(task.model, probes, guidance)
    errors = []
    for outcome in (before, after):
        layers = Plan(
            "", str(task.bits), outcome.layers, attention=outcome.attention, timesteps=outcome.timesteps
        )
        twin = install.apply(install.shadow(task.model), layers)
        found = _outputs(twin, probes, guidance)
        errors.append([float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)])
    floor = 1e-12 * max(1e-30, max(errors[0]))  # of a plan without error
    ratios = torch.tensor(
        [(b + floor) / (a + floor) for b, a in zip(*errors, strict=True)], dtype=torch.float64
    )
    gain = mean_interval(10 * ratios.log10(), seed=task.seed)
    rows = 3 * sum(len(probe.weights) * (2 if probe.paired else 1) for probe in probes)
    of_picture = task.calibration.pace.picture_rows
    kept = (gain.low if strict else gain.value) > 0
    return Verdict(part, kept, gain, len(probes), rows, None if of_picture is None else rows / of_picture)


def _by_trajectory(task: Task, held: Sequence[int], weights: Mapping[float, float]) -> list[Probe]:
    """A call with the points of every held-out trajectory."""
    data, among = task.calibration, set(held)
    points, paired = guided_points(task)
    of_trajectory: dict[str, list[tuple[int, ...]]] = {}
    for point in points:
        if among.issuperset(point):
            of_trajectory.setdefault(data.trajectories[point[0]], []).append(point)
    return [
        Probe(
            data.batch([row for point in own for row in point]),
            tuple(weights[data.timesteps[point[0]]] for point in own),
            paired,
        )
        for own in of_trajectory.values()
    ]


@torch.no_grad()
def _outputs(model: nn.Module, probes: Sequence[Probe], guidance: float) -> list[torch.Tensor]:
    found = []
    for probe in probes:
        args, kwargs = probe.call
        found.append(seen_by_sampler(predict(model, args, kwargs), probe, guidance).cpu())
    return found

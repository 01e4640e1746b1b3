"""Denoising factors against the formulas of the samplers."""

from __future__ import annotations

import inspect
import itertools
import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    schedulers,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from difloat import reference
from difloat.calibration.collect import CalibrationSettings, collect
from difloat.methods.task import Task
from difloat.methods.training import timestep_weights
from difloat.methods.training.timestep_weights import denoising_factors, loss_weights, normalised
from difloat.plan.rules import Bits
from difloat.reference_models import NAMES as REFERENCE_MODELS
from family_table import FAMILIES
from tiny import PROMPTS, tiny_ddim, tiny_pixart, tiny_unet

OF_NUMPY_2 = pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' own
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 10


def previous(scheduler: object, timestep: int) -> torch.Tensor:
    before = timestep - scheduler.config.num_train_timesteps // STEPS
    return scheduler.alphas_cumprod[before] if before >= 0 else torch.tensor(1.0)


def test_ddpm_is_the_formula_of_the_paper() -> None:
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    for timestep, factor in denoising_factors(scheduler, STEPS).items():
        now, before = scheduler.alphas_cumprod[int(timestep)], previous(scheduler, int(timestep))
        alpha = now / before  # of the whole stride; with 1000 steps it is the paper's a_t
        expected = (1 - alpha) / (alpha.sqrt() * (1 - now).sqrt())
        assert factor == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim(prediction: str) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=prediction)
    for timestep, factor in denoising_factors(scheduler, STEPS).items():
        now, before = (
            float(x) for x in (scheduler.alphas_cumprod[int(timestep)], previous(scheduler, int(timestep)))
        )
        of_sample, of_noise = {
            "epsilon": (-math.sqrt((1 - now) / now), 1.0),
            "v_prediction": (-math.sqrt(1 - now), math.sqrt(now)),
            "sample": (1.0, -math.sqrt(now / (1 - now))),
        }[prediction]
        expected = math.sqrt(before) * of_sample + math.sqrt(1 - before) * of_noise
        assert factor == pytest.approx(abs(expected), rel=1e-4)


def test_dpm_solver_of_first_order() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, solver_order=1)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    for index, factor in enumerate(denoising_factors(scheduler, STEPS).values()):
        alpha, sigma = 1 / (1 + sigmas[index] ** 2).sqrt(), sigmas[index] / (1 + sigmas[index] ** 2).sqrt()
        alpha_next = 1 / (1 + sigmas[index + 1] ** 2).sqrt()
        ratio = sigmas[index + 1] / sigmas[index]  # exp(-h)
        assert factor == pytest.approx(float(alpha_next * (1 - ratio) * sigma / alpha), rel=1e-3)


def test_flow_matching_is_the_difference_of_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    factors = denoising_factors(scheduler, STEPS)
    scheduler.set_timesteps(STEPS)
    expected = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).abs()
    assert list(factors.values()) == pytest.approx(expected.tolist(), rel=1e-3)
    assert list(factors) == scheduler.timesteps.double().tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_is_ddim_in_other_coordinates(prediction: str) -> None:
    """The same step of the same equation at the same noise levels moves the picture by the same."""
    more = {"prediction_type": prediction, "timestep_spacing": "leading", "steps_offset": 1}
    ddim = denoising_factors(DDIMScheduler(**BETAS, **more, clip_sample=False, set_alpha_to_one=True), STEPS)
    euler = denoising_factors(EulerDiscreteScheduler(**BETAS, **more), STEPS)
    assert list(euler) == list(ddim) and len(ddim) == STEPS
    assert list(euler.values()) == pytest.approx(list(ddim.values()), rel=1e-3)
    heun = timestep_weights._factors_of_calls(HeunDiscreteScheduler(**BETAS, **more), STEPS, {})
    assert [factor for _, factor in heun[0::2]] == pytest.approx(list(ddim.values()), rel=1e-3)


def test_euler_ancestral_is_ddpm_in_other_coordinates() -> None:
    more = {"timestep_spacing": "leading", "steps_offset": 1}
    ancestral = denoising_factors(EulerAncestralDiscreteScheduler(**BETAS, **more), STEPS)
    ddpm = denoising_factors(DDPMScheduler(**BETAS, **more, clip_sample=False), STEPS)
    assert ancestral == pytest.approx(ddpm, rel=1e-3)


def test_edm_is_the_angle_that_a_step_turns() -> None:
    """What a velocity moves in variance-preserving coordinates, for data as wide as `sigma_data`."""
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    factors = list(denoising_factors(scheduler, STEPS).values())
    scheduler.set_timesteps(STEPS)
    angles = [math.atan(float(sigma) / 0.5) for sigma in scheduler.sigmas]
    expected = [0.5 * math.sin(a - b) for a, b in itertools.pairwise(angles)]
    assert factors == pytest.approx(expected, rel=1e-3)


def every_scheduler() -> list[type]:
    found = (getattr(schedulers, name) for name in dir(schedulers))
    classes = [one for one in found if inspect.isclass(one) and issubclass(one, SchedulerMixin)]
    return sorted({one for one in classes if one is not SchedulerMixin}, key=lambda one: one.__name__)


SECOND_ORDER = "KDPM2|SDE|Heun"  # read samples between the timesteps, too
STAGED = ("HeliosScheduler", "HeliosDMDScheduler")  # timesteps of a stage each, below
REFUSED = {  # of tokens or grids, with further arguments or several calls inside of a step, or unlike any other
    *("AmusedScheduler", "BlockRefinementScheduler", "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler"),
    *("DDPMWuerstchenScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
    *("KarrasVeScheduler", "PiflowScheduler", "RFD4ProteinaScheduler", "RePaintScheduler"),
    *("SCMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "VQDiffusionScheduler"),
}


@OF_NUMPY_2
@pytest.mark.parametrize(
    "make", [one for one in every_scheduler() if one.__name__ not in (*REFUSED, *STAGED)]
)
def test_no_schedulers_factor_depends_on_its_coordinates(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a sample at a timestep is what the scheduler itself makes of a clean one by adding noise."""
    scheduler = make()
    calls = timestep_weights._factors_of_calls(scheduler, 12, {})
    monkeypatch.setattr(timestep_weights, "_spread", lambda *_: 1.0)
    bare = timestep_weights._factors_of_calls(scheduler, 12, {})
    assert len(calls) == len(bare) >= 11
    scheduler.set_timesteps(12)
    if not hasattr(scheduler, "add_noise") or re.search(SECOND_ORDER, make.__name__):
        return
    spreads = [
        without / factor if factor else 1.0 for (_, without), (_, factor) in zip(bare, calls, strict=True)
    ]
    data = scheduler.config.get("sigma_data") or 1.0
    for spread, timestep in zip(spreads, scheduler.timesteps[1:], strict=False):
        signal = float(scheduler.add_noise(torch.ones(1), torch.zeros(1), timestep[None]))
        noise = float(scheduler.add_noise(torch.zeros(1), torch.ones(1), timestep[None]))
        flow = signal + noise == pytest.approx(1, abs=1e-4)
        assert spread == pytest.approx(1.0 if flow else math.hypot(data * signal, noise) / data, rel=1e-3)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_others_are_refused_in_a_sentence(name: str) -> None:
    make = getattr(schedulers, name)
    needs = {
        "AmusedScheduler": {"mask_token_id": 7},
        "VQDiffusionScheduler": {"num_vec_classes": 8},
        "RFD4ProteinaScheduler": None,
    }.get(name, {})
    if needs is None:
        pytest.skip("is not built without a model's own settings")
    scheduler = make(**needs)
    with pytest.raises(ValueError):
        denoising_factors(scheduler, 12)


@OF_NUMPY_2
def test_a_stage_of_helios_is_flow_matching_between_its_sigmas() -> None:
    scheduler = HeliosScheduler()
    scheduler.set_timesteps(12, 0)
    assert list(denoising_factors(scheduler)) == scheduler.timesteps.tolist()
    assert timestep_weights._read(scheduler, scheduler.timesteps[0]) == 1.0


@OF_NUMPY_2
@pytest.mark.parametrize(
    "make", [KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler, HeunDiscreteScheduler]
)
def test_samplers_of_second_order_weigh_the_start_like_ddim(make: type) -> None:
    def first_quarter(scheduler: object) -> float:
        squares = [factor**2 for factor in denoising_factors(scheduler, 30).values()]
        return sum(squares[: len(squares) // 4]) / sum(squares)

    ddim = DDIMScheduler(**BETAS, set_alpha_to_one=True, steps_offset=1, clip_sample=False)
    assert first_quarter(make(**BETAS)) == pytest.approx(first_quarter(ddim), abs=0.15)


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_the_reference_models_never_had_samples_in_sigma_space(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no committed number of docs/papers was measured with the factors that depended on coordinates."""
    scheduler = reference(name).scheduler
    factors = denoising_factors(scheduler, 20)
    monkeypatch.setattr(timestep_weights, "_read", lambda *_: 1.0)
    assert denoising_factors(scheduler, 20) == factors


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**BETAS, clip_sample=False),
        DDIMScheduler(**BETAS, clip_sample=False),
        DPMSolverMultistepScheduler(**BETAS),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_finite_difference_of_the_samplers_own_first_steps(scheduler: object) -> None:
    factors = list(denoising_factors(scheduler, STEPS).values())
    ends = []
    for nudge in (0.0, 1e-3):
        scheduler.set_timesteps(STEPS)
        sample = torch.full((1, 1, 2, 2), 0.3)
        first, second = scheduler.timesteps[:2]
        generator = torch.Generator().manual_seed(0)
        noisy = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        scheduler.scale_model_input(sample, first) if hasattr(scheduler, "scale_model_input") else None
        sample = scheduler.step(torch.full_like(sample, 0.1), first, sample, **noisy).prev_sample
        output = torch.full_like(sample, 0.2 + nudge)
        ends.append(scheduler.step(output, second, sample, **noisy).prev_sample)
    difference = float((ends[1] - ends[0]).abs().mean()) / 1e-3
    assert difference == pytest.approx(factors[1], rel=2e-2)


def test_normalised_factors_have_mean_one() -> None:
    factors = normalised({1.0: 2.0, 2.0: 6.0})
    assert factors == {1.0: 0.5, 2.0: 1.5}


@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_clipping_of_samples_is_left_out(make: type) -> None:
    clipped = make(**BETAS, clip_sample=True, clip_sample_range=0.1)
    assert denoising_factors(clipped, STEPS) == denoising_factors(make(**BETAS, clip_sample=False), STEPS)
    assert clipped.config.clip_sample


def test_a_learned_variance_is_no_part_of_the_prediction() -> None:
    fixed, learned = (
        denoising_factors(DDPMScheduler(**BETAS, variance_type=kind), STEPS)
        for kind in ("fixed_small", "learned_range")
    )
    assert learned == pytest.approx(fixed, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "calls", "more"),
    [
        (HeunDiscreteScheduler, 2 * STEPS - 1, {}),
        (PNDMScheduler, STEPS + 1, {"skip_prk_steps": True, "steps_offset": 1}),
    ],
)
def test_several_calls_at_a_timestep_count_with_their_mean(make: type, calls: int, more: dict) -> None:
    """As Stable Diffusion 1.5 is shipped: its sampler asks twice at the second timestep."""
    scheduler = make(**BETAS, **more)
    found = timestep_weights._factors_of_calls(scheduler, STEPS, {})
    factors = denoising_factors(scheduler, STEPS)
    assert len(found) == calls and len(factors) == STEPS and min(factors.values()) > 0
    for timestep, factor in factors.items():
        own = [each for other, each in found if other == timestep]
        assert factor == pytest.approx(sum(own) / len(own))


def test_weights_where_a_sampler_asks_twice() -> None:
    parts = tiny_unet().components
    parts["scheduler"] = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    pipeline = type(tiny_unet())(**parts, requires_safety_checker=False)
    settings = CalibrationSettings(samples=24, steps=5, prompts_per_batch=2)
    data = collect(pipeline, PROMPTS, settings, progress=False)
    task = Task(pipeline.unet, data, Bits.parse("w4a4"), scheduler=data.scheduler)
    weights, factors = loss_weights(task, 1.0), denoising_factors(data.scheduler())
    assert set(weights) == set(data.timesteps) == set(factors) and len(weights) == 5
    ratios = [weights[timestep] / factors[timestep] for timestep in weights]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_a_step_that_bends_is_refused() -> None:
    class Bent(DDIMScheduler):
        def step(self, output, timestep, sample, **arguments):
            return super().step(output.square(), timestep, sample, **arguments)

    with pytest.raises(
        ValueError,
        match=r"must be affine in .*; train without it: factor_power=0 \(on the command line --set",
    ):
        denoising_factors(Bent(**BETAS), STEPS)


@pytest.mark.parametrize("kept", [10, 40])
def test_weights_belong_to_the_steps_of_the_sampler(kept: int) -> None:
    """Also where fewer rows than steps were kept."""
    pipeline = tiny_ddim()
    data = collect(pipeline, None, CalibrationSettings(samples=kept, steps=20), progress=False)
    pipeline.scheduler.set_timesteps(3)  # whatever else the pipeline did meanwhile
    task = Task(pipeline.unet, data, Bits.parse("w4a4"), scheduler=data.scheduler)
    weights = loss_weights(task, 2.0)
    factors = denoising_factors(pipeline.scheduler, 20)
    assert set(weights) == set(data.timesteps) and len(weights) == min(kept, 20)
    ratios = [weights[timestep] / factors[timestep] ** 2 for timestep in weights]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)
    assert sum(weights.values()) / len(weights) == pytest.approx(1)


@pytest.mark.parametrize(
    "make",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler],
    ids=lambda make: make.__name__,
)
def test_image_to_image_leaves_out_the_first_steps(make: type) -> None:
    """The rows are of the last steps of the schedule, whether the scheduler was told so or not."""
    quiet = {"steps_offset": 1} | ({"clip_sample": False} if make is DDIMScheduler else {})
    whole = tiny_unet().components
    whole["scheduler"] = make(**BETAS, **quiet)
    pipeline = StableDiffusionImg2ImgPipeline(**whole, requires_safety_checker=False)
    settings = CalibrationSettings(samples=20, steps=STEPS, prompts_per_batch=2)
    call = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "strength": 0.5}
    data = collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=call)
    task = Task(pipeline.unet, data, Bits.parse("w4a4"), scheduler=data.scheduler)
    weights, factors = loss_weights(task, 1.0), denoising_factors(make(**BETAS, **quiet), STEPS)
    assert len(weights) == STEPS // 2 and set(weights) == set(list(factors)[STEPS // 2 :])
    ratios = [weights[timestep] / factors[timestep] for timestep in sorted(weights)]
    # A solver of several steps begins with one of first order, wherever it begins.
    several = make is DPMSolverMultistepScheduler
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.5 if several else 1e-4)


def test_a_shift_that_the_pipeline_chooses_is_that_of_its_run() -> None:
    pipeline = FAMILIES["flux"].build()
    assert pipeline.scheduler.config.use_dynamic_shifting
    settings = CalibrationSettings(samples=12, steps=3, prompts_per_batch=2)
    call = FAMILIES["flux"].call
    data = collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=call)
    task = Task(pipeline.transformer, data, Bits.parse("w4a4"), scheduler=data.scheduler)
    weights = loss_weights(task, 1.0)
    sigmas = data.scheduler().sigmas
    expected = (sigmas[:-1] - sigmas[1:]).tolist()
    found = [weights[timestep] for timestep in sorted(weights, reverse=True)]
    assert [a / found[0] for a in found] == pytest.approx([a / expected[0] for a in expected], rel=1e-3)


def test_rows_of_no_trajectory_are_refused() -> None:
    pipeline = tiny_pixart()
    settings = CalibrationSettings(samples=8, steps=3, timesteps="clean")
    data = collect(pipeline, PROMPTS, settings, progress=False)
    task = Task(pipeline.transformer, data, Bits.parse("w4a4"), scheduler=data.scheduler)
    with pytest.raises(ValueError, match="must be of the sampler's 3 steps"):
        loss_weights(task, 1.0)

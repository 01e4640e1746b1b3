"""What is asked for, as plain data that is checked once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from difloat.plan.validation import Positive, Rule, Whole, record

MOST_SEED = 2**40  # what becomes of it must fit torch's 64 bits


@record("calibration settings", each="calibration setting '{}'")
class CalibrationSettings:
    """What to collect; the defaults are written here and nowhere else.

    Attributes:
        samples: Denoiser input rows kept in all.
        steps: Sampler steps; None takes the default of the pipeline's call.
        guidance_scale: Classifier-free guidance; None takes the default of the pipeline's call.
        prompts_per_batch: Pictures sampled at once. It also sets how many trajectories are drawn.
        seed: Seed of all noise and of every choice of rows.
        timesteps: "sampler" follows the sampler's own trajectory; "clean" takes almost clean latents noised at the raw
            timesteps 0 to 19, conditional only, as the released code of FP4DiT does (see `calibration.clean_latents`).
        memory_bytes: Rows held in RAM; what is above stays on disk and is read on demand. While a batch of
            prompts runs, its rows are in RAM on top of this.
    """

    samples: Positive = 256
    steps: Positive | None = None
    guidance_scale: float | None = None
    prompts_per_batch: Positive = 8
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    timesteps: Annotated[Literal["sampler", "clean"], Rule("be sampler or clean")] = "sampler"
    memory_bytes: Whole = 2 << 30

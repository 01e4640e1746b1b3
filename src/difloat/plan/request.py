"""What is asked for, as plain data that is checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, InstanceOf

from difloat.plan.options import Names
from difloat.plan.rules import Bits
from difloat.plan.target import Target
from difloat.plan.validation import NotNegative, Positive, Rule, Whole, record

MOST_SEED = 2**40  # what becomes of it must fit torch's 64 bits


@record("calibration settings", each="calibration setting '{}'")
class CalibrationSettings:
    """What to collect. The defaults are written here and nowhere else.

    Attributes:
        samples: Denoiser inputs that are kept, the calibration rows.
        steps: Sampler steps. If it is left out, as many as the pipeline's call takes by itself.
        guidance_scale: Scale of classifier-free guidance. If it is left out, the one that the pipeline's call takes by itself.
        prompts_per_batch: Pictures sampled at once, which also sets how many trajectories are drawn.
        trajectories: Pictures sampled at least, so that rows come from many of them. If it is left out, the recipe's own number
            for models of up to 100 million weights, and else as many as the rows need at one row per picture and step.
        seed: Seed of everything random: the noise, and every choice of rows.
        timesteps: "sampler" follows the sampler's own trajectory. "clean" takes almost clean latents noised at the raw
            timesteps 0 to 19, conditional only, as the released code of FP4DiT does.
        memory_bytes: Calibration rows held in RAM. What is above stays on disk and is read on demand. While a batch of
            prompts runs, its rows are in RAM on top of this.
    """

    samples: Positive = 256
    steps: Positive | None = None
    guidance_scale: Annotated[float | None, Field(title="guidance"), Rule("be finite")] = None
    prompts_per_batch: Positive = 8
    trajectories: Positive | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    timesteps: Annotated[Literal["sampler", "clean"], Rule("be sampler or clean")] = "sampler"
    memory_bytes: Whole = 2 << 30


def _parsed(bits: Any) -> Any:
    return Bits.parse(bits) if isinstance(bits, str) else bits


def _by_name(wanted: Any) -> Any:
    """Names of components, such as "vae" and "vae=w8a8", with the bits that stand after them."""
    if isinstance(wanted, str):
        wanted = wanted.split(",")
    if not isinstance(wanted, Sequence) or not all(isinstance(entry, str) for entry in wanted):
        return wanted
    pairs = (entry.partition("=") for entry in wanted)
    return {name: Bits.parse(own) if own else None for name, _, own in pairs}


Widths = Annotated[InstanceOf[Bits], BeforeValidator(_parsed), Rule("look like 'w4a8' or 'w3.5a8'")]
ByName = Annotated[
    Mapping[str, InstanceOf[Bits] | None],
    BeforeValidator(_by_name),
    Rule("be names of components, perhaps with their bits, like vae=w8a8"),
]
LayerBits = Annotated[
    Mapping[str, Mapping[str, Annotated[int, Field(ge=1, le=8)]]],
    Rule("be weight bits by denoiser and layer"),
]


@record("settings of repair")
class RepairSettings:
    """How a plan is fine-tuned (`difloat.repair`).

    Attributes:
        epochs: Passes along the trajectory. More than the rows are worth make pictures worse.
        rank: Rank of the adapters. 0 trains input ranges and weight scales only.
        dfa: Weight the loss of a timestep by the square of its factor in the sampler's update. It is not for samplers that
            call the denoiser several times a step.
        guidance_weight: Weight of the part of the guidance direction that is lost. 0 leaves it out.
    """

    epochs: Positive = 10
    rank: Whole = 32
    dfa: bool = True
    guidance_weight: NotNegative = 9.0


@record("request")
class Request:
    """One quantization as it is asked for, made once (`difloat.job.request`) and then passed on.

    Attributes:
        recipe: auto, lbfp, fp4dit, msfp, mpqdm, guided, efficientdm, qdiffusion, viditq, qdit, gptq, orbitquant,
            svdquant, hsvd or rtn.
        bits: Bits of weights and inputs, like w4a8. a16 leaves inputs alone. The recipe auto takes averages like w3.5a8.
        calibration: What to collect, where the recipe looks at data.
        target: "cpu" takes only formats that CPUs compute in integers, and auto also looks at the times of this one. "any"
            takes all. comfy, gguf, openvino, vllm and diffusers take what files of that kind hold exactly, as --for does.
        exclude: Layers or blocks that stay as they are whatever the recipe, like down_blocks.0 or '*.to_q'.
        components: What of a pipeline is quantized, like transformer,text_encoder,vae=w8a8. All but the denoiser do without
            data. If it is left out, the denoiser.
        cache: Directory that keeps calibration rows and finished blocks. A killed run goes on from there.
        device: Where the model is put, stays and computes, or None for where it is.
        bits_from: A checkpoint of this model whose layers' weight bits are taken, such as one of auto with widths=layers. Edges
            that the recipe keeps at 8 bits keep them.
        options: The recipe's options, made and checked.
    """

    recipe: str = "auto"
    bits: Widths = Bits(4, 8)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    target: Target = "any"
    exclude: Names = ()
    components: ByName | None = None
    cache: Path | None = None
    device: InstanceOf[torch.device] | None = None
    bits_from: LayerBits | None = None
    options: Any = field(kw_only=True)

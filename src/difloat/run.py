"""One quantization run from source to report: what the command line and the benchmarks share."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difloat import api, checkpoint, components, distributed, evaluation, recipes, reference_models
from difloat.calibration import collect
from difloat.calibration.collect import CalibrationSettings
from difloat.checkpoint.layout import stored_dtypes
from difloat.checkpoint.save_load import dtype_argument
from difloat.estimate import Forecast
from difloat.evaluation.comparison import Evaluation, Generated
from difloat.layers import install
from difloat.plan.plan import Plan
from difloat.report import build
from difloat.report.render import Record

SHOWN = 24  # picture pairs in a report


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: prompts (None without text), how many, sampler steps, guidance, batch size, other arguments."""

    prompts: Sequence[str] | None
    count: int
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 50
    call_kwargs: Mapping[str, Any] | None = None

    def prompt_of(self, index: int) -> str:
        """The prompt of picture `index`, "" without text."""
        return "" if self.prompts is None else self.prompts[index % len(self.prompts)]

    @property
    def captions(self) -> list[str]:
        """The prompt of every picture."""
        return [self.prompt_of(index) for index in range(self.count)]

    @property
    def has_known_captions(self) -> bool:
        """Whether all of them are captions that the embedded models were trained with."""
        return self.prompts is not None and set(self.captions) <= set(reference_models.captions())


def load_pipeline(source: str) -> Any:
    """The pipeline behind the name of an embedded model or a directory.

    Raises:
        FileNotFoundError: if there is no such directory, or it is no pipeline.
        ValueError: if it does not load.
    """
    if source in reference_models.NAMES:
        return reference_models.load(source)
    path = Path(source)
    _check_directory(path, source)
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    try:
        return DiffusionPipeline.from_pretrained(
            path, variant=_variant_of(path), **{dtype_argument(): _dtype_of(path)}
        )
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"source must be a complete pipeline, but {source!r} does not load ({reason}); download it again"
        ) from error


def _check_directory(path: Path, source: str) -> None:
    if not path.exists():
        known = ", ".join(reference_models.NAMES)
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
        way = f"; from a hub: hf download {source} --local-dir DIR" if hub else ""
        raise FileNotFoundError(
            f"source must be a pipeline directory or one of {known}, got {source!r}, which does not exist{way}"
        )
    if path.is_file():
        raise NotADirectoryError(
            f"source must be a pipeline directory, got the file {source!r}; load a checkpoint in one file with diffusers' "
            "from_single_file and save_pretrained the pipeline (LoRA files go to generate --lora)"
        )
    if not (path / "model_index.json").is_file():
        part = (path / "config.json").is_file()
        way = "it is one component, give the pipeline's directory" if part else "is the download complete?"
        raise FileNotFoundError(f"source must hold model_index.json, got {source!r} without; {way}")


def _variant_of(path: Path) -> str | None:
    """The variant "fp16" where a pipeline holds no weights but files of that name, as hubs offer them apart."""
    names = [file.name for file in path.glob("*/*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _dtype_of(path: Path) -> torch.dtype:
    """What all components of a pipeline compute in: bfloat16 where most values are stored so, else float32.

    One for all, for components of several do not fit together everywhere. CPUs take up to a hundred times as long for float16.
    """
    counts: Counter[torch.dtype] = Counter()
    for config in path.glob("*/config.json"):
        counts.update(stored_dtypes(config.parent))
    return torch.bfloat16 if counts[torch.bfloat16] > counts.total() / 2 else torch.float32


def prompts_of(pipeline: Any, source: str, path: Path | None) -> list[str] | None:
    """Prompts from a file, the captions of an embedded model, built-in ones, or None for a pipeline without text."""
    if path is not None:
        return collect.load_prompts(path)
    if source in reference_models.NAMES:
        return reference_models.captions()
    return api.prompts_for(pipeline, None)


def call_of(source: str, guidance_scale: float | None) -> tuple[float | None, dict[str, Any]]:
    """Guidance and further call arguments: an embedded model's own, unless the user gives a guidance scale."""
    if source not in reference_models.NAMES:
        return guidance_scale, {}
    own = reference_models.call_arguments(source)
    default = own.pop("guidance_scale", None)
    return (default if guidance_scale is None else guidance_scale), own


def describe(forecast: Forecast, settings: CalibrationSettings) -> str:
    """What a run will take, in lines for people."""
    need = forecast.calibration
    held = forecast.float_bytes + forecast.packed_bytes + need["ram_bytes"]
    before, tuning = held + forecast.learning_bytes + settings.memory_bytes, held + forecast.tuning_bytes
    taken = [(name, n) for name, n in forecast.counts.items() if name in forecast.trial.layers]
    lines = [
        f"{sum(n for _, n in taken)} layers, {forecast.weights:,} weights: about {forecast.packed_bytes / 1e6:.2f} MB "
        f"packed, {forecast.float_bytes / 1e6:.2f} MB as it is",
        f"calibration: {need['rows']:.0f} rows from {need['calls']:.0f} denoiser calls, about {need['seconds']:.0f} s, "
        f"{need['disk_bytes'] / 1e6:.0f} MB on disk if a cache is kept",
        f"search: about {forecast.search_s:.0f} s; learned rounding: about {forecast.rounding_s:.0f} s; "
        f"fine-tuning: roughly {forecast.training_s:.0f} s; "
        f"in all about {forecast.seconds:.0f} s, without pictures",
        f"RAM: about {before / 1e6:.0f} MB for both denoisers, a block in training, and the activations of rows and "
        f"blocks (--memory-mb), beside the libraries and a call of the pipeline",
    ]
    if forecast.tuning_bytes:
        lines.append(
            f"RAM of fine-tuning: about {tuning / 1e6:.0f} MB for both denoisers, rows, adapters, and what a step over the "
            f"whole denoiser keeps (--set rows=, not --memory-mb), beside the libraries' own"
        )
    return "\n".join(lines)


def draw(pipeline: Any, sampling: Sampling, *, progress: bool = True) -> Generated:
    """Pictures of seeds 0, 1, ... with the sampler's states; of several processes the main one gets them."""
    return evaluation.generate(
        pipeline,
        sampling.prompts,
        seeds=list(range(sampling.count)),
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        batch_size=sampling.batch_size,
        trajectory=True,
        progress=progress,
        call_kwargs=sampling.call_kwargs,
    )


def judge(reference: Generated, quantized: Generated, sampling: Sampling) -> Evaluation:
    """Compare two sets; distance to data and retrieval where the prompts are the embedded models' own captions."""
    from difloat.evaluation import emoji_features

    captions, known = sampling.captions, sampling.has_known_captions
    return evaluation.compare(
        reference,
        quantized,
        features=emoji_features.features,
        feature_maps=emoji_features.feature_maps,
        data_moments=emoji_features.data_statistics() if known else None,
        captions=captions if known else None,
        retrieval=emoji_features.retrieval if known else None,
    )


def finish(
    pipeline: Any,
    plan: Plan,
    source: str,
    out: Path,
    sampling: Sampling,
    *,
    seconds: Mapping[str, float],
    overwrite: bool = False,
) -> Record | None:
    """Draw with the float model, carry the plan out, save, reload, draw again, compare, and write the report.

    Processes of a launch share the drawing; the main one writes. All must see the directory `out`.

    Args:
        pipeline: Float; quantized on return.
        plan: Made for it.
        source: How the user calls it.
        out: Directory of the checkpoint and the report.
        sampling: Pictures for the report; a count of 0 leaves them out.
        seconds: Timings so far.
        overwrite: Replace a checkpoint that is there.

    Returns:
        What the report shows; None on the other processes of a launch.
    """
    float_model = install.shadow(api.denoiser(pipeline))
    timings = dict(seconds)
    reference = draw(pipeline, sampling) if sampling.count else None
    api.apply(pipeline, plan)
    distributed.on_main(lambda: checkpoint.save(pipeline, out, overwrite=overwrite))
    drawn = None if reference is None else draw(checkpoint.load(out), sampling)
    if not distributed.is_main():
        return None
    evaluation = None
    left = right = build.no_pictures()
    shown = min(sampling.count, SHOWN)
    if reference is not None and drawn is not None:
        evaluation = judge(reference, drawn, sampling)
        timings |= {
            "pictures, full precision": reference.seconds,
            "pictures, quantized and reloaded": drawn.seconds,
        }
        left, right = build.to_uint8(reference.images[:shown]), build.to_uint8(drawn.images[:shown])
    made = build.build(
        float_model,
        plan,
        name=source,
        evaluation=evaluation,
        prompts=[sampling.prompt_of(index) for index in range(shown)],
        seeds=list(range(shown)),
        timings=timings,
        notes=[*notes_of(plan.recipe), *components.notes(plan)],
    )
    build.write(made, left, right, out)
    return made


def notes_of(recipe: str) -> list[str]:
    """What the recipe's page says about the paper: its docstring after the first line, by paragraph.

    Nothing for plans that no recipe made: quantized while loading, or imported.
    """
    if recipe not in recipes.RECIPES:
        return []
    page = sys.modules[recipes.lookup(recipe).plan.__module__].__doc__ or ""
    return [" ".join(paragraph.split()) for paragraph in page.split("\n\n")[1:]]

"""One quantization run from source to report: what the command line and the benchmarks share."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import nn

from difloat import (
    api,
    checkpoint,
    components,
    devices,
    distributed,
    evaluation,
    recipes,
    reference_models,
    sources,
)
from difloat.calibration import collect
from difloat.calibration.collect import CalibrationSettings
from difloat.calibration.pace import Pace
from difloat.checkpoint import integrity
from difloat.checkpoint.manifest import MANIFEST
from difloat.estimate import Forecast
from difloat.evaluation import kept_pictures
from difloat.evaluation.comparison import Evaluation, Generated
from difloat.evaluation.generation import PER_CALL
from difloat.layers import install
from difloat.pipelines import denoiser_of
from difloat.plan.plan import Plan
from difloat.plan.target import FILES
from difloat.report import build
from difloat.report.render import Record

SHOWN = 24  # picture pairs in a report


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        prompts: The texts, or None for a pipeline without text.
        count: How many pictures.
        steps: The steps of the sampler. None takes the pipeline's own.
        guidance_scale: The scale of guidance. None takes the pipeline's own.
        batch_size: Pictures per call.
        call_kwargs: Further arguments of the call.
        kept: Folder that keeps full-precision pictures from run to run (`evaluation.kept_pictures`). None draws all.
    """

    prompts: Sequence[str] | None
    count: int
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = PER_CALL
    call_kwargs: Mapping[str, Any] | None = None
    kept: Path | None = None

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


def load_pipeline(source: str, device: torch.device | str | None = None, **where: Any) -> Any:
    """The pipeline behind what a user names.

    Args:
        source: The source, as the user names it.
        device: Where it is put (`devices.resolve`), or None for the CPU.
        **where: Further fields of `sources.Source`.

    Raises:
        FileNotFoundError: there is nothing of that name, or it is a component without its pipeline.
        ValueError: it does not load, or there is no such device.
    """
    place = devices.resolve("cpu" if device is None else device)
    found = sources.load(sources.Source(source, **where), place)
    if isinstance(found, nn.Module):
        raise FileNotFoundError(
            f"source must hold model_index.json, got {source!r} without; it is one component, name its pipeline with --base"
        )
    return devices.move(found, place)


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
    taken = [kind for kind in forecast.kinds if kind.packed_bytes]
    computed = {stage: rows for stage, rows in forecast.computed.items() if rows}
    stages = ", ".join(f"{stage} {rows:,.0f}" for stage, rows in computed.items())
    packed, floats, both, kept = (
        decimal(round(size), precision=2)
        for size in (
            forecast.packed_bytes,
            forecast.float_bytes,
            forecast.packed_bytes + forecast.float_bytes,
            settings.memory_bytes,
        )
    )
    place = f" in the {forecast.target} file" * (forecast.target in FILES)
    lines = [
        f"{sum(kind.count for kind in taken)} layers, {sum(kind.weights for kind in taken):,} weights: about "
        f"{packed} packed{place}, {floats} as it is"
    ]
    if not forecast.rows:
        return f"{lines[0]}\nno calibration: the denoiser is not called; RAM: about {both} for both denoisers"
    lines += [
        f"calibration: {forecast.rows:,} rows from {forecast.pictures:,} full-precision pictures of {forecast.steps} steps",
        f"after it: at most {sum(computed.values()):,.0f} rows of the denoiser{f' ({stages})' * bool(stages)}, and the search "
        f"over weights; a picture takes {forecast.steps} rows, {2 * forecast.steps} with guidance in two parts",
        f"RAM: about {both} for both denoisers, and up to {kept} (--memory-mb) each for "
        "calibration rows and for activations, beside what is trained, the libraries and a call of the pipeline",
    ]
    return "\n".join(lines)


def in_time(forecast: Forecast, pace: Pace) -> str:
    """The same in seconds, from a timed call of the denoiser."""
    if pace.row_seconds is None:
        return "no time: the call of a sampler of one step is followed by none"
    after_s = sum(forecast.computed.values()) * pace.row_seconds
    picture_s = forecast.steps * pace.row_seconds
    return (
        f"{pace.row_seconds:.2g} s a row: calibration roughly {forecast.pictures * picture_s:,.0f} s, twice that with guidance "
        f"in two parts; after it at most {after_s:,.0f} s and the search over weights; without pictures of the report"
    )


def draw(pipeline: Any, sampling: Sampling, *, kept: Path | None = None, progress: bool = True) -> Generated:
    """Pictures of seeds 0, 1, ... with the sampler's states. Of several processes the main one gets them.

    Those that lie in `kept` are not drawn, others are put there piece by piece. None draws all.
    """
    asked: dict[str, Any] = {
        "seeds": list(range(sampling.count)),
        "steps": sampling.steps,
        "progress": progress,
    }
    asked |= {"guidance_scale": sampling.guidance_scale, "batch_size": sampling.batch_size}
    asked |= {"call_kwargs": sampling.call_kwargs}
    if kept is not None:
        return kept_pictures.draw_kept(pipeline, sampling.prompts, kept, **asked)
    return evaluation.generate(pipeline, sampling.prompts, trajectory=True, **asked)


def judge(reference: Generated, quantized: Generated, sampling: Sampling) -> Evaluation:
    """Compare two sets of pictures.

    Distance to data and retrieval are measured where the prompts are the embedded models' own captions.
    """
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
    source: sources.Source,
    out: Path,
    sampling: Sampling,
    *,
    seconds: Mapping[str, float],
    overwrite: bool = False,
) -> Record | None:
    """Carry the plan out, save, verify, write the report, draw with both models, and complete the report.

    Nothing is drawn before the checkpoint is on disk, so whatever fails afterwards loses nothing. Processes of a launch share
    the drawing, and the main one writes. All must see the directory `out`.

    Args:
        pipeline: A float pipeline, quantized on return and in the dtypes of its files, whatever it computed in.
        plan: The plan that was made for it.
        source: Where the pipeline came from.
        out: Directory of the checkpoint and the report.
        sampling: Pictures for the report. A count of 0 leaves them out.
        seconds: Timings so far.
        overwrite: Replace a checkpoint that is there.

    Returns:
        What the report shows, or None on the other processes of a launch.

    Raises:
        CheckpointError: what was written does not verify.
    """
    sources.load_into(pipeline, replace(source, dtype="stored"), devices.home(pipeline))
    parts = {"": api.denoiser(pipeline)} | {name: getattr(pipeline, name) for name in plan.components}
    floats = {name: install.shadow(part) for name, part in parts.items()}
    timings = dict(seconds)
    api.apply(pipeline, plan)
    start = time.perf_counter()
    with sources.as_in_files(pipeline, source):
        distributed.on_main(lambda: _save(pipeline, out, overwrite))
    timings["saving and verifying"] = time.perf_counter() - start
    made = None
    if distributed.is_main():
        notes = [*notes_of(plan.recipe), *components.notes(plan)]
        made = build.build(floats[""], plan, name=source.name, timings=timings, notes=notes)
        empty = build.no_pictures()
        build.write(made, empty, empty, out)
    if not sampling.count:
        return made
    reference, dtype = _reference(pipeline, floats, source, sampling)
    drawn = draw(checkpoint.load(out, dtype=dtype, device=devices.home(pipeline)), sampling)
    return None if made is None else _with_pictures(made, reference, drawn, sampling, out)


def _reference(
    pipeline: Any, floats: Mapping[str, nn.Module], source: sources.Source, sampling: Sampling
) -> tuple[Generated, torch.dtype | None]:
    """Pictures of full precision, and the dtype that they were computed in, which is None if it is that of the files.

    The models at hand draw them, unless they are not in the dtype that the source is to be computed in.
    """
    device = devices.home(pipeline)
    with _in_place(pipeline, floats):
        if sources.has_dtypes(pipeline, source, device):
            return draw(pipeline, sampling, kept=sampling.kept), None
    computing = devices.move(sources.load(source, device), device)
    dtype = next(tensor.dtype for tensor in denoiser_of(computing)[1].parameters())
    return draw(computing, sampling, kept=sampling.kept), dtype


def draw_later(
    reference: Generated,
    out: Path,
    sampling: Sampling,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Record | None:
    """Draw with a finished checkpoint what full precision has drawn, compare, and complete the checkpoint's report.

    Args:
        reference: Full-precision pictures as `draw` gives them for the same `sampling`.
        out: Directory of the checkpoint and its report. Nothing in it changes until all pictures are drawn.
        sampling: How they were drawn.
        folder: Holds what is drawn until the report is written, so that a killed run goes on from there.
        dtype: The dtype to compute in, or None for that of the files.
        device: The device to compute on, or None for the CPU.

    Returns:
        What the report shows, or None on processes of a launch that do not write.

    Raises:
        FileNotFoundError: there is no report.
        CheckpointError: the checkpoint does not load.
    """
    made = build.read(out)[0]
    own = folder / f"of-{hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()[:32]}"
    drawn = draw(checkpoint.load(out, dtype=dtype, device=device), sampling, kept=own)
    if not distributed.is_main():
        return None
    made = _with_pictures(made, reference, drawn, sampling, out)
    shutil.rmtree(own)
    return made


def _save(pipeline: Any, out: Path, overwrite: bool) -> None:
    """Write the checkpoint, and compare every file on the disk with the hashes that its manifest has of it."""
    checkpoint.save(pipeline, out, overwrite=overwrite)
    integrity.check_directory(out)


def _with_pictures(
    made: Record, reference: Generated, drawn: Generated, sampling: Sampling, out: Path
) -> Record:
    """Compare pictures of both models, and write the report again with what they say."""
    left, (right, chosen) = build.shown(reference, SHOWN)[0], build.shown(drawn, SHOWN)
    times = {
        "pictures, full precision": reference.seconds,
        "pictures, quantized and reloaded": drawn.seconds,
    }
    prompts, seeds = (
        [f"{sampling.prompt_of(one.sample)}{one.label}" for one in chosen],
        [one.sample for one in chosen],
    )
    complete = build.with_pictures(made, judge(reference, drawn, sampling), prompts, seeds, times)
    build.write(complete, left, right, out)
    return complete


@contextmanager
def _in_place(pipeline: Any, floats: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put the float models where their packed ones are for the time of the block. "" is the denoiser."""
    names = {name or denoiser_of(pipeline)[0]: model for name, model in floats.items()}
    packed = {name: getattr(pipeline, name) for name in names}
    try:
        for name, model in names.items():
            setattr(pipeline, name, model)
        yield
    finally:
        for name, model in packed.items():
            setattr(pipeline, name, model)


def notes_of(recipe: str) -> list[str]:
    """What the recipe's page says about the paper: its docstring after the first line, by paragraph.

    Nothing for plans that no recipe made: quantized while loading, or imported.
    """
    if recipe not in recipes.RECIPES:
        return []
    page = sys.modules[recipes.lookup(recipe).plan.__module__].__doc__ or ""
    return [" ".join(paragraph.split()) for paragraph in page.split("\n\n")[1:]]

"""Pictures drawn in pieces and kept as files, one for every seed: a killed run goes on, a later comparison draws none again.

A file is of one picture of one model: its name is a hash of every value of every model in the pipeline, of the scheduler,
the seed, the prompt and the arguments of the call. So a folder may be shared by any number of models.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat import devices, distributed
from difloat.cache_entries import read_entry, write_entry
from difloat.calibration.sampler_runs import config_of, described
from difloat.evaluation.generation import Generated, generate, joined
from difloat.layers import offloading
from difloat.pipelines import one_at_a_time
from difloat.plan.validation import read_texts, record

_LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions may round otherwise


@record("kept picture")
class _Texts:
    """What a file holds beside its tensors, as `Generated` has it."""

    timesteps: list[float]
    seconds: float
    frames: int


def draw_kept(
    pipeline: Any,
    prompts: Sequence[Any] | None,
    folder: Path,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 50,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Generated:
    """What `generate` draws with the sampler's states.

    Pictures that lie in `folder` are not drawn, and those that are drawn are put there.

    A piece is one batch of every process of a launch. A batch of which a picture is missing is drawn as a whole, so that what
    is drawn in pieces equals what is drawn at once.

    Args:
        pipeline: A diffusers pipeline.
        prompts: Prompts that are taken in turn, as in `generate`. None without text.
        folder: Made where it is missing. The main process of a launch reads and writes it.
        seeds: One per picture.
        steps: Steps of the sampler. None takes the pipeline's own.
        guidance_scale: Guidance of the call. None takes the pipeline's own.
        batch_size: Pictures per call.
        progress: Show a bar for every piece.
        call_kwargs: Further arguments of the call.

    Returns:
        All pictures on the main process, none on others, where `seconds` is what drawing took, whenever that was.

    Raises:
        ValueError: as `generate`.
        OSError: the disk is full.
    """
    given = dict(call_kwargs or {})
    size = 1 if one_at_a_time(given) else batch_size
    call: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    shown = None if prompts is None else [prompts[number % len(prompts)] for number in range(len(seeds))]
    names = _names(pipeline, seeds, shown, {**call, **given})
    batches = [range(first, min(first + size, len(seeds))) for first in range(0, len(seeds), size)]
    found = {number: _read(folder, name) for number, name in enumerate(names)}
    missing = distributed.on_main(lambda: [own for own in batches if any(found[one] is None for one in own)])
    if progress and names and (kept := len(seeds) - sum(map(len, missing))):
        tqdm.write(f"{kept} of {len(seeds)} pictures are kept in {folder}, not drawn again", file=sys.stderr)
    call |= {"batch_size": size, "trajectory": True, "progress": progress, "call_kwargs": call_kwargs}
    for first in range(0, len(missing), distributed.count()):
        numbers = [number for own in missing[first : first + distributed.count()] for number in own]
        texts = shown and [shown[number] for number in numbers]
        drawn = generate(pipeline, texts, seeds=[seeds[number] for number in numbers], **call)
        with distributed.together():
            for place, number in enumerate(numbers if names else ()):
                found[number] = one = _one_of(drawn, place)
                _write(folder, names[number], one)
    every = [one for one in found.values() if one is not None]
    return joined(every, sum(one.seconds for one in every))


def model_hash(pipeline: Any) -> str:
    """Hash of every value of every model of a pipeline, with names, shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=32)
    models = {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}
    with offloading.all_lifted(pipeline):
        for part, module in models.items():
            for name, tensor in module.state_dict().items():
                digest.update(f"{part} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _names(
    pipeline: Any, seeds: Sequence[int], shown: Sequence[Any] | None, call: Mapping[str, Any]
) -> list[str]:
    """A name for every picture, from all that decides it. Processes that do not write get none."""
    if not distributed.is_main():
        return []
    scheduler = getattr(pipeline, "scheduler", None)
    shared = {
        "pipeline": type(pipeline).__qualname__,
        "models": model_hash(pipeline),
        "scheduler": type(scheduler).__qualname__,
        "scheduler_config": described(config_of(scheduler)),
        "call": described({name: value for name, value in call.items() if value is not None}),
        "device": devices.home(pipeline).type,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    prompts = [None] * len(seeds) if shown is None else shown
    return [
        json.dumps({**shared, "seed": seed, "prompt": described(prompt)}, sort_keys=True)
        for seed, prompt in zip(seeds, prompts, strict=True)
    ]


def _path(folder: Path, name: str) -> Path:
    return folder / f"picture-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.safetensors"


def _one_of(drawn: Generated, place: int) -> Generated:
    """One sample of a set, with its share of the time."""
    frames = slice(place * drawn.frames, (place + 1) * drawn.frames)
    return Generated(
        drawn.images[frames].clone() if len(drawn.images) else drawn.images,
        None if drawn.latents is None else drawn.latents[:, place : place + 1].clone(),
        drawn.timesteps,
        drawn.seconds / max(len(drawn), 1),
        drawn.frames,
        None if drawn.signal is None else drawn.signal[place : place + 1].clone(),
    )


def _write(folder: Path, name: str, drawn: Generated) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"images": drawn.images, "latents": drawn.latents, "signal": drawn.signal}
    texts = _Texts(drawn.timesteps, drawn.seconds, drawn.frames)
    held = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
    write_entry(
        _path(folder, name), name, held, {key: json.dumps(value) for key, value in vars(texts).items()}
    )


def _read(folder: Path, name: str) -> Generated | None:
    entry = read_entry(_path(folder, name), name, partial(read_texts, _Texts))
    if entry is None:
        return None
    tensors, texts = entry
    parts = (texts.timesteps, texts.seconds, texts.frames)
    return Generated(tensors["images"], tensors.get("latents"), *parts, tensors.get("signal"))

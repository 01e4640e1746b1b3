"""The output of a pipeline as tensors: pictures, frames of videos, or signals such as waveforms and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difloat.evaluation.picture_metrics import NotFiniteError

# The names of pictures and frames in outputs of diffusers, and those of waveforms and embeddings.
_PICTURES = ("images", "frames", "videos", "video", "rgb", "prediction")
_SIGNALS = ("audios", "audio", "sound", "image_embeddings", "image_embeds", "latents")


@dataclass(frozen=True, eq=False)
class Outputs:
    """The samples of one call, on the CPU.

    Attributes:
        images: float32 `[n * frames, 3, h, w]` in [0, 1], with a sample's frames one after the other. n is 0 without pictures.
        frames: How many frames a sample has, which is 1 for pictures.
        signal: float32 `[n, ...]`, the waveforms or embeddings, or None without.
    """

    images: Tensor
    frames: int = 1
    signal: Tensor | None = None


def outputs_of(result: Any, seeds: Sequence[int]) -> Outputs:
    """The pictures, frames or signal in a pipeline's output, one sample for each of `seeds`.

    >>> output = {"images": np.zeros((2, 8, 8, 3), np.float32)}
    >>> outputs_of(output, seeds=[0, 1]).images.shape
    torch.Size([2, 3, 8, 8])

    Pictures of one channel are taken for grey ones. An array with another number of channels counts as a signal.

    Raises:
        ValueError: if the output holds no samples, or another number of them.
        NotFiniteError: if a sample has NaN or infinity. The sentence names its seed.
    """
    pictures, signal = _first(result, _PICTURES), _first(result, _SIGNALS)
    if pictures is None and signal is None:
        raise ValueError(
            f"a pipeline must give one of {', '.join(_PICTURES + _SIGNALS)}, got {type(result).__name__} without; sample "
            "with your own loop and compare the results"
        )
    if pictures is not None and (found := _channels_first(pictures)) is None:
        pictures, signal = None, pictures
    for value in (pictures, signal):
        if value is not None:
            _check(value, seeds)
    if pictures is None:
        return Outputs(torch.zeros(0, 3, 1, 1), 1, None if signal is None else signal.float())
    assert found is not None
    return Outputs(
        found.flatten(0, 1).contiguous(), found.shape[1], None if signal is None else signal.float()
    )


def _first(result: Any, names: Sequence[str]) -> Tensor | None:
    """The first of the named entries of an output that is there, as a tensor whose first axis is the samples."""
    for name in names:
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if value is not None and not (isinstance(value, (list, tuple)) and not value):
            return _tensor(value)
    return None


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)):
        return torch.stack([_tensor(entry) for entry in value])
    array = np.asarray(value)
    return torch.from_numpy(array / np.float32(255)) if array.dtype == np.uint8 else torch.from_numpy(array)


def _channels_first(pictures: Tensor) -> Tensor | None:
    """Pictures `[n, h, w, c]` or videos `[n, f, h, w, c]` as float32 `[n, f, 3, h, w]`, or None if they are neither."""
    if pictures.dim() not in (4, 5):
        return None
    if pictures.shape[-1] in (1, 3):
        pictures = pictures.movedim(-1, -3)
    if pictures.shape[-3] not in (1, 3):
        return None
    videos = pictures if pictures.dim() == 5 else pictures[:, None]
    return videos.float().expand(-1, -1, 3, -1, -1)


def _check(samples: Tensor, seeds: Sequence[int]) -> None:
    if len(samples) != len(seeds):
        raise ValueError(
            f"a pipeline must give one picture per seed, got {len(samples)} for {len(seeds)}; do not set "
            "num_images_per_prompt."
        )
    broken = [seed for seed, one in zip(seeds, samples, strict=True) if not bool(one.isfinite().all())]
    if broken:
        raise NotFiniteError(
            f"pictures must be finite, got NaN or infinity for seeds {broken[:5]}; the model overflows, keep more "
            "layers in high precision or sample in a wider dtype."
        )

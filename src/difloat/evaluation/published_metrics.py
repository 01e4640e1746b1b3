"""Metrics with published weights, computed by the libraries that hold them (`pip install "difloat[eval]"`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence, Sized
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

_CLIP_MODEL = "openai/clip-vit-base-patch16"
_EXTERNAL = ("lpips", "clip_score")
_BATCH = 50
_Sized = TypeVar("_Sized", bound=Sized)


def external(
    name: str,
    reference: Tensor | None,
    images: Tensor,
    prompts: Sequence[str] | None,
    *,
    clip_model: str = _CLIP_MODEL,
) -> Tensor:
    """A metric with published weights for every picture, `[n]`. Its library fetches the weights.

    >>> pictures = torch.rand(2, 3, 64, 64)
    >>> external("lpips", None, pictures, None)
    Traceback (most recent call last):
    ValueError: lpips needs reference pictures, one per picture (2), got none.

    Args:
        name: "lpips" (arXiv:1801.03924 with AlexNet), which compares with `reference` and is better when lower, or
            "clip_score" (arXiv:2104.08718 as 100 max(cos, 0)), which compares with `prompts` and is better when higher.
        reference: The full-precision pictures `[n, 3, h, w]` in [0, 1], or None.
        images: The pictures to judge, `[n, 3, h, w]` in [0, 1].
        prompts: One prompt per picture, or None.
        clip_model: The name or directory of a CLIP model for transformers.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if the name is unknown, or the metric's second input is missing or does not fit.
    """
    if name not in _EXTERNAL:
        raise ValueError(f"an external metric must be one of {', '.join(_EXTERNAL)}, got {name!r}.")
    if name == "lpips":
        return _lpips(_matching(name, "reference pictures", reference, len(images)), images)
    return _clip_score(images, list(_matching(name, "prompts", prompts, len(images))), clip_model)


def _matching(metric: str, what: str, given: _Sized | None, count: int) -> _Sized:
    if given is None or len(given) != count:
        got = "none" if given is None else len(given)
        raise ValueError(f"{metric} needs {what}, one per picture ({count}), got {got}.")
    return given


def _library(module: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{metric} needs the package {module}, got "{error}"; run: pip install "difloat[eval]".'
        ) from error


def _lpips(reference: Tensor, images: Tensor) -> Tensor:
    network = _library("lpips", "lpips").LPIPS(net="alex", verbose=False).eval()
    with torch.no_grad():
        pairs = zip(reference.split(_BATCH), images.split(_BATCH), strict=True)
        return torch.cat([network(a, b, normalize=True).flatten() for a, b in pairs])


def _clip_score(images: Tensor, prompts: list[str], model: str) -> Tensor:
    transformers = _library("transformers", "clip_score")
    network = transformers.CLIPModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    processor = transformers.CLIPImageProcessor.from_pretrained(model)
    scores = []
    for first in range(0, len(images), _BATCH):
        pixels = (images[first : first + _BATCH] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        text = tokenizer(prompts[first : first + _BATCH], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = network(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=processor(list(pixels), return_tensors="pt")["pixel_values"],
            )
        cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        scores.append(100 * cosines.clamp(min=0))
    return torch.cat(scores)

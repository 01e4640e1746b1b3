"""Strips of pictures: the same prompts and seeds in full precision and quantized, as one PNG and its numbers.

    python benchmarks/pictures.py                # the README's: W4A8 on both reference models
    python benchmarks/pictures.py --strip w2a4   # 2-bit weights on emoji-unet, for docs/papers/mpqdm.md
    python benchmarks/pictures.py --strip w2a4-pixart   # the same on emoji-pixart, with our own recipe

The first row is full precision. Beside the picture goes a JSON with the PSNR of every other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

from difloat import api, evaluate, reference_models
from difloat.evaluation.picture_metrics import mean_interval, psnr
from difloat.report import build

PROMPTS = (
    "red apple",
    "cat face",
    "house building",
    "sunflower",
    "rocket",
    "soccer ball",
    "green heart",
    "umbrella",
)
Rows = dict[str, tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Strip:
    """What is drawn: a block of columns per model, a row per recipe."""

    out: str
    bits: str
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    rows: Rows


STRIPS = {
    "readme": Strip(
        "docs/pictures.png",
        "w4a8",
        ("emoji-pixart", "emoji-unet"),
        PROMPTS[:4],
        {
            "auto w4a8": ("auto", {}),
            "rounding to nearest w4a8, INT4": (
                "rtn",
                {"grid": "int", "scale": "minmax", "keep_8bit": (), "activation": "static"},
            ),
        },
    ),
    "w2a4": Strip(
        "docs/papers/mpqdm.png",
        "w2a4",
        ("emoji-unet",),
        PROMPTS,
        {
            "MPQ-DM w2a4": ("mpqdm", {"epochs": 20}),
            "EfficientDM w2a4": ("efficientdm", {"epochs": 20}),
            "rounding to nearest w2a4, first and last layer at 8 bits": (
                "rtn",
                {"grid": "int", "activation": "static"},
            ),
        },
    ),
    "w2a4-pixart": Strip(
        "docs/papers/mpqdm-pixart.png",
        "w2a4",
        ("emoji-pixart",),
        PROMPTS,
        {
            "guided w2a4": ("guided", {}),
            "MPQ-DM w2a4": ("mpqdm", {"epochs": 20}),
            "EfficientDM w2a4": ("efficientdm", {"epochs": 20}),
            "rounding to nearest w2a4, first and last layer at 8 bits": (
                "rtn",
                {"grid": "int", "activation": "static"},
            ),
        },
    ),
}


def drawn(pipeline: Any, name: str, prompts: list[str], steps: int) -> evaluate.Generated:
    """One picture per prompt, seeds 0, 1, ..."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    seeds = range(len(prompts))
    return evaluate.generate(
        pipeline, prompts, seeds=seeds, steps=steps, guidance_scale=guidance, call_kwargs=call, progress=False
    )


def columns(name: str, strip: Strip, steps: int, samples: int) -> tuple[np.ndarray, dict[str, float]]:
    """Pictures [rows, n, h, w, 3] of one model and the PSNR of every quantized row in dB."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    prompts = list(strip.prompts)
    reference = drawn(reference_models.load(name), name, prompts, steps)
    images, numbers = [build.to_uint8(reference.images)], {}
    for label, (recipe, options) in strip.rows.items():
        pipeline = reference_models.load(name)
        api.quantize(
            pipeline,
            recipe,
            strip.bits,
            prompts=reference_models.captions(),
            samples=samples,
            steps=steps,
            guidance_scale=guidance,
            call_kwargs=call,
            **options,
        )
        found = drawn(pipeline, name, prompts, steps)
        images.append(build.to_uint8(found.images))
        numbers[label] = mean_interval(psnr(reference.images, found.images)).value
        print(f"{name}, {label}: PSNR {numbers[label]:.2f} dB", flush=True)
    return np.stack(images), numbers


def main() -> None:
    """Draw, write the strip and the JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--strip", choices=STRIPS, default="readme")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=160, help="calibration rows")
    options = harness.arguments(parser)
    strip = STRIPS[options.strip]
    out = options.out or harness.ROOT / strip.out
    blocks, numbers = [], {}
    for name in strip.models:
        pictures, numbers[name] = columns(name, strip, options.steps, options.samples)
        blocks.append(
            np.concatenate(list(np.concatenate(list(pictures.transpose(1, 0, 2, 3, 4)), axis=2)), axis=0)
        )
    Image.fromarray(np.concatenate(blocks, axis=1)).save(out, optimize=True)
    harness.write(out.with_suffix(".json"), {"prompts": list(strip.prompts), "psnr_db": numbers})
    print(f"{out.name}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()

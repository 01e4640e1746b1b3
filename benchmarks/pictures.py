"""The pictures of the README: the same prompts and seeds in full precision and quantized, as one PNG strip and its numbers.

python benchmarks/pictures.py

Rows: full precision, LBFP W4A8 (FP4 weights, FP8 activations), rounding to nearest on INT4 weights and INT8 activations. Half
of the columns are from `emoji-pixart`, half from `emoji-unet`. Beside the picture goes a JSON with the PSNR of every row.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a sibling called kernels.py would shadow a package of that name

import numpy as np
import torch
from PIL import Image

from difloat import api, evaluate, record, reference_models, report
from difloat.metrics import mean_interval, psnr

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("emoji-pixart", "emoji-unet")
PROMPTS = ("red apple", "cat face", "house building", "sunflower")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LBFP w4a8, FP4": ("lbfp", {"iterations": 80, "rounding_rows": 96}),
    "rounding to nearest w4a8, INT4": ("rtn", {"grid": "int", "scale": "minmax", "keep_8bit": ()}),
}


def drawn(pipeline: Any, name: str, prompts: list[str], steps: int) -> evaluate.Generated:
    """One picture per prompt, seeds 0, 1, ..."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    seeds = range(len(prompts))
    return evaluate.generate(
        pipeline, prompts, seeds=seeds, steps=steps, guidance_scale=guidance, call_kwargs=call, progress=False
    )


def columns(name: str, prompts: list[str], steps: int, samples: int) -> tuple[np.ndarray, dict[str, float]]:
    """Pictures [rows, n, h, w, 3] of one model and the PSNR of every quantized row in dB."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    reference = drawn(reference_models.load(name), name, prompts, steps)
    images, numbers = [record.to_uint8(reference.images)], {}
    for label, (recipe, options) in ROWS.items():
        pipeline = reference_models.load(name)
        api.quantize(
            pipeline,
            recipe,
            "w4a8",
            prompts=reference_models.captions(),
            samples=samples,
            steps=steps,
            guidance_scale=guidance,
            call_kwargs=call,
            **options,
        )
        found = drawn(pipeline, name, prompts, steps)
        images.append(record.to_uint8(found.images))
        numbers[label] = mean_interval(psnr(reference.images, found.images)).value
        print(f"{name}, {label}: PSNR {numbers[label]:.2f} dB", flush=True)
    return np.stack(images), numbers


def main() -> None:
    """Draw, write the strip and the JSON."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures.png")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=160, help="calibration rows")
    options = parser.parse_args()
    prompts = list(PROMPTS)
    strips, numbers = [], {}
    for name in MODELS:
        pictures, numbers[name] = columns(name, prompts, options.steps, options.samples)
        strips.append(
            np.concatenate(list(np.concatenate(list(pictures.transpose(1, 0, 2, 3, 4)), axis=2)), axis=0)
        )
    Image.fromarray(np.concatenate(strips, axis=1)).save(options.out, optimize=True)
    data = {
        "command": "python benchmarks/pictures.py",
        "prompts": prompts,
        "psnr_db": numbers,
        "versions": report.versions(),
        "threads": torch.get_num_threads(),
    }
    options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Quantize a pipeline while it loads, without data; save it, and load it like any other diffusers pipeline.

python examples/load_anywhere.py --model emoji-pixart --out emoji-fast-fp4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import difloat
from difloat import DifloatConfig, run
from difloat.checkpoint import plan_of
from difloat.pipelines import denoiser_of


def main() -> None:
    """Load, quantizing; save; load again."""
    parser = argparse.ArgumentParser(description="Quantize a pipeline while it loads.")
    parser.add_argument("--model", default="emoji-pixart", help="a reference model or a diffusers directory")
    parser.add_argument(
        "--out", type=Path, default=Path("emoji-fast-fp4"), help="directory of the checkpoint"
    )
    parser.add_argument("--weights", default="search", help="a format's name, or search")
    options = parser.parse_args()

    source = run.load_pipeline(options.model)
    denoiser = denoiser_of(source)[0]
    mapping = {
        denoiser: DifloatConfig(weights=options.weights, exclude=["proj_out"]),
        "text_encoder": DifloatConfig(bits="w8a8"),
        "vae": DifloatConfig(bits="w8a8"),
    }
    with tempfile.TemporaryDirectory() as directory:
        source.save_pretrained(directory)
        pipeline = DiffusionPipeline.from_pretrained(
            directory, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
        )
    difloat.save(pipeline, options.out, overwrite=True, remote_code=True)
    pipeline = DiffusionPipeline.from_pretrained(options.out)
    for name in mapping:
        plan = plan_of(getattr(pipeline, name))
        used = sorted({layer.parts[0].weight.format.name for layer in plan.layers.values()})
        print(
            f"{name}: {len(plan.layers)} layers at {plan.bits} ({', '.join(used)}), {len(plan.skipped)} left as they are"
        )


if __name__ == "__main__":
    main()

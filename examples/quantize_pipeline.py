"""Quantize a pipeline from Python, save it, load it again and compare the pictures of both.

python examples/quantize_pipeline.py --model emoji-pixart --out emoji-fp4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import difloat
from difloat import evaluate, run


def main() -> None:
    """Quantize, save, load, compare."""
    parser = argparse.ArgumentParser(description="Quantize a pipeline and compare the pictures of both.")
    parser.add_argument("--model", default="emoji-pixart", help="a reference model or a diffusers directory")
    parser.add_argument("--out", type=Path, default=Path("emoji-fp4"), help="directory of the checkpoint")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--iterations", type=int, default=120, help="steps of learned rounding per block")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()

    pipeline = run.load_pipeline(options.model)
    prompts = run.prompts_of(pipeline, options.model, None)
    guidance_scale, call_kwargs = run.call_of(options.model, None)
    seeds = range(options.images)

    def draw() -> evaluate.Generated:
        return evaluate.generate(
            pipeline,
            prompts,
            seeds=seeds,
            steps=options.steps,
            guidance_scale=guidance_scale,
            call_kwargs=call_kwargs,
        )

    before = draw()
    plan = difloat.quantize(
        pipeline,
        recipe="lbfp",
        bits=options.bits,
        prompts=prompts,
        samples=options.samples,
        steps=options.steps,
        guidance_scale=guidance_scale,
        iterations=options.iterations,
        call_kwargs=call_kwargs,
    )
    difloat.save(pipeline, options.out, overwrite=True)
    pipeline = difloat.load(options.out)
    similarity = evaluate.mean_interval(evaluate.psnr(before.images, draw().images))

    weights_bytes = sum(layer.nbytes for layer in plan.layers.values())
    print(f"{len(plan.layers)} layers in {weights_bytes / 1e6:.2f} MB at {options.out}")
    print(f"PSNR to full precision {similarity.value:.1f} dB ({similarity.low:.1f} to {similarity.high:.1f})")


if __name__ == "__main__":
    main()

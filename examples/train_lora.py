"""Train a LoRA on top of a packed FP4 model: the weights stay packed and frozen, only the adapter learns.

The pictures to learn from are the model's own with their colours inverted, so nothing has to be downloaded.

python examples/train_lora.py --model emoji-unet --out emoji-inverted
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor

import difloat
from difloat import run

LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "conv1",
    "conv2",
]  # attention and the convolutions of ResNet blocks


@torch.no_grad()
def inverted_latents(pipeline: Any, prompts: Sequence[str], steps: int, generator: torch.Generator) -> Tensor:
    """Latents [n, c, h, w] of pictures that the pipeline draws, colours inverted."""
    drawn = pipeline(
        list(prompts), num_inference_steps=steps, output_type="latent", generator=generator
    ).images
    factor = pipeline.vae.config.scaling_factor
    pixels = pipeline.vae.decode(drawn / factor).sample
    return pipeline.vae.encode(-pixels).latent_dist.mode() * factor


def noise_loss(pipeline: Any, latents: Tensor, texts: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise at random timesteps."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(
        pipeline.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
    )
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(pipeline.unet(noisy, timesteps, texts).sample, noise)


def train(
    pipeline: Any, latents: Tensor, texts: Tensor, iterations: int, rate: float, generator: torch.Generator
) -> None:
    """Adam on whatever needs a gradient: the adapter."""
    optimizer = torch.optim.Adam([p for p in pipeline.unet.parameters() if p.requires_grad], lr=rate)
    for _ in range(iterations):
        rows = torch.randint(len(latents), (8,), generator=generator)
        optimizer.zero_grad()
        noise_loss(pipeline, latents[rows], texts[rows], generator).backward()
        optimizer.step()


@torch.no_grad()
def fixed_loss(pipeline: Any, latents: Tensor, texts: Tensor) -> float:
    """The loss with the same noise every time."""
    draws = [noise_loss(pipeline, latents, texts, torch.Generator().manual_seed(seed)) for seed in range(4)]
    return float(torch.stack(draws).mean())


def main() -> None:
    """Quantize, train, save, load beside the packed model."""
    parser = argparse.ArgumentParser(description="Train a LoRA on a packed U-Net.")
    parser.add_argument(
        "--model", default="emoji-unet", help="emoji-unet or a directory of the Stable Diffusion kind"
    )
    parser.add_argument("--out", type=Path, default=Path("emoji-inverted"), help="directory of the LoRA")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--pictures", type=int, default=48, help="to learn from")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--iterations", type=int, default=300, help="training steps")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    pipeline = run.load_pipeline(options.model)
    prompts = (run.prompts_of(pipeline, options.model, None) or [])[: options.pictures]
    latents = inverted_latents(pipeline, prompts, options.steps, generator)
    texts = pipeline.encode_prompt(prompts, "cpu", 1, False)[0].detach()

    difloat.quantize(
        pipeline, recipe="rtn", bits=options.bits, prompts=prompts, samples=32, steps=options.steps
    )
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LAYERS))
    before = fixed_loss(pipeline, latents, texts)
    train(pipeline, latents, texts, options.iterations, options.rate, generator)
    after = fixed_loss(pipeline, latents, texts)

    file = difloat.lora.save(pipeline, options.out)
    difloat.lora.unload(pipeline)
    difloat.lora.load(pipeline, file)
    trained = sum(p.numel() for p in pipeline.unet.parameters() if p.requires_grad)
    print(f"loss {before:.4f} before, {after:.4f} after {options.iterations} steps of {trained:,} values")
    print(f"LoRA of {file.stat().st_size / 1e3:.0f} kB at {file}")


if __name__ == "__main__":
    main()

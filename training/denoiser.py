"""Trains one reference denoiser on frozen latents and caption embeddings (`shared.pt`, see `prepare.py`).

Noise prediction with min-SNR-type weights, Stable Diffusion's noise schedule, one prompt in ten empty for guidance, moving
average of the weights. The learning rate follows the share of `--minutes` that is used up; resumes after a kill.

    python training/denoiser.py --model unet --out runs --minutes 60
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import nn

import emoji
from loop import Average, Clock, batches, learning_rate, optimizer_for, restore, save
from prepare import trained
from vae import build as build_vae
from vae import to_uint8

Predict = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BATCH = 8  # the number of updates limits at first; the last fifth of the run uses twice as many pictures
HOLD = 0.6  # share of the run at the peak learning rate: the weights have far to go
EMPTY = 0.1  # share of prompts replaced by the empty one
SNR_CEILING = 5.0
GUIDANCE = 3.0


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's kind of U-Net, about 3.8 M parameters, 0.19 GMAC per picture and step."""
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion's configuration files
        norm_num_groups=8,
        addition_embed_type="text",  # the prompt also joins the time embedding, and so reaches every resolution
        addition_embed_type_num_heads=4,
    )
    nn.init.constant_(model.add_embedding.norm2.weight, 0.1)
    return model


def build_pixart() -> PixArtTransformer2DModel:
    """A small PixArt-alpha transformer, about 3.3 M parameters, 0.17 GMAC per picture and step."""
    model = PixArtTransformer2DModel(
        sample_size=16,
        num_attention_heads=6,
        attention_head_dim=32,
        cross_attention_dim=192,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        caption_channels=128,
        use_additional_conditions=False,
    )
    nn.init.zeros_(model.proj_out.weight)
    return model


def predict_unet(
    model: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Noise predicted by the U-Net; its stock pipeline passes no mask, so padding is part of the prompt."""
    return model(noisy, timestep, text, return_dict=False)[0]


def predict_pixart(
    model: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Noise predicted by the transformer, padding masked out."""
    condition = {"resolution": None, "aspect_ratio": None}
    return model(
        noisy,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=timestep,
        added_cond_kwargs=condition,
        return_dict=False,
    )[0]


def build(name: str) -> tuple[nn.Module, SchedulerMixin, Predict]:
    """Returns the untrained denoiser, its sampler's scheduler and the function that calls it."""
    if name == "unet":
        scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        return build_unet(), scheduler, predict_unet
    return build_pixart(), DPMSolverMultistepScheduler(**SCHEDULE), predict_pixart


class Task:
    """Draws noisy latents and scores predictions."""

    def __init__(self, shared: dict, alphas: torch.Tensor, generator: torch.Generator) -> None:
        self.latents, self.texts, self.masks = shared["latents"], shared["embeddings"], shared["masks"]
        self.alphas, self.generator = alphas, generator
        ratio = alphas / (1 - alphas)
        # Min-SNR with the square root of the ratio. The caption determines the picture, which is learned where there is
        # much noise; there the plain ratio weighs an error of the implied picture with almost nothing.
        weights = ratio.clamp(max=SNR_CEILING).sqrt() / ratio
        self.weights = weights / weights.mean()

    def loss(self, model: nn.Module, predict: Predict, index: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of the predicted noise for the pictures at `index` [b]."""
        count = len(index)
        # One timestep in each of b equal parts of the range: less variance than independent draws.
        places = torch.arange(count) + torch.rand(count, generator=self.generator)
        timestep = (places / count * len(self.alphas)).long()
        prompts = torch.where(torch.rand(count, generator=self.generator) < EMPTY, len(self.texts) - 1, index)
        clean = self.latents[index]
        noise = torch.randn(clean.shape, generator=self.generator)
        alpha = self.alphas[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = predict(model, noisy, timestep, self.texts[prompts], self.masks[prompts])
        return (self.weights[timestep] * (predicted - noise).square().mean((1, 2, 3))).mean()


@torch.no_grad()
def sample(
    model: nn.Module,
    predict: Predict,
    scheduler: SchedulerMixin,
    shared: dict,
    index: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Latents [b, 4, 16, 16] sampled with guidance for the captions at `index`."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(index), 4, 16, 16, generator=generator)
    rows = torch.cat([torch.full_like(index, len(shared["embeddings"]) - 1), index])
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        noise = predict(
            model, both, timestep.expand(len(both)), shared["embeddings"][rows], shared["masks"][rows]
        )
        empty, prompt = noise.chunk(2)
        latents = scheduler.step(empty + GUIDANCE * (prompt - empty), timestep, latents).prev_sample
    return latents


class Run:
    """One training run and its checkpoint."""

    def __init__(self, name: str, out: Path, minutes: float, peak: float) -> None:
        torch.manual_seed(0)
        self.name, self.out, self.peak = name, out, peak
        self.checkpoint = out / f"{name}.pt"
        self.model, self.scheduler, self.predict = build(name)
        if name == "unet":
            self.model.to(memory_format=torch.channels_last)
        self.optimizer, self.average = optimizer_for(self.model, 0.01), Average(self.model)
        self.step, used = 0, 0.0
        if state := restore(self.checkpoint):
            self.model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, used = state["step"], state["seconds"]
        self.clock = Clock(60 * minutes, used)
        self.generator = torch.Generator().manual_seed(1 + self.step)

    def save(self) -> None:
        """Writes the checkpoint."""
        save(
            self.checkpoint,
            model=self.model.state_dict(),
            average=self.average.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            seconds=self.clock.seconds(),
        )

    def show(self, shared: dict) -> None:
        """Writes a sheet of pictures sampled from the averaged weights."""
        index = torch.arange(0, len(shared["latents"]), 9)[:40]
        latents = sample(self.average.module, self.predict, self.scheduler, shared, index, steps=12)
        vae = trained(self.out / "vae.pt", build_vae()).eval()
        with torch.no_grad():
            both = torch.cat(
                [shared["latents"][index[:20]], latents[:20], shared["latents"][index[20:]], latents[20:]]
            )
            emoji.sheet(to_uint8(vae.decode(both).sample)).save(self.out / f"{self.name}.png")

    def train(self, shared: dict, sheet_minutes: float) -> None:
        """Trains until the time is used up; checkpoints every two minutes."""
        task = Task(shared, self.scheduler.alphas_cumprod, self.generator)
        saved = shown = self.clock.seconds()
        running = 1.0
        source = batches(len(shared["latents"]), BATCH, self.generator)
        done = False
        while not done:
            index = torch.cat([next(source) for _ in range(1 if self.clock.progress() < 0.8 else 2)])
            rate = learning_rate(self.clock.progress(), self.peak, hold=HOLD)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = task.loss(self.model, self.predict, index)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.average.update(self.model, self.step)
            running = 0.99 * running + 0.01 * loss.item()
            now, done = self.clock.seconds(), self.clock.progress() >= 1
            if self.step % 100 == 0 or done:
                print(f"step {self.step} {now:.0f} s lr {rate:.1e} loss {running:.4f}", flush=True)
            if done or now - saved > 120:
                saved = now
                self.save()
            if done or now - shown > 60 * sheet_minutes:
                shown = now
                self.show(shared)


def main() -> None:
    """Reads flags and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("unet", "pixart"), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder with shared.pt, for checkpoints and sheets"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock training time")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--sheet-minutes", type=float, default=8.0, help="time between sample sheets")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = restore(arguments.out / "shared.pt")
    if shared is None:
        raise FileNotFoundError(f"{arguments.out / 'shared.pt'} must exist: run training/prepare.py first")
    run = Run(arguments.model, arguments.out, arguments.minutes, arguments.rate)
    print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    run.train(shared, arguments.sheet_minutes)


if __name__ == "__main__":
    main()

"""Makes `emoji-vae`, an `AutoencoderKL` with factor 4 and 4 latent channels: linear encoder, trained decoder.

The encoder is not trained. It is the best linear projection of 4x4 patches to 4 numbers (principal components of the
picture set), written into the stock encoder's layers: latents are small pictures, easy to learn for a denoiser, and
fixed before any training. The decoder starts as the inverse projection and learns the detail, with L1 at three scales,
L2, L1 of gradients and noise on the latents. Resumes from the checkpoint in `--out` after a kill.

    python training/vae.py --out runs --minutes 30
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

import emoji
from loop import Average, Clock, batches, learning_rate, optimizer_for, restore, save

CHROMA = 1.0  # extra weight of colour errors against brightness errors
DEVIATION = 0.05  # of the latent posterior, where latents have unit variance
NOISE = 0.15  # largest deviation of training noise on latents: a denoiser's output is not exact either
BATCH = 4
LOUD = 200.0  # see `write_encoder`


def build() -> AutoencoderKL:
    """The autoencoder of both reference models, about 0.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # few groups: a norm of one or two channels alone would erase flat colours
        sample_size=emoji.SIZE,
        scaling_factor=1.0,
    )


def patches(images: torch.Tensor) -> torch.Tensor:
    """Cuts pictures [n, 3, 64, 64] into 4x4 patches: [n * 256, 3, 4, 4]."""
    cut = images.unfold(2, 4, 4).unfold(3, 4, 4)  # [n, 3, 16, 16, 4, 4]
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)


def projection(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of patches, as a convolution of stride 4.

    Channels are scaled by the square root of their deviation: between unit variance for each (which would make the
    weakest as important as the strongest) and one scale for all. The mean square over channels is 1.

    Returns:
        Kernel [4, 3, 4, 4] and bias [4] to the latents, and the inverse to a patch's mean colour [3, 5] (4 weights
        and a constant).
    """
    flat = patches(images).flatten(1)
    mean = flat.mean(0)
    _, _, directions = torch.linalg.svd(torch.cov((flat - mean).T), full_matrices=False)
    basis = directions[:4]
    deviation = ((flat - mean) @ basis.T).std(0)
    scale = deviation.sqrt()
    scale = scale * ((deviation / scale).square().mean().sqrt())
    kernel = basis / scale[:, None]
    colour = (basis * scale[:, None]).view(4, 3, 16).mean(2).T
    return (
        kernel.view(4, 3, 4, 4),
        -kernel @ mean,
        torch.cat([colour, mean.view(3, 16).mean(1, keepdim=True)], 1),
    )


def silence(module: nn.Module) -> None:
    """Sets the last layer of every residual branch to zero, so that the module starts linear."""
    for name, layer in module.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Clears a convolution and returns it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def write_encoder(model: AutoencoderKL, kernel: torch.Tensor, bias: torch.Tensor) -> None:
    """Writes the projection (kernel [4, 3, 4, 4], bias [4]) into the stock encoder's layers.

    Each number also travels negated: silu(x) - silu(-x) = x, so the activation before the last layer cancels. Two
    loud constant channels, +200 and -200, fix the variance that the last group norm divides by.
    """
    encoder = model.encoder
    silence(encoder)
    zero(encoder.conv_in).weight[range(3), range(3), 1, 1] = 1
    first, second = (zero(encoder.down_blocks[level].downsamplers[0].conv) for level in (0, 1))
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = 3 * (2 * y + x)  # the first halving keeps all 12 numbers of a 2x2 patch, as channels
        first.weight[range(place, place + 3), range(3), y, x] = 1
        second.weight[:4, place : place + 3, :2, :2] = kernel[:, :, y::2, x::2]
    second.bias[:4] = bias
    second.weight[4:8], second.bias[4:8] = -second.weight[:4], -bias
    second.bias[8], second.bias[9] = LOUD, -LOUD
    for level, count in ((1, 12), (2, 10)):
        zero(encoder.down_blocks[level].resnets[0].conv_shortcut).weight[range(count), range(count), 0, 0] = 1
    deviation = LOUD * math.sqrt(2 / (model.config.block_out_channels[-1] // model.config.norm_num_groups))
    leave = zero(encoder.conv_out)
    leave.weight[range(4), range(4), 1, 1] = deviation
    leave.weight[range(4), range(4, 8), 1, 1] = -deviation
    zero(model.quant_conv).weight[range(4), range(4), 0, 0] = 1
    model.quant_conv.bias[4:] = 2 * math.log(DEVIATION)
    zero(model.post_quant_conv).weight[range(4), range(4), 0, 0] = 1


@torch.no_grad()
def write_decoder(model: AutoencoderKL, colour: torch.Tensor) -> None:
    """Starts the decoder as the inverse projection (colour [3, 5]), with room to learn in all other channels."""
    decoder = model.decoder
    silence(decoder)
    smooth = torch.tensor([1.0, 2.0, 1.0])
    smooth = smooth[:, None] * smooth / 16
    layers = [decoder.conv_in, *(decoder.up_blocks[level].upsamplers[0].conv for level in (0, 1))]
    for layer, tap in zip(layers, (None, smooth, smooth), strict=True):
        layer.weight[:4], layer.bias[:4] = 0, 0
        for channel in range(4):
            if tap is None:
                layer.weight[channel, channel, 1, 1] = 1
            else:
                layer.weight[channel, channel] = tap
    middle = decoder.up_blocks[1].resnets[0].conv_shortcut
    middle.weight[:4], middle.bias[:4] = 0, 0
    middle.weight[range(4), range(4), 0, 0] = 1
    last = decoder.up_blocks[2].resnets[0].conv_shortcut
    last.weight[:8], last.bias[:8] = 0, 0
    last.weight[:3, :4, 0, 0], last.bias[:3] = colour[:, :4], colour[:, 4]
    last.weight[3:6], last.bias[3:6] = -last.weight[:3], -last.bias[:3]
    # The same two tricks as in the encoder, quieter since the rest is trained.
    last.bias[6], last.bias[7] = 4, -4
    deviation = math.sqrt((2 * 16 + 3) / 8)
    leave = zero(decoder.conv_out)
    leave.weight[range(3), range(3), 1, 1] = deviation
    leave.weight[range(3), range(3, 6), 1, 1] = -deviation


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, 64, 64, 3] to float [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float [n, 3, h, w] in -1..1 to uint8 [n, h, w, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def shifted(images: torch.Tensor, largest: int, generator: torch.Generator) -> torch.Tensor:
    """Moves half of the pictures [n, 3, h, w] by up to `largest` pixels; white comes in."""
    padded = F.pad(images, (largest,) * 4, value=1.0)
    size = images.shape[-1]
    moves = torch.randint(0, 2 * largest + 1, (len(images), 2), generator=generator)
    moves[torch.rand(len(images), generator=generator) < 0.5] = largest
    pairs = zip(padded, moves.tolist(), strict=True)
    return torch.stack([picture[:, y : y + size, x : x + size] for picture, (y, x) in pairs])


def gradient_loss(difference: torch.Tensor) -> torch.Tensor:
    """L1 of horizontal and vertical differences of an error image."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def loss_of(model: AutoencoderKL, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Reconstruction loss of one batch of latents [n, 4, 16, 16] against pictures [n, 3, 64, 64] in -1..1."""
    difference = model.decode(latents).sample - images
    difference = difference + CHROMA * (difference - difference.mean(1, keepdim=True))
    coarse = F.avg_pool2d(difference, 4).abs().mean() + F.avg_pool2d(difference, 16).abs().mean()
    return (
        difference.abs().mean() + difference.square().mean() + 0.5 * coarse + 0.5 * gradient_loss(difference)
    )


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Reconstructs through the posterior mean; returns pictures [n, 3, 64, 64] and the PSNR in dB (range 2)."""
    parts = [
        model.decode(model.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in images.split(50)
    ]
    result = torch.cat(parts)
    error = (result - images).square().mean((1, 2, 3))
    return result, (10 * torch.log10(4 / error)).mean().item()


def initial(images: torch.Tensor) -> tuple[AutoencoderKL, torch.Tensor, torch.Tensor]:
    """The autoencoder before training, and the projection's kernel and bias."""
    torch.manual_seed(0)
    model = build()
    kernel, bias, colour = projection(images)
    write_encoder(model, kernel, bias)
    write_decoder(model, colour)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    return model, kernel, bias


def train(images: torch.Tensor, out: Path, minutes: float, peak: float) -> None:
    """Trains the decoder until the time is used up; checkpoints every minute."""
    generator = torch.Generator().manual_seed(1)
    model, kernel, bias = initial(images)
    model.to(memory_format=torch.channels_last)
    optimizer, average = optimizer_for(model, 1e-4), Average(model)
    step, used, checkpoint = 0, 0.0, out / "vae.pt"
    if state := restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["seconds"]
        generator.manual_seed(step)
    clock, last, running = Clock(60 * minutes, used), used - 60, 0.0
    for index in batches(len(images), BATCH, generator):
        rate = learning_rate(clock.progress(), peak)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = shifted(images[index], 4, generator)
        latents = F.conv2d(batch, kernel, bias, stride=4)
        strength = NOISE * torch.rand(len(batch), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        loss = loss_of(model, latents.contiguous(memory_format=torch.channels_last), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(model, step)
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        done = clock.progress() >= 1
        if step % 100 == 0:
            print(f"step {step} {clock.seconds():.0f} s lr {rate:.1e} loss {running:.4f}", flush=True)
        if done or clock.seconds() - last > 60:
            last = clock.seconds()
            save(
                checkpoint,
                model=model.state_dict(),
                average=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                seconds=last,
            )
            result, psnr = reconstruct(average.module, images[:40])
            emoji.sheet(to_uint8(torch.cat([images[:20], result[:20], images[20:40], result[20:]]))).save(
                out / "vae.png"
            )
            print(f"step {step} PSNR {psnr:.2f} dB", flush=True)
        if done:
            break
    print(f"finished: {step} steps, PSNR of all {reconstruct(average.module, images)[1]:.2f} dB", flush=True)


def main() -> None:
    """Reads flags and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    emoji.add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and sample sheets")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock training time")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = to_tensor(emoji.load(arguments.data, arguments.font))
    train(images, arguments.out, arguments.minutes, arguments.rate)


if __name__ == "__main__":
    main()

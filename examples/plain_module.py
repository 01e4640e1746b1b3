"""Quantize a denoiser that diffusers does not know: any `nn.Module`, with a function that samples with it.

python examples/plain_module.py --out points-fp4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import difloat


class Denoiser(nn.Module):
    """Predicts the noise in points of the plane; the timestep is one entry per row, as difloat requires."""

    def __init__(self, width: int) -> None:
        """Three hidden layers."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Noise [b, 2] in points [b, 2] at timesteps [b] in 0..1."""
        return self.layers(torch.cat([sample, timestep[:, None]], dim=1))


def train(model: Denoiser, iterations: int, generator: torch.Generator) -> None:
    """Flow matching on a ring: the model learns the direction from points of the ring to noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(iterations):
        angle = 2 * torch.pi * torch.rand(256, generator=generator)
        data, noise = torch.stack([angle.cos(), angle.sin()], 1), torch.randn(256, 2, generator=generator)
        timestep = torch.rand(256, generator=generator)
        mixed = data + timestep[:, None] * (noise - data)
        loss = (model(mixed, timestep) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(model: nn.Module, count: int = 512, steps: int = 20) -> Tensor:
    """Points [count, 2] from noise of a fixed seed, by Euler steps: the loop that calibrates and the one that draws."""
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    for step in range(steps, 0, -1):
        points = points - model(points, torch.full((count,), step / steps)) / steps
    return points


def main() -> None:
    """Train, quantize, save, load into a fresh module, compare."""
    parser = argparse.ArgumentParser(description="Quantize a plain module.")
    parser.add_argument("--out", type=Path, default=Path("points-fp4"), help="directory of the checkpoint")
    parser.add_argument("--iterations", type=int, default=2000, help="training steps")
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    model = Denoiser(options.width)
    train(model, options.iterations, generator)
    before = sample(model)
    plan = difloat.quantize(model, recipe="lbfp", bits="w4a8", forward_loop=sample, samples=256)
    difloat.save(model, options.out, overwrite=True)
    model = difloat.load(options.out, into=Denoiser(options.width))
    moved = (sample(model) - before).norm(dim=1).mean()

    for name, layer in plan.layers.items():
        print(f"{name}: {layer.parts[0].weight.format.name}, {layer.nbytes} bytes")
    print(f"points on a ring of radius 1 moved by {moved:.3f} on average")


if __name__ == "__main__":
    main()

"""A Stable Diffusion 1.5 of random weights in a GGUF of ours, drawn by stable-diffusion.cpp beside its own float file.

Its layers take the four formats of GGUF in turns. The float file holds what they stand for, so both files give the same picture
up to what the program makes of inputs: ggml rounds them to 8 bits in blocks of 32 where the weights are quantized. Random
weights show nothing but noise, which is as good for a comparison.

    pip install stable-diffusion-cpp-python==0.4.7     # compiles for minutes
    python benchmarks/stable_diffusion_cpp.py

Writes ``benchmarks/results/stable-diffusion-cpp.json``.
"""

from __future__ import annotations

import resource
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import difloat
from difloat import api, interchange
from difloat.layers import packed
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize
from difloat.plan.plan import Plan
from difloat.plan.rules import MIN_MAX, Rule, draft_layer

UNET = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
FORMATS = {"iq4nl": "IQ4_NL", "int4": "Q4_0", "uint4": "Q4_1", "int8": "Q8_0"}


def rule(name: str) -> Rule:
    """The rule of a format in blocks of 32 with float16 scales, without a search of ranges, which would take long."""
    zero_points = MIN_MAX if name == "uint4" else None
    return Rule((parse(name),), "group", 32, clips=MIN_MAX, zero_points=zero_points, scales="float16")


def quantized(model: nn.Module) -> Plan:
    """All linear layers of whole blocks, in the four formats by turns."""
    linear = [(name, layer) for name, layer in packed.quantizable(model).items() if layer.weight.dim() == 2]
    layers = {}
    for (name, layer), format in zip(linear, cycle(FORMATS)):
        if layer.weight.shape[1] % 32 == 0:
            weight = layer.weight.detach().float()
            layers[name] = draft_layer(weight, [weight.shape[1]], rule(format)).plan()
    return Plan("rtn", "w4a16", layers)


def written(folder: Path) -> dict[str, int]:
    """The parts of a Stable Diffusion 1.5 as files, its denoiser as a GGUF of ours and as floats; layers by type."""
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    )
    names = {name.removeprefix("text_model."): tensor for name, tensor in text.half().state_dict().items()}
    save_file(
        {f"text_model.{name}": t.contiguous() for name, t in names.items()}, folder / "clip.safetensors"
    )
    save_file(AutoencoderKL(**VAE).half().state_dict(), folder / "vae.safetensors")
    unet = UNet2DConditionModel(**UNET).half()
    plan = quantized(unet)
    floats = unet.state_dict() | {f"{name}.weight": dequantize(layer) for name, layer in plan.layers.items()}
    save_file({name: tensor.contiguous() for name, tensor in floats.items()}, folder / "float.safetensors")
    difloat.save(api.apply(unet, plan), folder / "own")
    interchange.export_checkpoint(folder / "own", folder / "ours.gguf", "gguf")
    found = [FORMATS[layer.parts[0].weight.format.name] for layer in plan.layers.values()]
    return {name: found.count(name) for name in FORMATS.values()}


def drawn(folder: Path, denoiser: str, pixels: int, threads: int) -> np.ndarray:
    """What stable-diffusion.cpp draws in two steps, uint8 [h, w, 3]."""
    from stable_diffusion_cpp import StableDiffusion

    program = StableDiffusion(
        diffusion_model_path=str(folder / denoiser),
        clip_l_path=str(folder / "clip.safetensors"),
        vae_path=str(folder / "vae.safetensors"),
        n_threads=threads,
        verbose=False,
    )
    size = {"width": pixels, "height": pixels}
    images = program.generate_image(
        prompt="a red apple", sample_steps=2, sample_method="euler", cfg_scale=1.0, seed=1, **size
    )
    return np.asarray(images[0])


def main() -> None:
    """Write, draw twice and compare."""
    parser = harness.parser(__doc__, threads=1, out=harness.RESULTS / "stable-diffusion-cpp.json")
    parser.add_argument("--pixels", type=int, default=64)
    options = harness.arguments(parser)
    found: dict[str, Any] = {"reader": harness.versions(("stable-diffusion-cpp-python",))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["layers"] = written(folder)
        found["bytes"] = {file: (folder / file).stat().st_size for file in ("ours.gguf", "float.safetensors")}
        one, other = (
            drawn(folder, file, options.pixels, options.threads).astype(int)
            for file in ("ours.gguf", "float.safetensors")
        )
    apart = np.abs(one - other)
    found |= {
        "largest_difference": int(apart.max()),
        "mean_difference": float(apart.mean()),
        "spread_of_the_picture": float(other.std()),
        "cpu_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
    }
    harness.write(options.out, found, show=True)


if __name__ == "__main__":
    main()

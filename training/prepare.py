"""Freezes what both denoisers share: latents of the picture set and the token embeddings of the captions.

Reads `features.pt`, rounds the weights to half precision (as the assets store them) and writes `shared.pt` to the same
folder. The encoder needs no training (see `vae.py`), so this does not wait for the decoder.

    python training/prepare.py --out runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

import emoji
from features import Pair, build_tokenizer
from loop import restore, save
from vae import initial, to_tensor


def half(module: nn.Module) -> nn.Module:
    """Rounds a module's weights to half precision and returns it in single precision."""
    return module.half().float().eval().requires_grad_(False)


def trained(path: Path, module: nn.Module) -> nn.Module:
    """Loads the averaged weights of a checkpoint into a module."""
    state = restore(path)
    if state is None:
        raise FileNotFoundError(f"{path} must exist: run the training script that writes it first")
    module.load_state_dict(state["average"])
    return module


@torch.no_grad()
def encode(model: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means [n, 4, 16, 16] of pictures [n, 3, 64, 64] in -1..1."""
    return torch.cat([model.encode(part).latent_dist.mean for part in images.split(50)])


@torch.no_grad()
def embed(pair: Pair, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings [n, tokens, d] and masks [n, tokens]; the last row is the empty prompt."""
    tokens = build_tokenizer(captions)(
        [*captions, ""], padding="max_length", truncation=True, return_tensors="pt"
    )
    return pair.text(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask


def load_pair(path: Path, captions: list[str]) -> Pair:
    """The trained feature network and text encoder, rounded to half precision."""
    return half(trained(path, Pair(len(build_tokenizer(captions)))))


def main() -> None:
    """Reads flags and writes `shared.pt`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    emoji.add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder with vae.pt and features.pt")
    arguments = parser.parse_args()
    images, captions = to_tensor(emoji.load(arguments.data, arguments.font)), emoji.captions()
    vae = half(initial(images)[0])
    latents = encode(vae, images)
    embeddings, masks = embed(load_pair(arguments.out / "features.pt", captions), captions)
    save(arguments.out / "shared.pt", latents=latents, embeddings=embeddings, masks=masks)
    print(
        f"latents {tuple(latents.shape)}, deviation {latents.std((0, 2, 3))}, largest {latents.abs().max():.1f}"
    )


if __name__ == "__main__":
    main()

"""The built-in picture features: a small network trained with captions, for Fréchet, perceptual and retrieval metrics.

The network was trained by `training/features.py` on the picture set of the reference models, contrastively, with pictures
against captions under strong augmentation. It needs no download. It knows emoji, so other pictures need Inception or CLIP
features (`difloat[eval]`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SIZE = 64  # pixels, height and width the network was trained at


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with group norm. The first halves the resolution, and a shortcut goes around the second."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outside)
        self.conv = nn.Conv2d(outside, outside, 3, padding=1)
        self.norm_out = nn.GroupNorm(8, outside)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The maps [n, outside, h/2, w/2] of maps [n, inside, h, w]."""
        hidden = F.silu(self.norm(self.down(images)))
        return F.silu(self.norm_out(self.conv(hidden)) + hidden)


class FeatureNet(nn.Module):
    """A network from pictures [n, 3, h, w] in 0..1 to float32 features [n, width].

    Args:
        channels: The output channels of the halving blocks.
        width: The length of the feature vector.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128), width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip((3, *channels), channels, strict=False))
        # The last map keeps its 4x4 places: what is where matters for a picture as much as what is in it.
        self.head = nn.Linear(channels[-1] * (SIZE >> len(channels)) ** 2, width)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the blocks, the finest first: [n, c, 32, 32], [n, c, 16, 16], ..."""
        hidden = prepare(images)
        result = []
        for block in self.blocks:
            hidden = block(hidden)
            result.append(hidden)
        return result

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features [n, width] of pictures [n, 3, h, w]."""
        return self.head(self.maps(images)[-1].flatten(1))


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, h, w] in 0..1, scaled to the network's size and to -1..1, as float32."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [n, 3, height, width], got {tuple(images.shape)}")
    images = images.float()
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(
            images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
        )
    return images * 2 - 1


@lru_cache(maxsize=1)
def load() -> FeatureNet:
    """The trained network on the CPU, in evaluation mode, which is the same object every time."""
    folder = ASSETS / "features"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = FeatureNet(tuple(config["channels"]), config["width"])
    state = load_file(folder / "model.safetensors")
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network.eval().requires_grad_(False)


def features(images: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """The features [n, width] of pictures [n, 3, h, w] in 0..1, computed `batch` pictures at a time.

    >>> features(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 128])
    """
    network = load()
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(batch)])


def feature_maps(images: torch.Tensor) -> list[torch.Tensor]:
    """The intermediate maps for a perceptual distance, each of unit length along its channels.

    The mean over places of the squared difference of two pictures' maps, summed over maps, is an LPIPS-type distance. The
    maps are differentiable in the pictures.

    Args:
        images: Pictures [n, 3, h, w] in 0..1.

    Returns:
        Maps [n, c, h, w], the finest first.
    """
    return [F.normalize(level, dim=1, eps=1e-6) for level in load().maps(images)]


@lru_cache(maxsize=1)
def _text() -> tuple[Any, nn.Module, torch.Tensor]:
    """The tokenizer, the text encoder, and the projection [width, d] that takes its pooled output to feature space."""
    from transformers import AutoTokenizer, T5EncoderModel

    folder = ASSETS / "emoji-text"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    projection = load_file(ASSETS / "features" / "projection.safetensors")["weight"].float()
    return tokenizer, encoder.eval().requires_grad_(False), projection


def pooled_text(tokenizer: Any, encoder: nn.Module, captions: list[str]) -> torch.Tensor:
    """The mean of the encoder's token outputs over the real tokens of each caption, [n, d]."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    mask = tokens.attention_mask
    hidden = encoder(tokens.input_ids, attention_mask=mask)[0]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def caption_embeddings(captions: list[str]) -> torch.Tensor:
    """The captions as unit vectors [n, width] in feature space, whose product with unit features scores a match."""
    tokenizer, encoder, projection = _text()
    return F.normalize(pooled_text(tokenizer, encoder, captions) @ projection.T, dim=1)


def retrieval(images: torch.Tensor, captions: list[str], pool: int = 50, seed: int = 0) -> torch.Tensor:
    """Whether the caption of each picture wins against `pool - 1` random other captions of the picture set.

    Args:
        images: Pictures [n, 3, h, w] in 0..1.
        captions: One prompt per picture.
        pool: How many captions there are to choose from, the right one included.
        seed: The seed of the draw of the wrong captions.

    Returns:
        A boolean tensor [n].

    Raises:
        ValueError: if there is not one caption per picture.
    """
    if len(captions) != len(images):
        raise ValueError(f"captions must be one per picture, got {len(captions)} for {len(images)} pictures")
    names = (ASSETS / "captions.txt").read_text(encoding="utf-8").splitlines()
    table = caption_embeddings(names)
    pictures = F.normalize(features(images), dim=1)  # [n, width]
    right = (pictures * caption_embeddings(captions)).sum(1)  # [n]
    scores = pictures @ table.T  # [n, captions]
    generator = torch.Generator().manual_seed(seed)
    hits = []
    for caption, own, row in zip(captions, right, scores, strict=True):
        others = torch.tensor([index for index, name in enumerate(names) if name != caption])
        drawn = others[torch.randperm(len(others), generator=generator)[: pool - 1]]
        hits.append(bool(own > row[drawn].max()))
    return torch.tensor(hits)


def retrieval_accuracy(images: torch.Tensor, captions: list[str], pool: int = 50, seed: int = 0) -> float:
    """The share of pictures for which `retrieval` finds the right caption, from 0 to 1."""
    return retrieval(images, captions, pool, seed).float().mean().item()


def data_statistics() -> tuple[np.ndarray, np.ndarray]:
    """The float32 mean [width] and covariance [width, width] of the features of the training pictures."""
    state = load_file(ASSETS / "features" / "statistics.safetensors")
    return state["mean"].numpy(), state["covariance"].numpy()

"""The embedded reference models: two small latent text-to-image models, trained by the scripts in `training/`.

`emoji-unet` is a `UNet2DConditionModel` in a stock `StableDiffusionPipeline`. `emoji-pixart` is a `PixArtTransformer2DModel`
in a stock `PixArtAlphaPipeline`. They share autoencoder, tokenizer and T5 text encoder, make 64x64 pictures of Noto emoji from
their Unicode names, and need no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ASSETS = Path(__file__).resolve().parent / "assets"
NAMES = ("emoji-unet", "emoji-pixart")


def captions() -> list[str]:
    """The captions of the training pictures, which are the prompts that the models know.

    >>> "red apple" in captions()
    True
    """
    return (ASSETS / "captions.txt").read_text(encoding="utf-8").splitlines()


def call_arguments(name: str) -> dict[str, Any]:
    """The keyword arguments that a call of the model's pipeline needs besides the prompt.

    >>> call_arguments("emoji-unet")
    {'guidance_scale': 3.0}

    Unless told otherwise, the stock PixArt pipeline maps sizes to its own list of 256 to 1024 pixels, pads prompts to 120
    tokens and cleans captions with optional packages. None of this is for pictures of 64 pixels and short names.

    Raises:
        ValueError: if the name is unknown.
    """
    _check(name)
    if name == "emoji-unet":
        return {"guidance_scale": 3.0}
    return {
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "max_sequence_length": 12,
        "clean_caption": False,
    }


def load(name: str) -> DiffusionPipeline:
    """Load an embedded model as its stock diffusers pipeline, in float32 on the CPU.

    >>> import difloat
    >>> pipeline = difloat.reference("emoji-unet")
    >>> type(pipeline).__name__
    'StableDiffusionPipeline'

    Args:
        name: One of `NAMES`.

    Returns:
        A new pipeline, whose call takes `call_arguments(name)`.

    Raises:
        ValueError: if the name is unknown.
    """
    _check(name)
    import torch
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    parts = {
        "vae": AutoencoderKL.from_pretrained(ASSETS / "emoji-vae"),
        "tokenizer": AutoTokenizer.from_pretrained(ASSETS / "emoji-text" / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(
            ASSETS / "emoji-text" / "text_encoder", dtype=torch.float32
        ),
    }
    return _unet(parts) if name == "emoji-unet" else _pixart(parts)


def _check(name: str) -> None:
    """Raise a ValueError unless the name is that of a reference model."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")


def _unet(parts: dict[str, Any]) -> Any:
    """The pipeline of the U-Net and its sampler with the shared parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    folder = ASSETS / "emoji-unet"
    return StableDiffusionPipeline(
        **parts,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pixart(parts: dict[str, Any]) -> Any:
    """The pipeline of the transformer and its sampler with the shared parts."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    folder = ASSETS / "emoji-pixart"
    return PixArtAlphaPipeline(
        **parts,
        transformer=PixArtTransformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
    )

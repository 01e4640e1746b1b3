"""Writes one MODEL_CARD.md per embedded model from `results.json`, which `export.py --check` measures."""

from __future__ import annotations

from pathlib import Path

import emoji

DATA = """## Data and licence

{count} pictures of Noto emoji (copyright Google LLC; pictures under the Apache License 2.0), 64x64 pixels on white, with
their Unicode names as captions; no flags, no skin tones. The list is `captions.txt`; `training/emoji.py` renders it from
the Debian package `fonts-noto-color-emoji`. The weights are under this project's licence, Apache-2.0.
"""

VAE = """# emoji-vae

A stock `AutoencoderKL`, factor 4, 4 latent channels, 0.7 M parameters; shared by both reference models. The encoder is
not trained: it is the principal-component projection of 4x4 patches, written into the stock encoder's layers. The
decoder is trained.

{data}
## Training

{vae_steps} steps of 4 pictures, {vae_minutes:.0f} minutes on one to two CPU cores, float32 (`training/vae.py`).

## Measured

Reconstruction of the training pictures: {psnr:.1f} dB PSNR ({psnr_untrained:.1f} dB before training). Retrieval of the
right caption among 50: {retrieval_decoded:.1%} decoded, {retrieval_data:.1%} for the pictures themselves. Frechet
distance of decoded to original pictures on the built-in features: {frechet_decoded:.2f} (all white: {frechet_white:.1f}).

## Limits

Knows these pictures. Others come out recognisable but soft.
"""

TEXT = """# emoji-text and features

`emoji-text`: a word-level tokenizer (lower case, split at spaces and hyphens, at most 12 tokens) and a `T5EncoderModel` of
0.5 M parameters. `features`: a convolutional network of 0.7 M parameters, 64x64 pictures to 128 numbers, with mean and
covariance over the training pictures.

{data}
## Training

Both together, contrastively (picture against caption), 96 pairs a step for 7 minutes on a CPU core, with shift, scale,
rotation, mirror, colour, blur, missing patches and noise (`training/features.py`).

## Measured

Retrieval of the right caption among 50 for the plain pictures: {retrieval_data:.1%}.

## Limits

Words outside the captions are `<unk>`. The features judge emoji; for other pictures use Inception or CLIP features.
"""

DENOISER = """# {name}

{what} It predicts noise (Stable Diffusion's schedule: scaled-linear betas, 0.00085 to 0.012) and is trained for
classifier-free guidance with the empty prompt.

{data}
## Training

{steps} steps of 8, later 16 pictures, {minutes:.0f} minutes on half to one CPU core, float32, AdamW, min-SNR-type weights,
moving average 0.999 (`training/denoiser.py --model {short}`; `training/README.md` says what was changed on the way).

## Measured

{samples} captions, one picture each, 20 steps, guidance 3, {sampler}, seed 0: the right caption wins among 50 for
{retrieval:.1%} (pictures through the autoencoder alone: {retrieval_decoded:.1%}).
Frechet distance to all training pictures on the built-in features: {frechet:.1f}; the original pictures of the same
captions score {frechet_originals:.1f} (few samples bias it upwards), an all-white set {frechet_white:.0f}.
1,000 pictures take about {cpu_seconds_per_1000:.0f} CPU seconds in float32 at batch 50, measured on a busy
two-core Skylake-X server.

## Limits

A test object, not an image generator: it has memorised its {count} pictures, is prompted by their names, and draws little
else. It exists so that quantization can be judged on a real, trained model without a download.
"""

WHAT = {
    "emoji-unet": "A `UNet2DConditionModel` (SiLU, skip concatenation, self- and cross-attention, GEGLU), 3.8 M parameters, "
    "for a stock `StableDiffusionPipeline`.",
    "emoji-pixart": "A `PixArtTransformer2DModel` (64 tokens, GELU, adaptive layer norm, cross-attention), 3.3 M parameters, "
    "for a stock `PixArtAlphaPipeline`.",
}
SAMPLER = {"emoji-unet": "DDIM", "emoji-pixart": "DPM-Solver++ (2M)"}


def write(results: dict[str, dict[str, float]], assets: Path) -> None:
    """Writes all cards."""
    count = len(emoji.captions())
    shared = dict(results["data"], data=DATA.format(count=count), count=count)
    (assets / "emoji-vae" / "MODEL_CARD.md").write_text(VAE.format(**shared), encoding="utf-8")
    for folder in ("emoji-text", "features"):
        (assets / folder / "MODEL_CARD.md").write_text(TEXT.format(**shared), encoding="utf-8")
    for name, what in WHAT.items():
        own = shared | results[name] | {"steps": f"{results[name]['steps']:,}"}
        short = name.removeprefix("emoji-")
        text = DENOISER.format(name=name, short=short, what=what, sampler=SAMPLER[name], **own)
        (assets / name / "MODEL_CARD.md").write_text(text, encoding="utf-8")

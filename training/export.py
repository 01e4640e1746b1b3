"""Writes trained weights as assets, half precision, and measures them: timing, retrieval, Frechet distance.

python training/export.py --out runs            # write what is there (checkpoints of any age)
python training/export.py --out runs --check    # sample every caption from both models and write model cards
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import cards
import emoji
from denoiser import build
from difloat import reference_models
from difloat.evaluation import emoji_features
from features import build_tokenizer
from loop import restore
from prepare import half, load_pair, trained
from vae import build as build_vae
from vae import initial, reconstruct, to_tensor

ASSETS = emoji.ASSETS
STEPS = 20


def write_model(model: nn.Module, folder: Path) -> None:
    """Saves a diffusers or transformers model in half precision."""
    model.half().save_pretrained(folder, safe_serialization=True)


def write_tokenizer(captions: list[str], folder: Path) -> None:
    """Saves the tokenizer under its class's older name, which transformers 4 and 5 both know."""
    build_tokenizer(captions).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_shared(out: Path, images: torch.Tensor, captions: list[str]) -> None:
    """Writes autoencoder, tokenizer, text encoder, feature network and the statistics of the pictures."""
    write_model(trained(out / "vae.pt", build_vae()), ASSETS / "emoji-vae")
    write_tokenizer(captions, ASSETS / "emoji-text" / "tokenizer")
    pair = load_pair(out / "features.pt", captions)
    write_model(pair.text, ASSETS / "emoji-text" / "text_encoder")
    folder = ASSETS / "features"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half() for name, value in pair.picture.state_dict().items()},
        folder / "model.safetensors",
    )
    save_file({"weight": pair.projection.weight.half()}, folder / "projection.safetensors")
    config = {"channels": [block.conv.out_channels for block in pair.picture.blocks], "width": 128}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with torch.no_grad():
        values = pair.picture((images + 1) / 2).double()
    statistics = {"mean": values.mean(0).float(), "covariance": torch.cov(values.T).float()}
    save_file(statistics, folder / "statistics.safetensors")


def write_denoiser(name: str, out: Path) -> None:
    """Writes one denoiser and its scheduler; the untrained one if there is no checkpoint yet."""
    torch.manual_seed(0)
    model, scheduler, _ = build(name)
    if (out / f"{name}.pt").exists():
        trained(out / f"{name}.pt", model)
    folder = ASSETS / f"emoji-{name}"
    write_model(model, folder / ("unet" if name == "unet" else "transformer"))
    scheduler.save_pretrained(folder / "scheduler")


def frechet(values: torch.Tensor) -> float:
    """Frechet distance of features [n, d] to the training pictures' statistics."""
    mean, covariance = (torch.from_numpy(part).double() for part in emoji_features.data_statistics())
    values = values.double()
    own = torch.cov(values.T)
    # The trace of the root of a product of two covariances is the sum of the roots of its eigenvalues.
    roots = torch.linalg.eigvals(own @ covariance).real.clamp(min=0).sqrt().sum()
    return float((values.mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * roots)


def draw(name: str, prompts: list[str], seed: int, batch: int = 50) -> tuple[np.ndarray, float]:
    """Samples prompts; returns pictures [n, 64, 64, 3] in 0..1 and the CPU seconds of all threads."""
    pipeline = reference_models.load(name)
    pipeline.set_progress_bar_config(disable=True)
    generator, pictures, start = torch.Generator().manual_seed(seed), [], time.process_time()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        pictures.append(
            pipeline(
                part,
                num_inference_steps=STEPS,
                generator=generator,
                output_type="np",
                **reference_models.call_arguments(name),
            ).images
        )
    return np.concatenate(pictures), time.process_time() - start


def to_features(pictures: np.ndarray) -> torch.Tensor:
    """Pictures [n, h, w, 3] in 0..1 as a tensor [n, 3, h, w]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float()


def check(name: str, out: Path, images: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Samples one picture per caption and measures it; writes a sheet next to the checkpoints."""
    own = [emoji.captions().index(caption) for caption in captions]
    pictures, seconds = draw(name, captions, seed=0)
    emoji.sheet((pictures * 255).round().astype(np.uint8)).save(out / f"samples-{name}.png")
    sampled = to_features(pictures)
    state = restore(out / f"{name.removeprefix('emoji-')}.pt") or {"step": 0, "seconds": 0.0}
    return {
        "retrieval": emoji_features.retrieval_accuracy(sampled, captions),
        "frechet": frechet(emoji_features.features(sampled)),
        "frechet_originals": frechet(emoji_features.features((images[own] + 1) / 2)),
        "samples": len(captions),
        "cpu_seconds_per_1000": seconds / len(captions) * 1000,
        "steps": state["step"],
        "minutes": state["seconds"] / 60,
    }


def baselines(images: torch.Tensor, out: Path, captions: list[str]) -> dict[str, float]:
    """The same measures for the pictures themselves and after the autoencoder: what no denoiser can beat."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ASSETS / "emoji-vae", torch_dtype=torch.float32)
    result, psnr = reconstruct(vae, images)
    start = reconstruct(half(initial(images)[0]), images)[1]
    pictures, decoded = (images + 1) / 2, (result + 1) / 2
    state = restore(out / "vae.pt") or {"step": 0, "seconds": 0.0}
    return {
        "vae_steps": state["step"],
        "vae_minutes": state["seconds"] / 60,
        "psnr": psnr,
        "psnr_untrained": start,
        "retrieval_data": emoji_features.retrieval_accuracy(pictures, captions),
        "retrieval_decoded": emoji_features.retrieval_accuracy(decoded, captions),
        "frechet_decoded": frechet(emoji_features.features(decoded)),
        "frechet_white": frechet(emoji_features.features(torch.ones_like(pictures))),
    }


def main() -> None:
    """Reads flags, writes assets, and measures them on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    emoji.add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder with the checkpoints")
    parser.add_argument("--check", action="store_true", help="measure the assets")
    parser.add_argument("--count", type=int, default=353, help="captions to sample, spread over the set")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, captions = to_tensor(emoji.load(arguments.data, arguments.font)), emoji.captions()
    write_shared(arguments.out, images, captions)
    for name in ("unet", "pixart"):
        write_denoiser(name, arguments.out)
    print(f"assets: {sum(p.stat().st_size for p in ASSETS.rglob('*') if p.is_file()) / 1e6:.1f} MB")
    if arguments.check:
        results = {"data": baselines(images, arguments.out, captions)}
        chosen = captions[:: max(1, len(captions) // arguments.count)][: arguments.count]
        for name in reference_models.NAMES:
            results[name] = check(name, arguments.out, images, chosen)
            print(name, results[name], flush=True)
        print("data", results["data"])
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        cards.write(results, ASSETS)


if __name__ == "__main__":
    main()

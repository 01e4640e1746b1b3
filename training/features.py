"""Trains the built-in picture features together with the text encoder, contrastively (picture against caption).

The pictures are augmented strongly (shift, scale, mirror, colour, blur, noise, missing patches), so that features
change little under what a generator gets slightly wrong. Writes `features.pt` to `--out`; resumes from it.

    python training/features.py --out runs --minutes 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import emoji
from difloat.evaluation.emoji_features import FeatureNet, pooled_text
from loop import Average, Clock, batches, learning_rate, optimizer_for, restore, save

BATCH = 96
MAX_TOKENS = 12
TEMPERATURE = 0.1
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the captions' words: lower case, split at spaces and hyphens, `</s>` at the end."""
    words = sorted({word for caption in captions for word in caption.lower().replace("-", " ").split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("-", behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )


def build_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 encoder of about 0.5 M parameters."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.use_attention_mask = True  # StableDiffusionPipeline passes the mask only if this is set
    return T5EncoderModel(config)


class Pair(nn.Module):
    """Feature network, text encoder and the projection from text to feature space."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.picture, self.text = FeatureNet(), build_encoder(vocabulary)
        self.projection = nn.Linear(128, 128, bias=False)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """`count` draws between two bounds, shaped [count, 1, 1, 1] to multiply pictures."""
    return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts by up to 8 pixels, scales by 0.8 to 1.2, rotates a little, mirrors half; white comes in."""
    count = len(images)
    scale = uniform(count, 0.8, 1.2, generator).flatten()
    angle = uniform(count, -0.2, 0.2, generator).flatten()
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    shift = torch.rand(count, 2, generator=generator) * 0.5 - 0.25
    rows = torch.stack(
        [
            torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), shift[:, 0]], 1),
            torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return 1 + F.grid_sample(images - 1, grid, align_corners=False)


def blurred(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mixes each picture with a copy of a quarter of the resolution, as a weak decoder would."""
    small = F.avg_pool2d(images, 4)
    soft = F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)
    return torch.lerp(images, soft, uniform(len(images), -0.2, 0.8, generator).clamp(0, 1))


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns changed pictures [n, 3, 64, 64] in 0..1."""
    count = len(images)
    result = blurred(moved(images, generator), generator)
    gain = 0.8 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator)
    gray = result.mean(1, keepdim=True)
    result = torch.lerp(gray, result, uniform(count, 0.5, 1.3, generator)) * gain
    result = result + uniform(count, -0.1, 0.1, generator)
    holes = (torch.rand(count, 1, 8, 8, generator=generator) < uniform(count, 0, 0.15, generator)).float()
    holes = F.interpolate(holes, scale_factor=8)
    result = result * (1 - holes) + holes * torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.randn(result.shape, generator=generator) * uniform(count, 0, 0.15, generator)
    return (result + noise).clamp(0, 1)


def losses(
    pair: Pair, tokenizer: PreTrainedTokenizerFast, images: torch.Tensor, names: list[str]
) -> tuple[torch.Tensor, float]:
    """Symmetric contrastive loss of one batch and the share of pictures that find their caption in it."""
    pictures = F.normalize(pair.picture(images), dim=1)
    texts = F.normalize(pair.projection(pooled_text(tokenizer, pair.text, names)), dim=1)
    logits = pictures @ texts.T / TEMPERATURE
    target = torch.arange(len(names))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean().item()


def train(images: torch.Tensor, captions: list[str], out: Path, minutes: float, peak: float) -> None:
    """Trains until the time is used up; checkpoints every minute."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    tokenizer = build_tokenizer(captions)
    pair = Pair(len(tokenizer))
    optimizer, average = optimizer_for(pair, 0.02, (0.9, 0.98)), Average(pair, 0.99)
    step, used, checkpoint = 0, 0.0, out / "features.pt"
    if state := restore(checkpoint):
        pair.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["seconds"]
        generator.manual_seed(step)
    clock, last = Clock(60 * minutes, used), used
    for index in batches(len(images), BATCH, generator):
        if len(index.unique()) < BATCH:
            continue  # the same caption twice would be its own wrong answer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(clock.progress(), peak)
        names = [captions[position] for position in index.tolist()]
        loss, hits = losses(pair, tokenizer, augmented(images[index], generator), names)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(pair, step)
        done = clock.progress() >= 1
        if step % 20 == 0 or done:
            print(f"step {step} {clock.seconds():.0f} s loss {loss.item():.3f} hits {hits:.2f}", flush=True)
        if done or clock.seconds() - last > 60:
            last = clock.seconds()
            save(
                checkpoint,
                model=pair.state_dict(),
                average=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                seconds=last,
            )
        if done:
            break


def main() -> None:
    """Reads flags and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    emoji.add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock training time")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(emoji.load(arguments.data, arguments.font)).permute(0, 3, 1, 2).float() / 255
    train(images, emoji.captions(), arguments.out, arguments.minutes, arguments.rate)


if __name__ == "__main__":
    main()

"""Pipelines of real size with their published configurations and random weights, to measure time and memory without a download.

    python benchmarks/real_models.py sd15 DIR                  # Stable Diffusion 1.5: 0.86 B weights in the U-Net
    python benchmarks/real_models.py pixart DIR                # PixArt-XL/2 512: 0.61 B weights in the transformer

Weights are drawn with a deviation of 1 / sqrt(inputs), so that every layer's output stays finite in half precision. The words
of the tokenizers are those of the built-in prompts, since what a text encoder is fed matters for no time or size. T5-XXL is
built with as many of its 24 layers as ``--text-layers`` says, since all of them take 9.5 GB.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

from difloat import api

_TOKENS = {"sd15": 77, "pixart": 120}


def main() -> None:
    """Build one pipeline and save it."""
    parser = harness.parser(__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--text-layers", type=int, default=2, help="layers of T5-XXL")
    arguments = harness.arguments(parser)
    dtype = getattr(torch, arguments.dtype)
    pipeline = MODELS[arguments.model](dtype, arguments.text_layers)
    pipeline.save_pretrained(arguments.directory)


def filled(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module that `make` builds, with random weights; memory is taken once, in `dtype`."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            inputs = parameter[0].numel()
            parameter.data.normal_(0, inputs**-0.5, generator=generator)
        else:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module


def tokenizer_of(length: int) -> Any:
    """A tokenizer by words, padded to `length`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in api.default_prompts() for word in re.findall(r"\w+|[^\w\s]+", prompt)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def autoencoder(dtype: torch.dtype) -> nn.Module:
    """The autoencoder of Stable Diffusion 1: 8 times smaller, 4 channels."""
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    widths = (128, 256, 512, 512)
    return filled(
        lambda: AutoencoderKL(
            down_block_types=down,
            up_block_types=up,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        dtype,
    )


def sd15(dtype: torch.dtype, text_layers: int) -> Any:
    """Stable Diffusion 1.5 without a safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = filled(
        lambda: UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        dtype,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=_TOKENS["sd15"],
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=autoencoder(dtype),
        text_encoder=filled(lambda: CLIPTextModel(text), dtype),
        tokenizer=tokenizer_of(_TOKENS["sd15"]),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart(dtype: torch.dtype, text_layers: int) -> Any:
    """PixArt-alpha XL/2 at 512 pixels."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = filled(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            cross_attention_dim=1152,
            sample_size=64,
            patch_size=2,
            attention_bias=True,
            norm_type="ada_norm_single",
            caption_channels=4096,
            use_additional_conditions=False,
        ),
        dtype,
    )
    text = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=text_layers,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer_of(_TOKENS["pixart"]),
        text_encoder=filled(lambda: T5EncoderModel(text), dtype),
        vae=autoencoder(dtype),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


MODELS: dict[str, Callable[[torch.dtype, int], Any]] = {"sd15": sd15, "pixart": pixart}


if __name__ == "__main__":
    main()

"""Tiny diffusers pipelines with random weights, built from their real classes and without any download.

They prove structure (call signatures, guidance, skip concatenation, save and load), never picture quality.
Every builder takes a seed for its weights, leaves the global random state as it was and returns a pipeline
in float32 on the CPU.
"""

from __future__ import annotations

import torch

WORDS = (
    "a an the red green blue yellow black white small big cat dog fish bird tree house car boat star moon "
    "sun apple book with and on in of two three"
).split()
PROMPTS = [
    "a red cat",
    "the blue house",
    "a small dog and a big tree",
    "two yellow fish in the boat",
    "a black bird on the moon",
    "three white star",
    "green apple",
    "an old book",
]


def tiny_tokenizer(max_length: int = 12):
    """Word-level tokenizer of `WORDS` with T5's special tokens; unknown words become `<unk>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def tiny_vae(seed: int = 0, levels: int = 2, **config):
    """`AutoencoderKL`, factor 2 per level after the first, 4 latent channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8 * 2 ** (levels - 1),
            **config,
        ).eval()


def tiny_t5(tokenizer, width: int = 16):
    """`T5EncoderModel` of one layer for `tokenizer`, with weights from the global random state."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
    )
    return T5EncoderModel(config).eval()


def tiny_clip(tokenizer, projection: bool = False):
    """CLIP text encoder of one layer and width 16 for `tokenizer`, with weights from the global random state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_pixart(seed: int = 0, blocks: int = 2):
    """`PixArtAlphaPipeline`: `blocks` of width 32, 8x8 latents (16x16 pictures), T5 encoder, DPM-Solver.

    Call it with `use_resolution_binning=False`: PixArt bins only its published sizes.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_t5(tokenizer)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=blocks,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
            norm_num_groups=4,
        ).eval()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(seed),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def tiny_unet(seed: int = 0):
    """`StableDiffusionPipeline` with a small CLIP text encoder and a two-level UNet with skip concatenation.

    Self- and cross-attention, GEGLU, convolutions, time embedding as in Stable Diffusion; 8x8 latents, DDIM.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_clip(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_ddim(seed: int = 0):
    """Unconditional `DDIMPipeline`: a pixel-space `UNet2DModel` on 8x8 pictures with 3 channels."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())

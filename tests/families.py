"""Every supported family as its stock pipeline, tiny, with random weights.

Built from the real diffusers configuration classes with 8x8 latents and two or three blocks; text encoders and tokenizers
are real classes too, made without any download. `family_table.py` says what is expected of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tiny import tiny_clip, tiny_pixart, tiny_t5, tiny_tokenizer, tiny_unet, tiny_vae


def seeded(make: Callable[[], Any]) -> Any:
    """What `make` returns with torch's random state seeded, which is then put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def sd15() -> Any:
    """Stable Diffusion 1.5: the tiny U-Net of the other tests with the checkpoint's own sampler, which repeats a timestep."""
    from diffusers import PNDMScheduler

    pipeline = tiny_unet()
    pipeline.scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    return pipeline


def sdxl() -> Any:
    """Stable Diffusion XL: two text encoders, size and crop conditions, linear projections, two transformer blocks deep."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = tiny_tokenizer()
    text_encoder, text_encoder_2 = seeded(lambda: (tiny_clip(tokenizer), tiny_clip(tokenizer, True)))
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32,
            attention_head_dim=(1, 2),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def sd3() -> Any:
    """Stable Diffusion 3: joint attention over picture and text, three text encoders, flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = tiny_tokenizer()
    encoders = seeded(
        lambda: (tiny_clip(tokenizer, True), tiny_clip(tokenizer, True), tiny_t5(tokenizer, 32))
    )
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.0609),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=encoders[2],
        tokenizer_3=tiny_tokenizer(),
    )


def flux() -> Any:
    """FLUX.1-dev: double and single stream blocks, rotary positions, the guidance scale as an embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = tiny_tokenizer()
    text_encoder, text_encoder_2 = seeded(lambda: (tiny_clip(tokenizer), tiny_t5(tokenizer)))
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        )
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer.eval(),
    )


def pixart_sigma() -> Any:
    """PixArt-Sigma: the components of the tiny PixArt-alpha in the other pipeline."""
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**tiny_pixart(seed=1).components)


def hunyuandit() -> Any:
    """HunyuanDiT 1.1: BERT and T5, long skips, style and size conditions; the pipeline fixes 77 and 256 text tokens."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=77,
    )
    text_encoder, text_encoder_2 = seeded(lambda: (BertModel(bert).eval(), tiny_t5(tokenizer)))
    transformer = seeded(
        lambda: HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
        )
    )
    return HunyuanDiTPipeline(
        vae=tiny_vae(levels=4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tiny_tokenizer(),
    )


def dit() -> Any:
    """DiT: classes instead of text; the pipeline takes class 1000 as the empty one, so all of ImageNet's are there."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
        )
    )
    return DiTPipeline(
        transformer=transformer.eval(), vae=tiny_vae(), scheduler=DDIMScheduler(clip_sample=False)
    )


def sana() -> Any:
    """Sana: linear attention, convolutions in the feed-forward part, Gemma as text encoder, deep-compression autoencoder."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = tiny_tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    levels: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        levels[f"{half}_block_out_channels"] = (8, 8, 8)
        levels[f"{half}_layers_per_block"] = (1, 1, 1)
        levels[f"{half}_qkv_multiscales"] = ((), (), ())
    vae = seeded(lambda: AutoencoderDC(latent_channels=4, attention_head_dim=8, **levels))
    transformer = seeded(
        lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        )
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(lambda: Gemma2Model(gemma)).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def ldm() -> Any:
    """Unconditional latent diffusion: a U-Net without text over a vector-quantized autoencoder."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    vqvae = seeded(
        lambda: VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            norm_num_groups=4,
            num_vq_embeddings=16,
        )
    )
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )
    return LDMPipeline(vqvae=vqvae.eval(), unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False))


def ldm_text() -> Any:
    """Text-to-image latent diffusion: its own BERT of 77 tokens; the pipeline fixes a factor of 8 for the autoencoder."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    tokenizer = tiny_tokenizer()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
    )
    return LDMTextToImagePipeline(
        vqvae=tiny_vae(levels=4),
        bert=seeded(lambda: LDMBertModel(config)).eval(),
        tokenizer=tokenizer,
        unet=tiny_unet(seed=1).unet,
        scheduler=DDIMScheduler(clip_sample=False),
    )


def consistency() -> Any:
    """Class-conditional U-Net in pixel space, noise levels for timesteps, up- and downsampling inside ResNet blocks."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    unet = seeded(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=8,
            norm_num_groups=8,
            num_class_embeds=10,
        )
    )
    return ConsistencyModelPipeline(unet=unet.eval(), scheduler=CMStochasticIterativeScheduler())

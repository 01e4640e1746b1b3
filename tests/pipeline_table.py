"""Every pipeline class of the installed diffusers: how a tiny one is built and called, or why it is not.

`BUILT` holds the classes that go through quantize, save, load and sample in `test_pipeline_sweep.py`, `REASONS` all others.
`python benchmarks/families.py` writes docs/families.md from both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import families
import pipeline_parts as parts
from tiny import tiny_ddim, tiny_pixart, tiny_unet, tiny_vae

SHORT = {"max_sequence_length": 8}
SQUARE = {"height": 16, "width": 16}
CLIP = {**SQUARE, "num_frames": 5}


@dataclass(frozen=True)
class Row:
    """One pipeline class.

    Attributes:
        base: Makes a pipeline whose components this one shares.
        parts: Makers of the components that are others, and of optional ones. Those of denoisers get the base's.
        call: Arguments of the call that the command line takes as text.
        pictures: Arguments that are square pictures, with their number.
        arrays: Arguments that are tensors, as NumPy files of one sample, with their shapes.
        prompts: Texts of the pictures, or None where the pipeline takes none.
        guidance: The scale of guidance, where it is not the pipeline's own.
        steps: Steps of the sampler, or None where the call has no such number.
        size: Edge of these pictures.
        needs: A package that diffusers needs for it and that difloat does not install.
    """

    base: Callable[[], Any] | None = None
    parts: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, int] = field(default_factory=dict)
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prompts: bool = True
    guidance: float | None = None
    steps: int | None = 2
    size: int = 16
    needs: str | None = None


def own(kind: str, **config: Any) -> Callable[[], Any]:
    """A denoiser or control network of the class sweep, with other arguments."""
    return lambda: parts.denoiser(kind, **config)


def again(name: str, **config: Any) -> Callable[..., Any]:
    """A denoiser like that of the base, with other arguments."""

    def make(shared: Mapping[str, Any]) -> Any:
        old = shared[name]
        return type(old).from_config(old.config, **config).eval()

    return make


def control(name: str, source: str) -> Callable[..., Any]:
    """A control network beside the base's denoiser, whose outputs are not zero as those of a fresh one."""
    import diffusers
    import torch

    def make(shared: Mapping[str, Any]) -> Any:
        kind = getattr(diffusers, name)
        from_ = kind.from_unet if source == "unet" else kind.from_transformer
        more = {"conditioning_embedding_out_channels": (4, 8)} if source == "unet" else {}
        made = from_(shared[source], **more).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1 and not bool(parameter.any()):
                    parameter.normal_(0, 0.1)
        return made

    return make


IMAGE, MASKED = {"image": 1}, {"image": 1, "mask_image": 1}
TEXT = parts.TEXT_WIDTH
SD, XL, SD3, FLUX, SANA = tiny_unet, families.sdxl, families.sd3, families.flux, families.sana
CONTROL = {"controlnet": control("ControlNetModel", "unet")}
UNION = {
    "controlnet": own(
        "ControlNetUnionModel",
        block_out_channels=(16, 32),
        cross_attention_dim=32,
        projection_class_embeddings_input_dim=64,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        num_trans_channel=16,
        num_proj_channel=16,
        use_linear_projection=True,
        norm_num_groups=8,
    )
}
SD3_CONTROL = {
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "caption_projection_dim": 16,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
FLUX_CONTROL = {
    "controlnet": own(
        "FluxControlNetModel",
        in_channels=16,
        num_single_layers=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
}
SIXTEEN = {
    "vae": again("vae", latent_channels=16),
    "transformer": again("transformer", in_channels=16, out_channels=16),
}
SHIFTED = {"vae": lambda: tiny_vae(shift_factor=0.1)}
CHROMA = {
    **SHIFTED,
    "transformer": own("ChromaTransformer2DModel", in_channels=16, out_channels=16),
}
QWEN = {"transformer": own("QwenImageTransformer2DModel", in_channels=16)}
QWEN_CONTROL = {
    **QWEN,
    "controlnet": own("QwenImageControlNetModel", in_channels=16),
}
LARGE = {"height": 32, "width": 32}
LONG = {
    "text_encoder_2": lambda: parts.tiny_clip(parts.tiny_tokenizer(77)),
    "tokenizer_2": parts.tokenizer(77),
}
HUNYUAN = {
    **LONG,
    "transformer": own("HunyuanVideoTransformer3DModel", pooled_projection_dim=16),
}
HUNYUAN_15 = {
    "transformer": own("HunyuanVideo15Transformer3DModel", in_channels=9, target_size=16, image_embed_dim=16)
}
COG_I2V = {"transformer": own("CogVideoXTransformer3DModel", in_channels=8)}
CASCADE = {"clip_text_pooled_in_channels": 16, "clip_image_in_channels": 16}
Z_IMAGE = {**SHIFTED, "text_encoder": lambda: parts.text_model("Qwen3Model", num_hidden_layers=2)}
SANA_VIDEO = {
    "vae": lambda: parts.wan_vae(),
    "transformer": own("SanaVideoTransformer3DModel"),
}
EASY = {"text_encoder": lambda: parts.bert(256), "tokenizer": parts.tokenizer(256)}
PRIOR = {"prior": own("PriorTransformer", embedding_dim=16, num_embeddings=12)}


def decoder(adds: str = "image", **config: Any) -> dict[str, Callable[..., Any]]:
    """The second stage of Kandinsky 2, whose denoiser adds embeddings of some kind to that of the timestep."""
    projection = "text_image_proj" if adds == "text_image" else "image_proj"
    config |= {"addition_embed_type": adds, "encoder_hid_dim": 16, "encoder_hid_dim_type": projection}
    return {
        "movq": lambda: parts.vq_model(32, norm_type="spatial", vq_embed_dim=4),
        "unet": own("UNet2DConditionModel", out_channels=8, **config),
    }


DECODER = decoder()
KLEIN = {"transformer": own("Flux2Transformer2DModel")}
FIRST = decoder("text_image")
EMBEDS = {"image_embeds": (16,), "negative_image_embeds": (16,)}
IF_UNET = {
    "unet": own("UNet2DConditionModel", in_channels=3, out_channels=6, encoder_hid_dim=16),
    "scheduler": parts.scheduler("DDPMScheduler", variance_type="learned_range", clip_sample=False),
}
IF_UP = {
    **IF_UNET,
    "unet": own(
        "UNet2DConditionModel", in_channels=6, out_channels=6, encoder_hid_dim=16, num_class_embeds=1000
    ),
}


def wan(count: int = 1, kind: str = "WanTransformer3DModel", **config: Any) -> dict[str, Callable[..., Any]]:
    """One or two denoisers, which pipelines of Wan take as optional parts."""
    names = ["transformer", "transformer_2"][:count]
    return {name: own(kind, **config) for name in names} | (
        {"boundary_ratio": lambda: 0.8} if count == 2 else {}
    )


LTX2 = {
    "transformer": own(
        "LTX2VideoTransformer3DModel", caption_channels=TEXT, audio_cross_attention_dim=24, rope_double_precision=False,
        rope_type="split",
    )
}  # fmt: skip
LTX2_CALL = {
    **LARGE, "num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16, "stg_scale": 0.0,
    "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0, "use_cross_timestep": False,
}  # fmt: skip
AUDIO_3 = {
    "transformer": lambda: parts.awake(
        parts.denoiser("StableAudio3DiTModel", io_channels=8, global_cond_dim=TEXT, local_add_cond_dim=9)
    ),
    "vae": lambda: parts.awake(parts.MAKERS["AutoencoderSAME"]()),
}
SANA_CALL = {
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    **SHORT,
}
FLUX_CALL = {**SQUARE, **SHORT}

BUILT: dict[str, Row] = {
    # Stable Diffusion 1 and 2
    "StableDiffusionPipeline": Row(SD),
    "StableDiffusionImg2ImgPipeline": Row(SD, pictures=IMAGE),
    "StableDiffusionInpaintPipeline": Row(SD, pictures=MASKED),
    "StableDiffusionInstructPix2PixPipeline": Row(SD, {"unet": again("unet", in_channels=8)}, pictures=IMAGE),
    "StableDiffusionUpscalePipeline": Row(
        SD, {"unet": again("unet", in_channels=7, num_class_embeds=400)}, pictures=IMAGE
    ),
    "StableDiffusionImageVariationPipeline": Row(SD, pictures=IMAGE, prompts=False),
    "StableDiffusionPAGPipeline": Row(SD),
    "StableDiffusionPAGImg2ImgPipeline": Row(SD, pictures=IMAGE),
    "StableDiffusionPAGInpaintPipeline": Row(SD, pictures=MASKED),
    "StableDiffusionControlNetPipeline": Row(SD, CONTROL, pictures=IMAGE),
    "StableDiffusionControlNetImg2ImgPipeline": Row(SD, CONTROL, pictures={"image": 1, "control_image": 1}),
    "StableDiffusionControlNetInpaintPipeline": Row(SD, CONTROL, pictures={**MASKED, "control_image": 1}),
    "StableDiffusionControlNetPAGPipeline": Row(SD, CONTROL, pictures=IMAGE),
    "StableDiffusionControlNetPAGInpaintPipeline": Row(SD, CONTROL, pictures={**MASKED, "control_image": 1}),
    "StableDiffusionAdapterPipeline": Row(
        SD,
        {
            "unet": again(
                "unet",
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            "adapter": lambda: parts.diffusers_model(
                "T2IAdapter", channels=[16, 32], num_res_blocks=1, downscale_factor=2
            ),
        },
        pictures=IMAGE,
    ),
    "LatentConsistencyModelPipeline": Row(
        SD, {"unet": again("unet", time_cond_proj_dim=8), "scheduler": parts.scheduler("LCMScheduler")}
    ),
    "LatentConsistencyModelImg2ImgPipeline": Row(
        SD,
        {"unet": again("unet", time_cond_proj_dim=8), "scheduler": parts.scheduler("LCMScheduler")},
        {"original_inference_steps": 4},
        IMAGE,
    ),
    "MarigoldDepthPipeline": Row(
        SD, {"unet": again("unet", in_channels=8)}, {"processing_resolution": 0}, IMAGE, prompts=False
    ),
    "MarigoldNormalsPipeline": Row(
        SD, {"unet": again("unet", in_channels=8)}, {"processing_resolution": 0}, IMAGE, prompts=False
    ),
    # Stable Diffusion XL
    "StableDiffusionXLPipeline": Row(XL),
    "StableDiffusionXLImg2ImgPipeline": Row(XL, call={"strength": 0.9}, pictures=IMAGE),
    "StableDiffusionXLInpaintPipeline": Row(XL, pictures=MASKED),
    "StableDiffusionXLInstructPix2PixPipeline": Row(
        XL, {"unet": again("unet", in_channels=8)}, SQUARE, IMAGE
    ),
    "StableDiffusionXLPAGPipeline": Row(XL),
    "StableDiffusionXLPAGImg2ImgPipeline": Row(XL, call={"strength": 0.9}, pictures=IMAGE),
    "StableDiffusionXLPAGInpaintPipeline": Row(XL, pictures=MASKED),
    "StableDiffusionXLControlNetPipeline": Row(XL, CONTROL, pictures=IMAGE),
    "StableDiffusionXLControlNetImg2ImgPipeline": Row(XL, CONTROL, pictures={"image": 1, "control_image": 1}),
    "StableDiffusionXLControlNetInpaintPipeline": Row(XL, CONTROL, pictures={**MASKED, "control_image": 1}),
    "StableDiffusionXLControlNetPAGPipeline": Row(XL, CONTROL, pictures=IMAGE),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Row(
        XL, CONTROL, pictures={"image": 1, "control_image": 1}
    ),
    "StableDiffusionXLControlNetUnionPipeline": Row(XL, UNION, {"control_mode": [0]}, {"control_image": 1}),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Row(
        XL, UNION, {"control_mode": [0]}, {"image": 1, "control_image": 1}
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Row(
        XL, UNION, {"control_mode": [0]}, {**MASKED, "control_image": 1}
    ),
    "StableDiffusionXLAdapterPipeline": Row(
        XL,
        {
            "adapter": lambda: parts.diffusers_model(
                "T2IAdapter",
                channels=[16, 32],
                num_res_blocks=1,
                downscale_factor=4,
                adapter_type="full_adapter_xl",
            )
        },
        SQUARE,
        IMAGE,
    ),
    # Stable Diffusion 3
    "StableDiffusion3Pipeline": Row(SD3, call=SHORT),
    "StableDiffusion3Img2ImgPipeline": Row(SD3, call=FLUX_CALL, pictures=IMAGE),
    "StableDiffusion3InpaintPipeline": Row(SD3, SIXTEEN, call=FLUX_CALL, pictures=MASKED),
    "StableDiffusion3PAGPipeline": Row(SD3, call=SHORT),
    "StableDiffusion3PAGImg2ImgPipeline": Row(SD3, call=FLUX_CALL, pictures=IMAGE),
    "StableDiffusion3ControlNetPipeline": Row(
        SD3, {"controlnet": own("SD3ControlNetModel", **SD3_CONTROL)}, FLUX_CALL, {"control_image": 1}
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Row(
        SD3,
        {"controlnet": own("SD3ControlNetModel", extra_conditioning_channels=1, **SD3_CONTROL)},
        FLUX_CALL,
        {"control_image": 1, "control_mask": 1},
    ),
    # FLUX
    "FluxPipeline": Row(FLUX, call=FLUX_CALL),
    "FluxImg2ImgPipeline": Row(FLUX, call=FLUX_CALL, pictures=IMAGE),
    "FluxInpaintPipeline": Row(FLUX, call=FLUX_CALL, pictures=MASKED),
    "FluxControlPipeline": Row(
        FLUX,
        {"transformer": again("transformer", in_channels=32, out_channels=16)},
        FLUX_CALL,
        {"control_image": 1},
    ),
    "FluxControlImg2ImgPipeline": Row(
        FLUX,
        {"transformer": again("transformer", in_channels=32, out_channels=16)},
        FLUX_CALL,
        {"image": 1, "control_image": 1},
    ),
    "FluxControlInpaintPipeline": Row(
        FLUX,
        {"transformer": again("transformer", in_channels=32, out_channels=16)},
        FLUX_CALL,
        {**MASKED, "control_image": 1},
    ),
    "FluxFillPipeline": Row(
        FLUX, {"transformer": again("transformer", in_channels=48, out_channels=16)}, FLUX_CALL, MASKED
    ),
    "FluxKontextPipeline": Row(
        FLUX, call={**FLUX_CALL, "max_area": 256, "_auto_resize": False}, pictures=IMAGE
    ),
    "FluxKontextInpaintPipeline": Row(
        FLUX, call={**FLUX_CALL, "max_area": 256, "_auto_resize": False}, pictures=MASKED
    ),
    "FluxControlNetPipeline": Row(FLUX, FLUX_CONTROL, FLUX_CALL, {"control_image": 1}),
    "FluxControlNetImg2ImgPipeline": Row(FLUX, FLUX_CONTROL, FLUX_CALL, {"image": 1, "control_image": 1}),
    "FluxControlNetInpaintPipeline": Row(FLUX, FLUX_CONTROL, FLUX_CALL, {**MASKED, "control_image": 1}),
    # Other transformers for pictures
    "PixArtAlphaPipeline": Row(tiny_pixart, call=SHORT),
    "PixArtSigmaPipeline": Row(tiny_pixart, call=SHORT),
    "PixArtSigmaPAGPipeline": Row(tiny_pixart, call=SHORT),
    "HunyuanDiTPipeline": Row(families.hunyuandit),
    "HunyuanDiTPAGPipeline": Row(families.hunyuandit),
    "HunyuanDiTControlNetPipeline": Row(
        families.hunyuandit,
        {
            "controlnet": own(
                "HunyuanDiT2DControlNetModel",
                attention_head_dim=8,
                hidden_size=16,
                pooled_projection_dim=16,
                text_len=77,
                text_len_t5=256,
            )
        },
        SQUARE,
        {"control_image": 1},
    ),
    "SanaPipeline": Row(SANA, call=SANA_CALL),
    "SanaPAGPipeline": Row(SANA, call=SANA_CALL),
    "SanaSprintPipeline": Row(
        SANA,
        {
            "transformer": again("transformer", guidance_embeds=True, qk_norm="rms_norm_across_heads"),
            "scheduler": parts.scheduler("SCMScheduler"),
        },
        SANA_CALL,
    ),
    "SanaSprintImg2ImgPipeline": Row(
        SANA,
        {
            "transformer": again("transformer", guidance_embeds=True, qk_norm="rms_norm_across_heads"),
            "scheduler": parts.scheduler("SCMScheduler"),
        },
        SANA_CALL,
        IMAGE,
    ),
    "SanaControlNetPipeline": Row(
        SANA,
        {
            "controlnet": own(
                "SanaControlNetModel",
                attention_head_dim=8,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
            )
        },
        SANA_CALL,
        {"control_image": 1},
    ),
    "DiTPipeline": Row(families.dit, prompts=False),
    "AuraFlowPipeline": Row(call={**SQUARE, **SHORT}),
    "BriaPipeline": Row(
        None, {"transformer": own("BriaTransformer2DModel", in_channels=16)}, call={**SQUARE, **SHORT}
    ),
    "ChromaPipeline": Row(None, CHROMA, call={**SQUARE, **SHORT}),
    "ChromaImg2ImgPipeline": Row(None, CHROMA, call={**SQUARE, **SHORT}, pictures=IMAGE),
    "CogView3PlusPipeline": Row(call={**SQUARE, "max_sequence_length": 8}),
    "CogView4Pipeline": Row(call={**SQUARE, "max_sequence_length": 16}),
    "CogView4ControlPipeline": Row(
        None,
        {"transformer": own("CogView4Transformer2DModel", in_channels=8)},
        {**SQUARE, "max_sequence_length": 16},
        {"control_image": 1},
    ),
    "HiDreamImagePipeline": Row(
        None,
        {**SHIFTED, "transformer": own("HiDreamImageTransformer2DModel", text_emb_dim=32)},
        call={**SQUARE, **SHORT},
    ),
    "Lumina2Pipeline": Row(None, SHIFTED, call={**SQUARE, **SHORT}),
    "Flux2KleinPipeline": Row(None, KLEIN, {**SQUARE, **SHORT, "text_encoder_out_layers": [1]}),
    "Flux2KleinKVPipeline": Row(
        None, KLEIN, {**SQUARE, **SHORT, "text_encoder_out_layers": [1]}, IMAGE, size=64
    ),
    "Flux2KleinInpaintPipeline": Row(
        None, KLEIN, {**SQUARE, **SHORT, "text_encoder_out_layers": [1]}, MASKED
    ),
    "LuminaPipeline": Row(call={**SQUARE, **SHORT}),
    "OvisImagePipeline": Row(
        None,
        {**SHIFTED, "transformer": own("OvisImageTransformer2DModel", in_channels=16, out_channels=16)},
        call={**SQUARE, **SHORT},
    ),
    "QwenImagePipeline": Row(None, QWEN, call={**LARGE, **SHORT}),
    "QwenImageImg2ImgPipeline": Row(None, QWEN, call={**LARGE, **SHORT}, pictures=IMAGE),
    "QwenImageInpaintPipeline": Row(None, QWEN, call={**LARGE, **SHORT}, pictures=MASKED),
    "QwenImageControlNetPipeline": Row(
        None, QWEN_CONTROL, call={**LARGE, **SHORT}, pictures={"control_image": 1}
    ),
    "QwenImageControlNetInpaintPipeline": Row(
        None,
        {**QWEN, "controlnet": own("QwenImageControlNetModel", in_channels=16, extra_condition_channels=4)},
        call={**LARGE, **SHORT},
        pictures={"control_image": 1, "control_mask": 1},
    ),
    "ZImagePipeline": Row(None, Z_IMAGE, {**SQUARE, **SHORT}),
    "ZImageImg2ImgPipeline": Row(None, Z_IMAGE, {**SQUARE, **SHORT}, IMAGE),
    "ZImageInpaintPipeline": Row(None, Z_IMAGE, {**SQUARE, **SHORT}, MASKED),
    "HunyuanImagePipeline": Row(call=SQUARE),
    # U-Nets in pixel space and older ones
    "DDIMPipeline": Row(tiny_ddim, prompts=False),
    "DDPMPipeline": Row(tiny_ddim, prompts=False),
    "ConsistencyModelPipeline": Row(families.consistency, prompts=False),
    "LDMPipeline": Row(families.ldm, prompts=False),
    "LDMTextToImagePipeline": Row(families.ldm_text),
    "LDMSuperResolutionPipeline": Row(
        families.ldm, {"unet": again("unet", in_channels=6)}, pictures=IMAGE, prompts=False, size=32
    ),
    # Two stages: prior and decoder
    "StableCascadePriorPipeline": Row(None, {"prior": own("StableCascadeUNet", **CASCADE)}, call=SQUARE),
    "KandinskyV22PriorPipeline": Row(None, PRIOR),
    "KandinskyV22PriorEmb2EmbPipeline": Row(None, PRIOR, {"strength": 0.9}, pictures=IMAGE),
    "KandinskyV22Pipeline": Row(None, DECODER, SQUARE, arrays=EMBEDS, prompts=False),
    "KandinskyV22Img2ImgPipeline": Row(
        None, DECODER, {**SQUARE, "strength": 0.9}, IMAGE, EMBEDS, prompts=False
    ),
    "KandinskyV22InpaintPipeline": Row(
        None,
        decoder(in_channels=9),
        SQUARE,
        MASKED,
        EMBEDS,
        prompts=False,
    ),
    "KandinskyV22ControlnetPipeline": Row(
        None,
        decoder("image_hint", in_channels=8),
        SQUARE,
        arrays={**EMBEDS, "hint": (3, 64, 64)},
        prompts=False,
    ),
    "KandinskyV22Img2ImgCombinedPipeline": Row(
        None, {**DECODER, "prior_prior": PRIOR["prior"]}, {**SQUARE, "strength": 0.9}, IMAGE
    ),
    "KandinskyV22InpaintCombinedPipeline": Row(
        None,
        {
            **decoder(in_channels=9),
            "prior_prior": PRIOR["prior"],
        },
        SQUARE,
        MASKED,
    ),
    "KandinskyV22ControlnetImg2ImgPipeline": Row(
        None,
        decoder("image_hint", in_channels=8),
        {**SQUARE, "strength": 0.9},
        IMAGE,
        {**EMBEDS, "hint": (3, 64, 64)},
        prompts=False,
    ),
    "KandinskyV22CombinedPipeline": Row(None, {**DECODER, "prior_prior": PRIOR["prior"]}, SQUARE),
    "KandinskyPipeline": Row(None, FIRST, SQUARE, arrays=EMBEDS),
    "KandinskyImg2ImgPipeline": Row(None, FIRST, {**SQUARE, "strength": 0.9}, IMAGE, EMBEDS),
    "KandinskyInpaintPipeline": Row(
        None,
        decoder("text_image", in_channels=9),
        SQUARE,
        MASKED,
        EMBEDS,
    ),
    "KandinskyCombinedPipeline": Row(None, {**FIRST, "prior_prior": PRIOR["prior"]}, SQUARE),
    "KandinskyImg2ImgCombinedPipeline": Row(
        None, {**FIRST, "prior_prior": PRIOR["prior"]}, {**SQUARE, "strength": 0.9}, IMAGE
    ),
    "KandinskyInpaintCombinedPipeline": Row(
        None,
        {
            **decoder("text_image", in_channels=9),
            "prior_prior": PRIOR["prior"],
        },
        SQUARE,
        MASKED,
    ),
    "StableUnCLIPPipeline": Row(
        None,
        {
            "prior": PRIOR["prior"],
            "unet": own(
                "UNet2DConditionModel",
                class_embed_type="projection",
                projection_class_embeddings_input_dim=32,
            ),
        },
        SQUARE,
    ),
    "StableUnCLIPImg2ImgPipeline": Row(
        None,
        {
            "unet": own(
                "UNet2DConditionModel",
                class_embed_type="projection",
                projection_class_embeddings_input_dim=32,
            )
        },
        pictures=IMAGE,
    ),
    "Kandinsky3Pipeline": Row(call=SQUARE),
    "Kandinsky3Img2ImgPipeline": Row(call={"strength": 0.9}, pictures=IMAGE),
    "KandinskyPriorPipeline": Row(None, PRIOR),
    # Video
    "WanPipeline": Row(None, wan(2), {**CLIP, **SHORT}, steps=4),
    "WanImageToVideoPipeline": Row(
        None, wan(2, in_channels=12), {**CLIP, **SHORT}, IMAGE, steps=4, needs="ftfy"
    ),
    "WanVideoToVideoPipeline": Row(call={**SQUARE, **SHORT}, pictures={"video": 5}, needs="ftfy"),
    "WanVACEPipeline": Row(
        None,
        wan(1, "WanVACETransformer3DModel", vace_in_channels=72),
        {**CLIP, **SHORT},
        {"video": 5, "mask": 5},
        needs="ftfy",
    ),
    "AnimateDiffPipeline": Row(SD, call={**SQUARE, "num_frames": 2}),
    "AnimateDiffSDXLPipeline": Row(XL, call={**SQUARE, "num_frames": 2}),
    "AnimateDiffPAGPipeline": Row(SD, call={**SQUARE, "num_frames": 2}),
    "AnimateDiffControlNetPipeline": Row(
        SD, CONTROL, {**SQUARE, "num_frames": 2}, {"conditioning_frames": 2}
    ),
    "AnimateDiffVideoToVideoPipeline": Row(SD, call=SQUARE, pictures={"video": 2}),
    "AnimateDiffVideoToVideoControlNetPipeline": Row(
        SD, CONTROL, SQUARE, {"video": 2, "conditioning_frames": 2}
    ),
    "HunyuanVideoPipeline": Row(None, HUNYUAN, CLIP),
    "HunyuanVideo15Pipeline": Row(None, HUNYUAN_15, CLIP),
    "HunyuanVideo15ImageToVideoPipeline": Row(None, HUNYUAN_15, {"num_frames": 5}, IMAGE),
    "HunyuanSkyreelsImageToVideoPipeline": Row(
        None,
        {
            **HUNYUAN,
            "transformer": own("HunyuanVideoTransformer3DModel", pooled_projection_dim=16, in_channels=8),
        },
        CLIP,
        IMAGE,
    ),
    "CogVideoXPipeline": Row(call={**CLIP, "max_sequence_length": 5}),
    "CogVideoXImageToVideoPipeline": Row(None, COG_I2V, {**CLIP, "max_sequence_length": 5}, IMAGE),
    "CogVideoXVideoToVideoPipeline": Row(call={**SQUARE, "max_sequence_length": 5}, pictures={"video": 5}),
    "CogVideoXFunControlPipeline": Row(
        None, COG_I2V, {**SQUARE, "max_sequence_length": 5}, pictures={"control_video": 5}
    ),
    "LTXPipeline": Row(call={**CLIP, **LARGE, **SHORT}),
    "LTXImageToVideoPipeline": Row(call={**CLIP, **LARGE, **SHORT}, pictures=IMAGE),
    "LTXConditionPipeline": Row(call={**CLIP, **LARGE, **SHORT}),
    "LattePipeline": Row(
        None,
        {"transformer": own("LatteTransformer3DModel", sample_size=8, video_length=1, out_channels=8)},
        call={**SQUARE, "video_length": 1},
    ),
    "MochiPipeline": Row(
        None,
        {
            "transformer": own(
                "MochiTransformer3DModel", in_channels=12, out_channels=12, max_sequence_length=8
            )
        },
        call={**CLIP, **SHORT},
    ),
    "SanaVideoPipeline": Row(
        SANA,
        SANA_VIDEO,
        {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False, **SHORT},
        needs="ftfy",
    ),
    "SanaImageToVideoPipeline": Row(
        SANA,
        SANA_VIDEO,
        {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False, **SHORT},
        IMAGE,
        needs="ftfy",
    ),
    "StableVideoDiffusionPipeline": Row(
        None,
        {
            "image_encoder": lambda: parts.vision(
                "CLIPVisionModelWithProjection", image_size=224, patch_size=112
            )
        },
        call={**SQUARE, "num_frames": 3},
        pictures=IMAGE,
        prompts=False,
    ),
    "SkyReelsV2Pipeline": Row(call={**CLIP, **SHORT}, needs="ftfy"),
    "SkyReelsV2DiffusionForcingPipeline": Row(call={**CLIP, **SHORT}, needs="ftfy"),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Row(
        call={**CLIP, **SHORT}, needs="ftfy", pictures=IMAGE
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Row(
        call={**CLIP, **SHORT, "overlap_history": 1}, needs="ftfy", pictures={"video": 5}
    ),
    "EasyAnimatePipeline": Row(None, EASY, {**CLIP, "negative_prompt": ""}),
    "AnyFlowPipeline": Row(call={**CLIP, **SHORT}),
    "AnyFlowFARPipeline": Row(call={**CLIP, **SHORT, "chunk_partition": [1, 1]}),
    "HeliosPipeline": Row(
        None,
        {
            "scheduler": parts.scheduler(
                "HeliosScheduler", stages=1, stage_range=[0, 1], use_dynamic_shifting=True
            )
        },
        call={**CLIP, **SHORT},
        needs="ftfy",
    ),
    "HeliosPyramidPipeline": Row(
        None,
        {"scheduler": parts.scheduler("HeliosScheduler", use_dynamic_shifting=True)},
        {**CLIP, **SHORT, "height": 64, "width": 64, "pyramid_num_inference_steps_list": [1, 1, 1]},
        steps=None,
        needs="ftfy",
    ),
    "SkyReelsV2ImageToVideoPipeline": Row(
        None,
        {
            "transformer": own("SkyReelsV2Transformer3DModel", in_channels=12, image_dim=16),
            "image_processor": lambda: parts.picture_processor(),
        },
        {**CLIP, **SHORT},
        IMAGE,
        needs="ftfy",
    ),
    "HunyuanVideoFramepackPipeline": Row(
        None,
        {
            **LONG,
            "transformer": own(
                "HunyuanVideoFramepackTransformer3DModel", pooled_projection_dim=16, image_proj_dim=16
            ),
        },
        {**CLIP, "latent_window_size": 3},
        IMAGE,
    ),
    "WanAnimatePipeline": Row(
        None,
        {"transformer": own("WanAnimateTransformer3DModel", image_dim=16)},
        call={**SQUARE, **SHORT},
        pictures={"image": 1, "pose_video": 5, "face_video": 5},
        needs="ftfy",
    ),
    "LTXI2VLongMultiPromptPipeline": Row(call={**CLIP, **LARGE, **SHORT}),
    "AnimateDiffSparseControlNetPipeline": Row(
        SD,
        {
            "controlnet": own(
                "SparseControlNetModel",
                block_out_channels=(16, 32),
                conditioning_embedding_out_channels=(4, 8),
                conditioning_channels=4,
            )
        },
        {**SQUARE, "num_frames": 2},
        {"conditioning_frames": 1},
    ),
    "ChronoEditPipeline": Row(
        None,
        {"transformer": own("ChronoEditTransformer3DModel", in_channels=12, image_dim=16)},
        {**CLIP, **SHORT},
        IMAGE,
        needs="ftfy",
    ),
    "LucyEditPipeline": Row(None, wan(1, in_channels=8), {**CLIP, **SHORT}, {"video": 5}, needs="ftfy"),
    # Sound
    "StableAudioPipeline": Row(
        None,
        {"transformer": own("StableAudioDiTModel", global_states_input_dim=32)},
        call={"audio_end_in_s": 0.5},
    ),
    "StableAudio3Pipeline": Row(None, AUDIO_3, {"duration": 1.0}),
    "StableAudio3AudioToAudioPipeline": Row(None, AUDIO_3, {"duration": 1.0}, arrays={"audio": (2, 16)}),
    "StableAudio3InpaintPipeline": Row(
        None,
        AUDIO_3,
        {"duration": 1.0, "mask_start_seconds": 0.2, "mask_end_seconds": 0.6},
        arrays={"audio": (2, 16)},
    ),
    "LTX2Pipeline": Row(None, LTX2, LTX2_CALL),
    "LTX2ImageToVideoPipeline": Row(None, LTX2, {**LTX2_CALL, "image_crf": 0}, IMAGE),
    "LTX2ConditionPipeline": Row(None, LTX2, LTX2_CALL),
    "Flux2Pipeline": Row(None, KLEIN, {**SQUARE, **SHORT, "text_encoder_out_layers": [1]}),
    "ErnieImagePipeline": Row(call=SQUARE),
    # DeepFloyd IF
    "IFPipeline": Row(None, IF_UNET, SQUARE, needs="ftfy"),
    "IFImg2ImgPipeline": Row(None, IF_UNET, pictures=IMAGE, needs="ftfy"),
    "IFInpaintingPipeline": Row(None, IF_UNET, pictures=MASKED, needs="ftfy"),
    "IFInpaintingSuperResolutionPipeline": Row(
        None, IF_UP, pictures={"image": 1, "original_image": 1, "mask_image": 1}, needs="ftfy"
    ),
    "IFSuperResolutionPipeline": Row(None, IF_UP, SQUARE, IMAGE, needs="ftfy"),
}


# One or two of every kind of input and output; the others are run with `-m slow`.
QUICK = {
    "StableDiffusionControlNetPipeline", "KandinskyV22PriorPipeline", "StableCascadePriorPipeline", "WanPipeline",
}  # fmt: skip
CALIBRATED = {
    "StableDiffusionXLImg2ImgPipeline", "FluxControlNetPipeline", "StableVideoDiffusionPipeline", "WanImageToVideoPipeline",
    "StableAudioPipeline", "LTXImageToVideoPipeline", "StableCascadePriorPipeline", "KandinskyV22Pipeline",
    "AnimateDiffPipeline", "ZImagePipeline", "AuraFlowPipeline", "SanaVideoPipeline",
    "QwenImageImg2ImgPipeline", "LatentConsistencyModelPipeline", "CogVideoXImageToVideoPipeline",
}  # fmt: skip


def pipeline(name: str) -> Any:
    """The tiny pipeline of a class."""
    import diffusers

    row = BUILT[name]
    shared = row.base().components if row.base is not None else {}
    given = {part: _bound(make, shared) for part, make in row.parts.items()}
    kind = getattr(diffusers, name)
    return kind(**parts.components_of(kind, shared, given))


def _bound(make: Callable[..., Any], shared: Mapping[str, Any]) -> Callable[[], Any]:
    import inspect

    return (lambda: make(shared)) if inspect.signature(make).parameters else make


def pipeline_classes() -> set[str]:
    """The name of every pipeline class that diffusers exports, without importing them.

    Modular pipelines are other ways to call the same components, and automatic ones choose among the others.
    """
    import diffusers
    from diffusers import pipelines as package

    names = {name for found in package._import_structure.values() for name in found} | set(dir(diffusers))
    others = ("Modular", "AutoPipeline", "Output", "Mixin", "Quantization", "Blocks")
    return {name for name in names if "Pipeline" in name and not any(word in name for word in others)}


def _each(reason: str, names: str) -> dict[str, str]:
    """One reason for several classes."""
    return dict.fromkeys(names.split(), reason)


def _no_encoder(name: str) -> str:
    return f"not tried: no tiny build of its text encoder ({name})"


_VISION = "its processor needs torchvision, which difloat does not install"
REASONS: dict[str, str] = {
    **_each("deprecated in diffusers",
        "AltDiffusionImg2ImgPipeline AltDiffusionPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline "
        "AudioLDMPipeline BlipDiffusionPipeline CycleDiffusionPipeline DanceDiffusionPipeline I2VGenXLPipeline "
        "KarrasVePipeline MusicLDMPipeline PIAPipeline PNDMPipeline PaintByExamplePipeline RePaintPipeline "
        "ScoreSdeVePipeline SemanticStableDiffusionPipeline StableDiffusionAttendAndExcitePipeline "
        "StableDiffusionControlNetXSPipeline StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline "
        "StableDiffusionGLIGENTextImagePipeline StableDiffusionInpaintPipelineLegacy StableDiffusionLDM3DPipeline "
        "StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline StableDiffusionParadigmsPipeline "
        "StableDiffusionPipelineSafe StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline "
        "StableDiffusionXLControlNetXSPipeline TextToVideoSDPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline "
        "UnCLIPImageVariationPipeline UnCLIPPipeline UniDiffuserPipeline VQDiffusionPipeline "
        "VersatileDiffusionDualGuidedPipeline VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline "
        "VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline WuerstchenCombinedPipeline "
        "WuerstchenDecoderPipeline WuerstchenPriorPipeline BlipDiffusionControlNetPipeline"),
    "DiffusionPipeline": "the base of all others",
    "ConsisIDPipeline": "needs opencv, which difloat does not install",
    **_each("needs sentencepiece, which difloat does not install", "KolorsPAGPipeline KolorsPipeline KolorsImg2ImgPipeline"),
    **_each("needs librosa or note_seq, which difloat does not install", "AudioDiffusionPipeline SpectrogramDiffusionPipeline"),
    **_each("runs in ONNX Runtime and has no torch modules",
        "OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline OnnxStableDiffusionInpaintPipelineLegacy "
        "OnnxStableDiffusionPipeline "
        "OnnxStableDiffusionUpscalePipeline StableDiffusionOnnxPipeline"),
    **_each("needs cosmos_guardrail, which difloat does not install",
        "Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline "
        "Cosmos3OmniPipeline CosmosTextToWorldPipeline CosmosVideoToWorldPipeline"),
    **_each(_VISION,
        "OmniGenPipeline Kandinsky5I2IPipeline Kandinsky5I2VPipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline "
        "Kandinsky6TI2VAPipeline LongCatImageEditPipeline LongCatImagePipeline QwenImage21Pipeline "
        "QwenImageEditInpaintPipeline QwenImageEditPipeline QwenImageEditPlusPipeline QwenImageLayeredPipeline "
        "BriaFibo2Pipeline DreamLiteMobilePipeline DreamLitePipeline JoyImageEditPipeline JoyImageEditPlusPipeline "
        "NucleusMoEImagePipeline GlmImagePipeline"),
    **_each("writes text: its tokens are found by unmasking and not by a sampler of latents",
        "DiffusionGemmaPipeline LLaDA2Pipeline"),
    **_each("has no denoiser: one call of a network between two others",
        "FluxPriorReduxPipeline LTXLatentUpsamplePipeline LTX2LatentUpsamplePipeline"),
    **_each("not tried: its picture is inverted in a call of its own before the sampler runs",
        "LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL"),
    **_each("not tried: takes a grid of pictures and two prompts", "VisualClozePipeline VisualClozeGenerationPipeline"),
    "MarigoldIntrinsicsPipeline": "quantizes, but gives several pictures per sample, which generate and reports do not take",
    "ChromaInpaintPipeline": "fails in diffusers 0.42 itself: reads guidance_embeds, which Chroma's config does not have",
    **_each("fails in diffusers 0.42 itself: its autoencoder (PaellaVQModel) does not load from disk",
        "StableCascadeDecoderPipeline StableCascadeCombinedPipeline"),
    "IFImg2ImgSuperResolutionPipeline": "fails in diffusers 0.42 itself: does not load without its watermarker",
    "EasyAnimateInpaintPipeline": "fails in diffusers 0.42 itself: reads cache_mag_vae, which no config of its autoencoder has",
    "EasyAnimateControlPipeline": "fails in diffusers 0.42 itself: calls encode_prompt with an argument that it does not take",
    "AllegroPipeline": "its autoencoder decodes in tiles only, which must be switched on in Python (vae.enable_tiling())",
    "BriaFiboPipeline": "not tried: its prompt is laid out with the token numbers of its own tokenizer",
    "BriaFiboEditPipeline": "not tried: its prompts are edits in JSON",
    "HunyuanImageRefinerPipeline": "not tried: no tiny build of its autoencoder",
    **_each("not tried: refines what another pipeline of its family made",
        "Kandinsky6SRPipeline LTX2VideoDiffusionDecodePipeline"),
    **_each("not tried: U-Net with K blocks (latent upscaler) or a depth estimator beside it",
        "StableDiffusionLatentUpscalePipeline StableDiffusionDepth2ImgPipeline"),
    "RFD4ProteinaPipeline": "makes protein structures, and no pictures, video or sound",
    **_each("renders neural fields, which no metric of difloat compares", "ShapEPipeline ShapEImg2ImgPipeline"),
    **_each("not tried: needs the weights of another denoiser (see the class sweep)",
        "ZImageControlNetPipeline ZImageControlNetInpaintPipeline"),
    **_each(_no_encoder("CLAP with GPT-2"), "AudioLDM2Pipeline"),
    **_each(_no_encoder("T5Gemma 2"), "MotifVideoPipeline MotifVideoImage2VideoPipeline"),
    **_each("fails in diffusers 0.42 itself: loaded and saved again, it names a text encoder that diffusers does not have",
        "PRXPipeline PRXPixelPipeline"),
    **_each("not tried: takes conditions of its own classes, which are made in Python",
        "LTX2DFRPipeline LTX2DFRTemporalRefinePipeline LTX2HDRPipeline LTX2InContextPipeline"),
    "SanaWMPipeline": "not tried: takes the camera's path of a world model",
    **_each(_no_encoder("Qwen3-VL"), "Krea2Pipeline Ideogram4Pipeline"),
    **_each(_no_encoder("LLaVA"), "HunyuanVideoImageToVideoPipeline"),
    **_each(_no_encoder("a Qwen3 with lyrics and timbre encoders"), "AceStepPipeline"),
    **_each(_no_encoder("UMT5 beside a waveform autoencoder"), "LongCatAudioDiTPipeline"),
    **_each(_no_encoder("SigLIP 2"), "ZImageOmniPipeline"),
}  # fmt: skip

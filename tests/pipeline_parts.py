"""Tiny components for any pipeline class of diffusers, by the class that the pipeline's constructor asks for.

`components_of` reads the constructor. Denoisers come from `class_table.py`, everything else from `MAKERS`. Widths are those of
`class_table.py`: texts of 16 channels, latents of 4.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from class_table import TABLE, Tiny, build
from families import seeded
from test_class_sweep import classes
from tiny import tiny_clip, tiny_t5, tiny_tokenizer, tiny_vae

TEXT_WIDTH = 16
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endif %} {% endfor %}"
)


def denoiser(name: str, **config: Any) -> Any:
    """A denoiser or control network of the class sweep, with other arguments where `config` says so."""
    row = TABLE[name]
    return build(classes()[name], Tiny(row.call, {**row.config, **config}, row.without, row.leave))


def awake(model: Any) -> Any:
    """A model whose parameters of zeros are random, since what they belong to would give nothing."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1)
    return model


def tokenizer(length: int = 12) -> Callable[[], Any]:
    """Makes a tokenizer that knows how to lay out a chat."""

    def make() -> Any:
        found = tiny_tokenizer(length)
        found.chat_template = CHAT
        return found

    return make


def diffusers_model(name: str, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config).eval()


def scheduler(name: str, **config: Any) -> Callable[[], Any]:
    """A scheduler of diffusers."""
    import diffusers

    return lambda: getattr(diffusers, name)(**config)


def text_model(name: str, **config: Any) -> Any:
    """A causal language model of transformers, one layer deep."""
    import transformers

    config_class = getattr(transformers, name.removesuffix("Model").removesuffix("ForCausalLM") + "Config")
    sizes = {
        "vocab_size": len(tiny_tokenizer()), "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1,
    }  # fmt: skip
    return getattr(transformers, name)(config_class(**{**sizes, **config})).eval()


def qwen_vl(name: str = "Qwen2_5_VLForConditionalGeneration") -> Any:
    """The language and vision model of Qwen, of which pipelines take the text half."""
    import transformers

    size = len(tiny_tokenizer())
    text = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    if name == "Qwen2_5_VLTextModel":
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

        return transformers.Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text)).eval()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {"vision_start_token_id": size - 1, "image_token_id": size - 2, "video_token_id": size - 3}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def vision(name: str, **config: Any) -> Any:
    """A CLIP or SigLIP picture encoder for pictures of 16 pixels."""
    import transformers

    config_class = getattr(
        transformers, re.sub(r"(WithProjection)?$", "", name).removesuffix("Model") + "Config"
    )
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    return getattr(transformers, name)(config_class(**{**sizes, **config})).eval()


def picture_processor(kind: str = "CLIP") -> Any:
    import transformers

    size = {"size": {"height": 16, "width": 16}}
    more = {"crop_size": {"height": 16, "width": 16}} if kind == "CLIP" else {}
    return getattr(transformers, f"{kind}ImageProcessorPil")(**size, **more)


def bert(length: int = 77) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=length,
    )  # fmt: skip
    return BertModel(config).eval()


def wan_vae(name: str = "AutoencoderKLWan", **config: Any) -> Any:
    return diffusers_model(
        name, base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **config,
    )  # fmt: skip


def deep_vae(factor: int = 4) -> Any:
    """Sana's autoencoder."""
    levels: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        depth = factor.bit_length()
        levels |= {
            f"{half}_block_out_channels": (8,) * depth,
            f"{half}_layers_per_block": (1,) * depth,
            f"{half}_qkv_multiscales": ((),) * depth,
        }
    return diffusers_model("AutoencoderDC", latent_channels=4, attention_head_dim=8, **levels)


def vq_model(width: int = 8, **config: Any) -> Any:
    return diffusers_model(
        "VQModel", block_out_channels=(width, width), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, num_vq_embeddings=16, **config,
    )  # fmt: skip


def hunyuan_vae() -> Any:
    return diffusers_model(
        "AutoencoderKLHunyuanVideo", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip


def cogvideo_vae() -> Any:
    return diffusers_model(
        "AutoencoderKLCogVideoX", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, sample_height=64,
        sample_width=64,
    )  # fmt: skip


def ltx_vae() -> Any:
    return diffusers_model(
        "AutoencoderKLLTXVideo", latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip


def guider(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers.guiders

        return getattr(diffusers.guiders, name)()

    return make


def multilingual() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=16, transformerDimensions=16, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=1, vocab_size=len(tiny_tokenizer()), max_position_embeddings=90, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return MultilingualCLIP(config).eval()


def renderer() -> Any:
    from diffusers.pipelines.shap_e import ShapERenderer

    return ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=8,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    ).eval()


def normalizer() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    return StableUnCLIPImageNormalizer(embedding_dim=16)


def flux2_vae() -> Any:
    return diffusers_model(
        "AutoencoderKLFlux2", block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=1, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def hifigan(channels: int = 8) -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=channels, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )  # fmt: skip
    return SpeechT5HifiGan(config).eval()


def t5_gemma() -> Any:
    """The encoder of T5Gemma, one layer deep."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    part = T5GemmaModuleConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, layer_types=["full_attention"],
    )  # fmt: skip
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False)).eval()


def with_eyes(name: str, text: str, vision: str, **config: Any) -> Any:
    """A language model that reads pictures as well, of which pipelines take the text half."""
    import transformers

    sizes = {
        "vocab_size": len(tiny_tokenizer()), "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1, "model_type": text,
    }  # fmt: skip
    eyes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
        "patch_size": 14, "model_type": vision,
    }  # fmt: skip
    made = getattr(transformers, re.sub("(ForConditionalGeneration|Model)$", "Config", name))
    return getattr(transformers, name)(made(text_config=sizes, vision_config=eyes, **config)).eval()


def ltx2_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    heads = {f"{kind}_connector_num_attention_heads": 2 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_attention_head_dim": 8 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH, text_proj_in_factor=2, connector_rope_base_seq_len=32,
        rope_double_precision=False, rope_type="split", **heads,
    ).eval()  # fmt: skip


def ltx2_vocoder() -> Any:
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    return LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]], output_sampling_rate=16000,
    ).eval()  # fmt: skip


def duration_embedder() -> Any:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    return StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=16).eval()


_TOKENIZERS = (
    "AutoProcessor",  # of texts alone, a tokenizer does
    "CLIPTokenizer", "T5Tokenizer", "T5TokenizerFast", "AutoTokenizer", "GemmaTokenizer", "BertTokenizer", "Qwen2Tokenizer",
    "ByT5Tokenizer", "LlamaTokenizer", "TokenizersBackend", "PythonBackend", "XLMRobertaTokenizer", "PreTrainedTokenizerBase",
)  # fmt: skip
_EULER = {"shift": 3.0}
MAKERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(_TOKENIZERS, tokenizer()),
    "CLIPTextModel": lambda: tiny_clip(tiny_tokenizer()),
    "CLIPTextModelWithProjection": lambda: tiny_clip(tiny_tokenizer(), True),
    "T5EncoderModel": lambda: tiny_t5(tiny_tokenizer()),
    "UMT5EncoderModel": lambda: tiny_t5(tiny_tokenizer()),
    "BertModel": bert,
    "GlmModel": lambda: text_model("GlmModel"),
    "Gemma2PreTrainedModel": lambda: text_model("Gemma2Model"),
    "Gemma2Model": lambda: text_model("Gemma2Model"),
    "GemmaPreTrainedModel": lambda: text_model("GemmaModel"),
    "LlamaModel": lambda: text_model("LlamaModel", num_hidden_layers=3),
    "LlamaForCausalLM": lambda: text_model("LlamaForCausalLM", num_hidden_layers=2),
    "Qwen3Model": lambda: text_model("Qwen3Model"),
    "Qwen3ForCausalLM": lambda: text_model("Qwen3ForCausalLM", num_hidden_layers=3),
    "Qwen2_5_VLForConditionalGeneration": qwen_vl,
    "Qwen2_5_VLTextModel": lambda: qwen_vl("Qwen2_5_VLTextModel"),
    "CLIPVisionModelWithProjection": lambda: vision("CLIPVisionModelWithProjection"),
    "CLIPVisionModel": lambda: vision("CLIPVisionModel"),
    "SiglipVisionModel": lambda: vision("SiglipVisionModel"),
    "CLIPImageProcessorPil": picture_processor,
    "SiglipImageProcessorPil": lambda: picture_processor("Siglip"),
    "SiglipImageProcessor": lambda: picture_processor("Siglip"),
    "AutoencoderKL": tiny_vae,
    "AutoencoderKLWan": wan_vae,
    "AutoencoderKLQwenImage": lambda: wan_vae("AutoencoderKLQwenImage"),
    "AutoencoderDC": deep_vae,
    "AutoencoderKLHunyuanVideo": hunyuan_vae,
    "AutoencoderKLHunyuanVideo15": lambda: diffusers_model(
        "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=2, temporal_compression_ratio=2,
    ),
    "AutoencoderKLCogVideoX": cogvideo_vae,
    "AutoencoderKLLTXVideo": ltx_vae,
    "AutoencoderKLMochi": lambda: diffusers_model(
        "AutoencoderKLMochi", latent_channels=12, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1), out_channels=3,
        latents_mean=(0.0,) * 12, latents_std=(1.0,) * 12,
    ),
    "AutoencoderKLAllegro": lambda: diffusers_model(
        "AutoencoderKLAllegro", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        temporal_downsample_blocks=(True, True, False, False), temporal_upsample_blocks=(False, True, True, False),
    ),
    "AutoencoderKLMagvit": lambda: diffusers_model(
        "AutoencoderKLMagvit", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    ),
    "AutoencoderKLTemporalDecoder": lambda: diffusers_model(
        "AutoencoderKLTemporalDecoder", block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4,
    ),
    "AutoencoderOobleck": lambda: diffusers_model(
        "AutoencoderOobleck", encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=4, downsampling_ratios=[1, 2],
        channel_multiples=[1, 2], audio_channels=2, sampling_rate=16,
    ),
    "VQModel": vq_model,
    "SpeechT5HifiGan": hifigan,
    "MotionAdapter": lambda: diffusers_model(
        "MotionAdapter", block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    ),
    "ClassifierFreeGuidance": guider("ClassifierFreeGuidance"),
    "AdaptiveProjectedMixGuidance": guider("AdaptiveProjectedMixGuidance"),
    "StableAudioProjectionModel": lambda: diffusers_model(
        "StableAudioProjectionModel", text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
    ),
    "MultilingualCLIP": multilingual,
    "ShapERenderer": renderer,
    "StableUnCLIPImageNormalizer": normalizer,
    "AutoencoderKLHunyuanImage": lambda: diffusers_model(
        "AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
        layers_per_block=1, spatial_compression_ratio=2, sample_size=16, scaling_factor=0.5,
    ),
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderTiny": lambda: diffusers_model(
        "AutoencoderTiny", encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ),
    "T5GemmaEncoderModel": t5_gemma,
    "Gemma3ForConditionalGeneration": lambda: with_eyes(
        "Gemma3ForConditionalGeneration", "gemma3_text", "siglip_vision_model", mm_tokens_per_image=4
    ),
    "Mistral3ForConditionalGeneration": lambda: with_eyes(
        "Mistral3ForConditionalGeneration", "mistral", "pixtral", image_token_index=1
    ),
    "Mistral3Model": lambda: with_eyes("Mistral3Model", "mistral", "pixtral", image_token_index=1),
    "AutoencoderKLLTX2Video": lambda: diffusers_model(
        "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_type=("spatiotemporal",), upsample_residual=(False,), upsample_factor=(1,), patch_size=1,
        decoder_causal=False,
    ),
    "AutoencoderKLLTX2Audio": lambda: diffusers_model(
        "AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8,
    ),
    "LTX2TextConnectors": ltx2_connectors,
    "LTX2Vocoder": ltx2_vocoder,
    "StableAudio3DurationEmbedder": duration_embedder,
    "AutoencoderSAME": lambda: diffusers_model(
        "AutoencoderSAME", patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=8, use_differential_attention=False, dim_heads=4, ff_mult=2,
        sampling_rate=16,
    ),
    "SmolLM3ForCausalLM": lambda: text_model("SmolLM3ForCausalLM", num_hidden_layers=2),
    "KarrasDiffusionSchedulers": scheduler("DDIMScheduler", clip_sample=False, steps_offset=1),
    "FlowMatchEulerDiscreteScheduler": scheduler("FlowMatchEulerDiscreteScheduler", **_EULER),
}  # fmt: skip


def made(annotation: Any) -> Any:
    """A component of the first class in an annotation that there is a tiny one of."""
    import diffusers

    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    for name in re.findall(r"(\w+)(?=[\],| ']|$)", text):
        if name in MAKERS:
            return MAKERS[name]()
        if name in TABLE:
            return denoiser(name)
        if name.endswith("Scheduler"):
            return getattr(diffusers, name)()
    raise LookupError(f"no tiny component for {text}")


def components_of(
    pipeline_class: type, shared: Mapping[str, Any], given: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """The arguments of a pipeline's constructor.

    Args:
        pipeline_class: The class.
        shared: Components of another pipeline that this one can use.
        given: Makers of those that must be others, and of optional ones that are wanted.
    """
    found: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if name in given:
            found[name] = seeded(given[name])
        elif name in ("safety_checker", "watermarker"):
            found[name] = None
        elif shared.get(name) is not None:
            found[name] = shared[name]
        elif name == "requires_safety_checker":
            found[name] = False
        elif parameter.default is inspect.Parameter.empty:
            found[name] = seeded(lambda annotation=parameter.annotation: made(annotation))
    return found

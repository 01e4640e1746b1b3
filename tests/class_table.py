"""Tiny configurations of every denoiser class that diffusers has, and what each is called with, for `test_class_sweep.py`.

Sizes are those of no real model: two heads of 12 channels, one or two blocks, 4 latent channels, 5 tokens of text. What a class
needs beyond that is in its row. Calls are made of `Noise`, `Whole` and other plain data; `made` turns them into tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

HEADS, HEAD, WIDTH, TEXT, TOKENS, ROWS = 2, 12, 24, 16, 5, 2

SIZES: dict[str, Any] = {
    "num_attention_heads": HEADS, "num_heads": HEADS, "n_heads": HEADS, "nheads": HEADS, "num_key_value_heads": HEADS,
    "attention_head_dim": HEAD, "head_dim": HEAD, "num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD,
    "num_key_value_attention_heads": HEADS, "num_kv_heads": HEADS, "n_kv_heads": HEADS, "dit_heads": HEADS,
    "in_channels": 4, "out_channels": 4, "latent_channels": 4, "num_layers": 1, "num_single_layers": 1, "n_layers": 1,
    "num_refiner_layers": 1, "n_refiner_layers": 1, "depth": 1, "nlayers": 1, "mmdit_layers": 1, "num_hidden_layers": 1,
    "hidden_size": WIDTH, "dim": WIDTH, "model_dim": WIDTH, "dit_dim": WIDTH, "embed_dim": WIDTH, "token_dim": WIDTH,
    "ffn_dim": 32, "ff_dim": 32, "ffn_hidden_size": 32, "intermediate_size": 32, "ff_inner_dim": 32, "freq_dim": 16,
    "text_dim": TEXT, "joint_attention_dim": TEXT, "text_embed_dim": TEXT, "caption_channels": TEXT, "cap_feat_dim": TEXT,
    "context_in_dim": TEXT, "text_in_dim": TEXT, "dit_text_dim": TEXT, "text_hidden_dim": TEXT, "in_text_dim": TEXT,
    "in_text_dim2": TEXT, "cross_attention_dim": WIDTH, "pooled_projection_dim": 8, "time_embed_dim": 16, "time_dim": 16,
    "caption_projection_dim": WIDTH, "condition_dim": 8, "sample_size": 8, "rope_max_seq_len": 32, "text_embed_dim_t5": None,
    "axes_dims_rope": (4, 4, 4), "rope_axes_dim": (4, 4, 4), "axes_dims": (4, 4, 4), "axes_dim_rope": (4, 4, 4),
    "axes_lens": (32, 32, 32), "in_visual_dim": 4, "out_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 1,
    "timestep_embed_dim": 16, "latent_dim": 4, "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """Random numbers of this shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """Random whole numbers below `limit`."""

    shape: tuple[int, ...]
    limit: int = 10


@dataclass(frozen=True)
class Ones:
    """Ones: masks, whose dtype differs."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Made:
    """Whatever this makes."""

    make: Callable[[], Any]


@dataclass(frozen=True)
class Tiny:
    """One class.

    Attributes:
        call: Arguments of `forward` besides those of `USUAL`.
        config: Arguments of the class besides those of `SIZES`.
        without: Names of `SIZES` that the class is not given, so that its own default holds.
        leave: Names of `USUAL` that the call is not given.
    """

    call: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()


PICTURE, VIDEO, TOKEN_SEQUENCE = Noise((ROWS, 4, 8, 8)), Noise((ROWS, 4, 3, 4, 4)), Noise((ROWS, 16, 4))
WORDS, POOLED, TIME = Noise((ROWS, TOKENS, TEXT)), Noise((ROWS, 8)), Made(lambda: torch.tensor([500.0, 20.0]))
PART = Made(lambda: torch.tensor([0.5, 0.02]))
TEXT_MASK = Ones((ROWS, TOKENS))
PLACES = Made(lambda: torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1))
NOWHERE = Made(lambda: torch.zeros(TOKENS, 3))
SIZE = Noise((ROWS, 2))

USUAL: dict[str, Any] = {
    "hidden_states": PICTURE, "sample": PICTURE, "timestep": TIME, "encoder_hidden_states": WORDS,
}  # fmt: skip


def made(value: Any) -> Any:
    """What stands for `value` in a call."""
    if isinstance(value, Noise):
        return torch.randn(value.shape)
    if isinstance(value, Whole):
        return torch.randint(0, value.limit, value.shape)
    if isinstance(value, Ones):
        return torch.ones(value.shape, dtype=value.dtype)
    if isinstance(value, Made):
        return value.make()
    if isinstance(value, list | tuple):
        return type(value)(made(entry) for entry in value)
    if isinstance(value, dict):
        return {name: made(entry) for name, entry in value.items()}
    return value


def build(cls: type, tiny: Tiny) -> Any:
    """The model of a row, with random weights none of which is zero: fresh models hide half of themselves behind zeros."""
    known = inspect.signature(cls.__init__).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known and name not in tiny.without}
    model = cls(**{**sizes, **tiny.config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.numel():
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(float(name.endswith("weight")), 0.1)
    return model


def arguments(cls: type, tiny: Tiny) -> dict[str, Any]:
    """The arguments of the row's call."""
    known = inspect.signature(cls.forward).parameters
    usual = {name: value for name, value in USUAL.items() if name in known and name not in tiny.leave}
    return {name: made(value) for name, value in {**usual, **tiny.call}.items()}


FLUX = {"hidden_states": TOKEN_SEQUENCE, "timestep": PART, "img_ids": PLACES, "txt_ids": NOWHERE}
WAN = {"hidden_states": VIDEO}
UNET = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": TEXT, "attention_head_dim": 4,
    "layers_per_block": 1,
}  # fmt: skip


def unet(kind: str, **more: Any) -> dict[str, Any]:
    """Two levels of a U-Net's blocks, with attention in the lower."""
    blocks = {"down_block_types": (f"DownBlock{kind}", f"CrossAttnDownBlock{kind}")}
    return {**UNET, **blocks, "up_block_types": (f"CrossAttnUpBlock{kind}", f"UpBlock{kind}"), **more}


def control(**more: Any) -> dict[str, Any]:
    """A control network of two levels for pictures of 16 pixels."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    return {**UNET, "down_block_types": blocks, "conditioning_embedding_out_channels": (4, 8), **more}


COGVIDEO = {
    "attention_head_dim": 8,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TOKENS,
}
HUNYUAN_CALL = {
    "text_embedding_mask": Ones((ROWS, TOKENS)), "encoder_hidden_states_t5": WORDS, "style": Whole((ROWS,), 1),
    "text_embedding_mask_t5": Ones((ROWS, TOKENS)), "image_meta_size": Noise((ROWS, 6)),
    "image_rotary_emb": Made(lambda: (torch.ones(16, HEAD), torch.zeros(16, HEAD))),
}  # fmt: skip
HUNYUAN = {
    "patch_size": 2, "num_layers": 2, "cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "text_len": TOKENS,
    "text_len_t5": TOKENS, "pooled_projection_dim": TEXT,
}  # fmt: skip
FLAT_TWO = {"original_size": SIZE, "target_size": SIZE, "crop_coords": SIZE}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The configuration without what a class does not know."""
    return {name: value for name, value in config.items() if name not in names}


def cameras() -> torch.Tensor:
    """A camera that moves forward: its matrix, focal lengths and centre for each of three frames."""
    matrix = torch.eye(4).repeat(ROWS, 3, 1, 1)
    matrix[..., 2, 3] = torch.arange(3) * 0.1
    return torch.cat([matrix.flatten(-2), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(ROWS, 3, 4)], -1)


def animate_cache() -> Any:
    """What Wan-Animate-2 keeps of its reference pass."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(1)


SHAPES = [[(1, 4, 4)]] * ROWS

TABLE: dict[str, Tiny] = {
    "AceStepTransformer1DModel": Tiny(
        {"hidden_states": Noise((ROWS, 8, 4)), "timestep": PART, "timestep_r": PART, "context_latents": Noise((ROWS, 8, 8)),
         "encoder_hidden_states": Noise((ROWS, TOKENS, WIDTH))},
        {"in_channels": 12, "audio_acoustic_hidden_dim": 4, "num_hidden_layers": 2, "encoder_hidden_size": WIDTH},
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {"timestep": PART}, {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 32}
    ),
    "CogVideoXTransformer3DModel": Tiny({"hidden_states": Noise((ROWS, 3, 4, 8, 8))}, COGVIDEO),
    "ConsisIDTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 3, 4, 8, 8)), "id_cond": Noise((ROWS, 16)), "id_vit_hidden": [Noise((ROWS, 8, 8))] * 2},
        {**COGVIDEO, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2,
         "LFE_id_dim": 16, "LFE_vit_dim": 8, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1,
         "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1, "LFE_num_scale": 2},
    ),
    "DiTTransformer2DModel": Tiny(
        {"class_labels": Whole((ROWS,))}, {"num_embeds_ada_norm": 20}, leave=("encoder_hidden_states",)
    ),
    "HunyuanDiT2DModel": Tiny(HUNYUAN_CALL, HUNYUAN, ("out_channels",)),
    "LatteTransformer3DModel": Tiny(
        {"hidden_states": VIDEO},
        {"patch_size": 2, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 3,
         "num_embeds_ada_norm": 20, "sample_size": 4},
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"timestep": PART, "encoder_mask": Ones((ROWS, TOKENS)),
         "image_rotary_emb": Made(lambda: torch.polar(torch.ones(8, 8, 6), torch.rand(8, 8, 6))), "cross_attention_kwargs": {}},
        {"cross_attention_dim": TEXT, "multiple_of": 8},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Tiny(
        {"inputs_embeds": Noise((ROWS, 3, WIDTH))}, {"audio_vocab_size": 16, "num_codebooks": 4}
    ),
    "PixArtTransformer2DModel": Tiny({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    "PriorTransformer": Tiny(
        {"hidden_states": Noise((ROWS, 8)), "proj_embedding": Noise((ROWS, 8)), "encoder_hidden_states": Noise((ROWS, 7, 8))},
        {"embedding_dim": 8, "num_embeddings": 7},
        ("time_embed_dim",),
    ),
    "SanaTransformer2DModel": Tiny(),
    "StableAudioDiTModel": Tiny(
        {"hidden_states": Noise((ROWS, 4, 8)), "global_hidden_states": Noise((ROWS, 1, 16)), "timestep": PART,
         "rotary_embedding": Made(lambda: (torch.ones(9, 6), torch.zeros(9, 6)))},
        {"num_key_value_attention_heads": 2, "time_proj_dim": 16, "global_states_input_dim": 16, "sample_size": 8,
         "cross_attention_input_dim": TEXT, "cross_attention_dim": WIDTH},
    ),
    "T5FilmDecoder": Tiny(
        {"encodings_and_masks": [(Noise((ROWS, 6, WIDTH)), Ones((ROWS, 6)))], "decoder_input_tokens": Noise((ROWS, 8, 4)),
         "decoder_noise_time": PART},
        {"input_dims": 4, "targets_length": 8, "d_model": WIDTH, "d_kv": HEAD, "d_ff": 32},
    ),
    "Transformer2DModel": Tiny({}, {"norm_num_groups": 2, "cross_attention_dim": TEXT}, ("caption_channels",), ("timestep",)),
    "DreamLiteTransformer2DModel": Tiny(
        {"hidden_states": Noise((ROWS, WIDTH, 4, 4))},
        {"in_channels": WIDTH, "out_channels": WIDTH, "cross_attention_dim": TEXT, "norm_num_groups": 4},
        ("caption_channels", "num_kv_heads"),
        ("timestep",),
    ),
    "AllegroTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "attention_mask": Ones((ROWS, 3, 4, 4)), "encoder_attention_mask": Ones((ROWS, 1, TOKENS)),
         "image_rotary_emb": Made(lambda: (((torch.ones(9, 4), torch.zeros(9, 4)),) * 3, (torch.arange(12)[None] % 3,) * 3))},
        {"sample_height": 4, "sample_width": 4, "sample_frames": 3},
    ),
    "AnyFlowTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 3, 4, 4, 4)), "timestep": Noise((ROWS, 3)), "r_timestep": Noise((ROWS, 3))}
    ),
    "AnyFlowFARTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 3, 4, 4, 4)), "timestep": Noise((ROWS, 3)), "r_timestep": Noise((ROWS, 3)),
         "chunk_partition": (1, 2)},
        {"chunk_partition": (1, 2)},
    ),
    "BriaTransformer2DModel": Tiny(FLUX),
    "BriaFiboTransformer2DModel": Tiny(
        {**FLUX, "text_encoder_layers": [Noise((ROWS, TOKENS, 12))] * 2}, {"text_encoder_dim": 12}
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {"timestep": PART, "encoder_hidden_states": Noise((ROWS, 2, TOKENS, TEXT))},
        {"injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
         "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16},
    ),
    "ChromaTransformer2DModel": Tiny(
        FLUX, {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    ),
    "ChronoEditTransformer3DModel": Tiny({"hidden_states": VIDEO}, {"rope_temporal_skip_len": 8}),
    "CogView3PlusTransformer2DModel": Tiny(FLAT_TWO, {"pos_embed_max_size": 8}),
    "CogView4Transformer2DModel": Tiny(FLAT_TWO, {"rope_axes_dim": (8, 8)}),
    "CosmosTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "fps": 30},
        {"adaln_lora_dim": 4, "max_size": (4, 8, 8), "text_embed_dim": TEXT, "concat_padding_mask": False},
    ),
    "Cosmos3OmniTransformer": Tiny(
        {"input_ids": Made(lambda: torch.tensor([1, 2])), "text_indexes": Made(lambda: torch.tensor([0, 1])),
         "position_ids": Made(lambda: torch.arange(6).expand(3, 6)), "und_len": 2, "sequence_length": 6,
         "vision_tokens": [Noise((1, 4, 1, 2, 2))], "vision_token_shapes": [(1, 2, 2)],
         "vision_sequence_indexes": Made(lambda: torch.arange(2, 6)),
         "vision_mse_loss_indexes": Made(lambda: torch.arange(2, 6)),
         "vision_timesteps": Made(lambda: torch.full((4,), 500.0)),
         "vision_noisy_frame_indexes": [Made(lambda: torch.tensor([0]))]},
        {"latent_channel": 4, "latent_patch_size": 1, "patch_latent_dim": 4, "num_key_value_heads": 1, "vocab_size": 16,
         "rope_axes_dim": [2, 2, 2]},
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {"hidden_states": VIDEO},
        {"attention_head_dim": 16, "patch_size": 2, "time_embed_dim": 8, "sample_width": 4, "sample_height": 4},
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"text_bth": WORDS, "text_lens": Made(lambda: torch.tensor([5, 3]))}, leave=("encoder_hidden_states",)
    ),
    "FluxTransformer2DModel": Tiny({**FLUX, "pooled_projections": POOLED, "guidance": PART}, {"guidance_embeds": True}),
    "Flux2Transformer2DModel": Tiny(
        {**FLUX, "guidance": PART, "img_ids": Noise((16, 4)), "txt_ids": Noise((TOKENS, 4))},
        {"timestep_guidance_channels": 16, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "Flux3Transformer2DModel": Tiny(
        {**FLUX, "img_ids": Noise((16, 4)), "txt_ids": Noise((TOKENS, 4))},
        {"timestep_channels": 16, "cond_in_channels": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "GlmImageTransformer2DModel": Tiny(
        {"prior_token_id": Whole((ROWS, 16), 12), "prior_token_drop": Made(lambda: torch.tensor([False, True])),
         "target_size": SIZE, "crop_coords": SIZE},
        {"prior_vq_quantizer_codebook_size": 12},
    ),
    "HeliosTransformer3DModel": Tiny({"hidden_states": VIDEO}, {"rope_dim": (4, 4, 4)}),
    "HiDreamImageTransformer2DModel": Tiny(
        {"timesteps": TIME, "encoder_hidden_states_t5": WORDS, "encoder_hidden_states_llama3": Noise((2, ROWS, TOKENS, TEXT)),
         "pooled_embeds": POOLED},
        {"patch_size": 2, "caption_channels": (TEXT, TEXT), "text_emb_dim": 8, "axes_dims_rope": (4, 4, 4),
         "llama_layers": (0, 1), "max_resolution": (8, 8), "num_routed_experts": 2, "num_activated_experts": 1},
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "encoder_attention_mask": TEXT_MASK, "pooled_projections": POOLED, "guidance": TIME}
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {"hidden_states": VIDEO, "encoder_attention_mask": TEXT_MASK, "encoder_hidden_states_2": WORDS,
         "encoder_attention_mask_2": TEXT_MASK, "image_embeds": Noise((ROWS, 3, 8))},
        {"text_embed_2_dim": TEXT, "image_embed_dim": 8},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "encoder_attention_mask": TEXT_MASK, "pooled_projections": POOLED, "guidance": TIME,
         "image_embeds": Noise((ROWS, 3, 8)), "indices_latents": Made(lambda: torch.arange(3)),
         "latents_clean": Noise((ROWS, 4, 2, 4, 4)), "indices_latents_clean": Made(lambda: torch.arange(2)),
         "latents_history_2x": Noise((ROWS, 4, 2, 4, 4)), "indices_latents_history_2x": Made(lambda: torch.arange(2)),
         "latents_history_4x": Noise((ROWS, 4, 4, 8, 8)), "indices_latents_history_4x": Made(lambda: torch.arange(4))},
        {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {"encoder_attention_mask": TEXT_MASK}, {"rope_axes_dim": (6, 6), "guidance_embeds": False}
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {"hidden_states": Noise((ROWS, 21, 4)), "timestep": PART, "encoder_hidden_states": Noise((ROWS, 21, TEXT)),
         "position_ids": Whole((ROWS, 21, 3)), "segment_ids": Ones((ROWS, 21), torch.long),
         "indicator": Made(lambda: torch.tensor([[3] * 5 + [2] * 16] * ROWS))},
        {"adaln_dim": 8, "llm_features_dim": TEXT, "mrope_section": (2, 2, 2)},
    ),
    "JoyImageEditTransformer3DModel": Tiny({"hidden_states": Noise((ROWS, 1, 4, 3, 4, 4))}, {"rope_dim_list": [4, 4, 4]}),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 12, 4, 1, 2, 2)), "shape_list": [[(3, 2, 2)]] * ROWS}, {"rope_dim_list": [4, 4, 4]}
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"hidden_states": Noise((1, 3, 4, 4, 4)), "encoder_hidden_states": Noise((1, TOKENS, TEXT)), "timestep": Noise((1,)),
         "pooled_projections": Noise((1, TEXT)),
         "visual_rope_pos": Made(lambda: [torch.arange(3), torch.arange(2), torch.arange(2)]),
         "text_rope_pos": Made(lambda: torch.arange(TOKENS))},
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 2, 4, 4, 9)), "pooled_projections": Noise((ROWS, TEXT))},
        {"in_audio_dim": 4, "out_audio_dim": 4},
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 2, 16, 16, 9))}, {"patch_size": (1, 2, 2)}, leave=("encoder_hidden_states",)
    ),
    "Krea2Transformer2DModel": Tiny(
        {"hidden_states": TOKEN_SEQUENCE, "encoder_hidden_states": Noise((ROWS, TOKENS, 2, TEXT)), "timestep": PART,
         "position_ids": Made(lambda: torch.zeros(21, 3))},
        {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 16,
         "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"hidden_states": Noise((ROWS, 8, 4)), "encoder_attention_mask": Ones((ROWS, TOKENS), torch.bool), "timestep": PART,
         "latent_cond": Noise((ROWS, 8, 4))},
        {"dit_depth": 1},
    ),
    "LongCatImageTransformer2DModel": Tiny(FLUX),
    "LTXVideoTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 12, 4)), "encoder_attention_mask": TEXT_MASK, "num_frames": 3, "height": 2, "width": 2}
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 12, 4)), "audio_hidden_states": Noise((ROWS, 6, 4)),
         "audio_encoder_hidden_states": WORDS, "encoder_attention_mask": TEXT_MASK,
         "audio_encoder_attention_mask": TEXT_MASK, "num_frames": 3, "height": 2, "width": 2, "audio_num_frames": 6,
         "timestep": Made(lambda: torch.full((ROWS, 12), 500.0)), "audio_timestep": Made(lambda: torch.full((ROWS, 6), 500.0))},
        {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": HEAD,
         "audio_cross_attention_dim": WIDTH},
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"encoder_attention_mask": Ones((ROWS, TOKENS), torch.bool), "timestep": PART}, {"multiple_of": 8}
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 8, 16)), "audio_hidden_states": Noise((ROWS, 6, 3)),
         "timestep": Made(lambda: torch.tensor([0.7, 0.3])),
         "timestep_indices": Made(lambda: torch.tensor([0] * TOKENS + [1] * 6 + [0] * 8)),
         "token_tags": Made(lambda: torch.tensor([1] * TOKENS + [2] * 6 + [0] * 8)), "position_ids": Noise((TOKENS + 14, 3)),
         "video_indices": Made(lambda: torch.arange(TOKENS + 6, TOKENS + 14)),
         "audio_indices": Made(lambda: torch.arange(TOKENS, TOKENS + 6)), "text_indices": Made(lambda: torch.arange(TOKENS))},
        {"audio_in_channels": 3, "time_embed_hidden_dim": 16, "rope_freq_dim": 2},
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {"hidden_states": Noise((ROWS, 4, 8)), "encoder_hidden_states": Noise((ROWS, 8, 8)), "timestep": PART},
        {"rotary_dim": 8, "fourier_embedding_dim": 16},
    ),
    "MochiTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "encoder_attention_mask": Ones((ROWS, TOKENS), torch.bool)}, {"max_sequence_length": TOKENS}
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {"hidden_states": VIDEO, "encoder_attention_mask": TEXT_MASK}, {"num_decoder_layers": 1}
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        {"hidden_states": TOKEN_SEQUENCE, "img_shapes": SHAPES, "encoder_hidden_states_mask": Ones((ROWS, TOKENS), torch.long)},
        {"num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0, "num_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    ),
    "OmniGenTransformer2DModel": Tiny(
        {"timestep": PART, "input_ids": Whole((ROWS, 20)), "input_img_latents": [Noise((1, 4, 8, 8))],
         "input_image_sizes": {0: [[0, 16]]}, "attention_mask": Ones((ROWS, 37, 37)),
         "position_ids": Made(lambda: torch.arange(37).expand(ROWS, 37))},
        {"pad_token_id": 0, "vocab_size": 16, "time_step_dim": 8,
         "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6}},
    ),
    "OvisImageTransformer2DModel": Tiny(FLUX),
    "PRXTransformer2DModel": Tiny({"timestep": PART}, {"axes_dim": (6, 6)}),
    "QwenImageTransformer2DModel": Tiny(
        {"hidden_states": TOKEN_SEQUENCE, "timestep": PART, "img_shapes": SHAPES,
         "encoder_hidden_states_mask": Ones((ROWS, TOKENS), torch.long)},
    ),
    "QwenImage21Transformer2DModel": Tiny(
        {"hidden_states": Noise((ROWS, 16, 4)), "timestep": PART, "img_shapes": SHAPES,
         "img_mask": Made(lambda: torch.tensor([[False] * TOKENS + [True] * 4] * ROWS)),
         "encoder_hidden_states_mask": Ones((ROWS, TOKENS), torch.long)},
        {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    ),
    "RFD4ProteinaTransformer": Tiny(
        {"bb_ca": Noise((ROWS, 6, 3)), "local_latents": Noise((ROWS, 6, 4)), "bb_ca_time": PART, "local_latents_time": PART,
         "padding_mask": Ones((ROWS, 6), torch.bool),
         "conditioning": {"is_in_context_conditioning": Made(lambda: torch.zeros(ROWS, 6, dtype=torch.bool)),
                          "supports_local_latent": Ones((ROWS, 6), torch.bool)}},
        {"dim_cond": 8, "pair_repr_dim": 8, "t_emb_dim": 8, "xt_pair_dist_dim": 6, "tri_mult_c": 8,
         "feats_seq": ("xt_bb_ca", "xt_local_latents"), "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
         "feats_pair_repr": ("xt_bb_ca_pair_dists",)},
    ),
    "SanaVideoTransformer3DModel": Tiny({"hidden_states": VIDEO}, {"sample_size": 4}),
    "SanaWMTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 4, 3, 4, 4)), "timestep": Made(lambda: torch.full((ROWS, 1, 3), 500.0)),
         "encoder_hidden_states": Noise((ROWS, 1, TOKENS, TEXT)), "encoder_attention_mask": Ones((ROWS, TOKENS), torch.long),
         "camera_conditions": Made(lambda: cameras()), "chunk_plucker": Noise((ROWS, 8, 3, 4, 4))},
        {"hidden_size": 32, "linear_head_dim": 16, "softmax_every_n": 2, "num_layers": 2, "chunk_plucker_channels": 8,
         "chunk_plucker_post_attn_blocks": 2},
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        {"hidden_states": Noise((ROWS, 12, 4)), "timestep": Made(lambda: torch.full((ROWS, 12), 500.0)),
         "encoder_attention_mask": TEXT_MASK,
         "video_rotary_emb": Made(lambda: (torch.ones(1, 12, WIDTH), torch.zeros(1, 12, WIDTH)))},
        {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": HEAD,
         "audio_cross_attention_dim": WIDTH},
    ),
    "SD3Transformer2DModel": Tiny({"pooled_projections": POOLED}, {"pos_embed_max_size": 8}),
    "SkyReelsV2Transformer3DModel": Tiny({"hidden_states": VIDEO}),
    "StableAudio3DiTModel": Tiny(
        {"hidden_states": Noise((ROWS, 4, 8)), "timestep": PART, "global_hidden_states": POOLED,
         "local_add_cond": Noise((ROWS, 5, 8))},
        {"io_channels": 4, "cond_token_dim": TEXT, "global_cond_dim": 8, "local_add_cond_dim": 5, "timestep_features_dim": 16,
         "num_memory_tokens": 2},
    ),
    "TransformerTemporalModel": Tiny(
        {"hidden_states": Noise((4, 4, 4, 4)), "num_frames": 2}, {"norm_num_groups": 2}, ("cross_attention_dim",),
        ("encoder_hidden_states", "timestep"),
    ),
    "WanTransformer3DModel": Tiny(WAN),
    "WanAnimateTransformer3DModel": Tiny(
        {"hidden_states": Noise((1, 12, 3, 4, 4)), "timestep": Noise((1,)), "encoder_hidden_states": Noise((1, TOKENS, TEXT)),
         "encoder_hidden_states_image": Noise((1, 6, 8)), "pose_hidden_states": Noise((1, 4, 2, 4, 4)),
         "face_pixel_values": Noise((1, 3, 5, 16, 16))},
        {"in_channels": 12, "image_dim": 8, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
         "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
         "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        {"hidden_states": [Noise((4, 2, 4, 4))], "timestep": Made(lambda: torch.tensor([500.0])),
         "encoder_hidden_states": [Noise((TOKENS, TEXT))], "condition_latents": [Noise((6, 2, 4, 4))],
         "kv_cache": Made(lambda: animate_cache()),
         "kv_cache_mode": "extract", "seq_len": 8, "offset_grid_sizes": Made(lambda: torch.tensor([[2, 2, 2]]))},
        {"text_len": 8, "in_dim": 10, "out_dim": 4, "use_img_emb": False},
    ),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "control_hidden_states": Noise((ROWS, 6, 3, 4, 4))}, {"vace_layers": [0], "vace_in_channels": 6}
    ),
    "ZImageTransformer2DModel": Tiny(
        {"x": [Noise((4, 1, 8, 8))] * ROWS, "t": PART, "cap_feats": [Noise((TOKENS, TEXT))] * ROWS},
        {"axes_lens": (64, 64, 64)},
    ),
    "UNet1DModel": Tiny(
        {"sample": Noise((ROWS, 2, 64))}, {"in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "sample_size": 64},
        ("norm_num_groups",),
    ),
    "UNet2DModel": Tiny(
        {},
        {"block_out_channels": (8, 16), "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ),
    "UNet2DConditionModel": Tiny({}, unet("2D"), ("num_attention_heads",)),
    "UNet3DConditionModel": Tiny({"sample": VIDEO}, unet("3D"), ("num_attention_heads",)),
    "DreamLiteUNetModel": Tiny(
        {},
        {**UNET, "block_out_channels": (8, 16, 16), "num_kv_heads": 1, "ff_mult": 2},
        ("num_attention_heads",),
    ),
    "I2VGenXLUNet": Tiny(
        {"sample": VIDEO, "fps": Whole((ROWS,)), "image_latents": VIDEO, "image_embeddings": Noise((ROWS, TEXT))}, unet("3D")
    ),
    "Kandinsky3UNet": Tiny(
        {"encoder_attention_mask": TEXT_MASK},
        {"time_embedding_dim": 16, "groups": 4, "attention_head_dim": 4, "block_out_channels": (16, 16, 16, 16),
         "layers_per_block": 2, "encoder_hid_dim": TEXT, "cross_attention_dim": TEXT},
    ),
    "UNetMotionModel": Tiny(
        {"sample": VIDEO, "encoder_hidden_states": Noise((3 * ROWS, TOKENS, TEXT))},
        {**without(unet("Motion"), "attention_head_dim"), "motion_num_attention_heads": 2},
    ),
    "UNetSpatioTemporalConditionModel": Tiny(
        {"sample": Noise((ROWS, 3, 8, 8, 8)), "added_time_ids": Noise((ROWS, 3)),
         "encoder_hidden_states": Noise((ROWS, 1, TEXT))},
        {**without(unet("SpatioTemporal"), "attention_head_dim", "norm_num_groups"), "in_channels": 8,
         "block_out_channels": (32, 64), "num_attention_heads": (2, 4), "addition_time_embed_dim": 8,
         "projection_class_embeddings_input_dim": 24, "num_frames": 3},
    ),
    "StableCascadeUNet": Tiny(
        {"timestep_ratio": PART, "clip_text_pooled": Noise((ROWS, 1, 8)), "clip_text": WORDS, "clip_img": Noise((ROWS, 1, 8))},
        {"timestep_ratio_embedding_dim": 8, "conditioning_dim": 16, "block_out_channels": (16, 16),
         "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
         "clip_text_in_channels": TEXT, "clip_text_pooled_in_channels": 8, "clip_image_in_channels": 8,
         "switch_level": (False,)},
    ),
    "UVit2DModel": Tiny(
        {"input_ids": Whole((ROWS, 4, 4), 15), "pooled_text_emb": Noise((ROWS, 8)), "micro_conds": Noise((ROWS, 5))},
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
         "encoder_hidden_size": TEXT, "vocab_size": 16, "codebook_size": 16, "in_channels": 16, "block_out_channels": 16,
         "num_res_blocks": 1, "block_num_heads": 2, "intermediate_size": 32},
    ),
    "ControlNetModel": Tiny({"controlnet_cond": Noise((ROWS, 3, 16, 16))}, control(), ("num_attention_heads",)),
    "ControlNetUnionModel": Tiny(
        {"controlnet_cond": [Noise((ROWS, 3, 16, 16))],
         "control_type": Made(lambda: torch.tensor([[1.0] + [0.0] * 5] * ROWS)), "control_type_idx": [0],
         "added_cond_kwargs": {"text_embeds": Noise((ROWS, TEXT)), "time_ids": Noise((ROWS, 4))}},
        control(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48,
                num_trans_channel=8, num_trans_head=2, num_proj_channel=8),
        ("num_attention_heads",),
    ),
    "SparseControlNetModel": Tiny(
        {"sample": VIDEO, "controlnet_cond": Noise((ROWS, 4, 3, 4, 4)), "conditioning_mask": Ones((ROWS, 1, 3, 4, 4)),
         "encoder_hidden_states": Noise((3 * ROWS, TOKENS, TEXT))},
        {**UNET, "attention_head_dim": 2, "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
         "motion_num_attention_heads": 2},
        ("num_attention_heads",),
    ),
    "UNetControlNetXSModel": Tiny(
        {"controlnet_cond": Noise((ROWS, 3, 16, 16))},
        {**without(unet("2D"), "attention_head_dim", "layers_per_block"),
         "ctrl_conditioning_embedding_out_channels": (4, 8), "ctrl_block_out_channels": (4, 8), "ctrl_max_norm_num_groups": 4,
         "ctrl_num_attention_heads": 2},
    ),
    "FluxControlNetModel": Tiny(
        {**FLUX, "pooled_projections": POOLED, "controlnet_cond": TOKEN_SEQUENCE}
    ),
    "QwenImageControlNetModel": Tiny(
        {"hidden_states": TOKEN_SEQUENCE, "timestep": PART, "img_shapes": SHAPES, "controlnet_cond": TOKEN_SEQUENCE,
         "encoder_hidden_states_mask": Ones((ROWS, TOKENS), torch.long)},
    ),
    "SanaControlNetModel": Tiny({"controlnet_cond": PICTURE}),
    "SD3ControlNetModel": Tiny({"pooled_projections": POOLED, "controlnet_cond": PICTURE}, {"pos_embed_max_size": 8}),
    "HunyuanDiT2DControlNetModel": Tiny(
        {**HUNYUAN_CALL, "controlnet_cond": PICTURE},
        {**without(HUNYUAN, "num_layers"), "transformer_num_layers": 4},
    ),
    "AudioLDM2UNet2DConditionModel": Tiny(
        {"encoder_hidden_states_1": WORDS},
        unet("2D", cross_attention_dim=((TEXT, TEXT), (TEXT, TEXT))),
        ("num_attention_heads",),
    ),
    "UniDiffuserModel": Tiny(
        {"latent_image_embeds": PICTURE, "image_embeds": Noise((ROWS, 1, 8)), "prompt_embeds": WORDS, "timestep_img": TIME,
         "timestep_text": TIME},
        {"clip_img_dim": 8, "num_text_tokens": TOKENS, "patch_size": 2, "norm_num_groups": 2, "cross_attention_dim": None},
        (), ("encoder_hidden_states",),
    ),
    "UTransformer2DModel": Tiny(
        {},
        {"patch_size": 2, "norm_num_groups": 2, "cross_attention_dim": None},
        leave=("encoder_hidden_states", "timestep"),
    ),
    "UNetFlatConditionModel": Tiny({"sample": Noise((ROWS, 4, 4, 1))}, unet("Flat"), ("num_attention_heads",)),
    "WuerstchenPrior": Tiny(
        {"x": PICTURE, "r": PART, "c": WORDS}, {"c_in": 4, "c": 16, "c_cond": TEXT, "c_r": 8, "depth": 2, "nhead": 2}
    ),
    "WuerstchenDiffNeXt": Tiny(
        {"x": Noise((ROWS, 4, 16, 16)), "r": PART, "effnet": Noise((ROWS, 4, 4, 4)), "clip": WORDS},
        {"c_r": 8, "c_cond": TEXT, "c_hidden": [16, 16], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"],
         "inject_effnet": [False, True], "effnet_embd": 4, "clip_embd": TEXT},
    ),
}  # fmt: skip


_LIST = "holds control networks of a class that is in the sweep"
_ENCODER = "no denoiser: encodes or projects conditions"
_DECODER = "no denoiser: an autoencoder, tokenizer or upsampler"
NOT_TINY: dict[str, str] = {
    "MultiControlNetModel": _LIST, "MultiControlNetUnionModel": _LIST, "FluxMultiControlNetModel": _LIST,
    "HunyuanDiT2DMultiControlNetModel": _LIST, "QwenImageMultiControlNetModel": _LIST, "SD3MultiControlNetModel": _LIST,
    "ControlNetXSAdapter": "parts of a UNetControlNetXSModel, cannot be called",
    "MotionAdapter": "parts of a UNetMotionModel, cannot be called",
    "CosmosControlNetModel": "resizes a mask with torchvision, which difloat does not need",
    "ZImageControlNetModel": "has no embedders but those of the transformer it is made from",
    "AceStepConditionEncoder": _ENCODER, "AceStepLyricEncoder": _ENCODER, "AceStepTimbreEncoder": _ENCODER,
    "AudioLDM2ProjectionModel": _ENCODER, "ReduxImageEncoder": _ENCODER, "StableAudioProjectionModel": _ENCODER,
    "StableAudio3DurationEmbedder": _ENCODER, "UniDiffuserTextDecoder": _DECODER, "PaellaVQModel": _DECODER,
    "AceStepAudioTokenizer": _DECODER, "AceStepAudioTokenDetokenizer": _DECODER, "LTXLatentUpsamplerModel": _DECODER,
}  # fmt: skip

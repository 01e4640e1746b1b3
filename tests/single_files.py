"""Tiny denoisers under the names of the single files that BFL, CompVis and ComfyUI publish.

`RULES` is written from the published files, from diffusers' names to theirs: an oracle beside diffusers' own conversion, whose
inverse difloat finds by running it. A rule is a pattern and a template; names that become one are joined in the order of the
number behind ``#``, and ``~`` exchanges the halves of what is joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import families

QKV = {"q": 0, "k": 1, "v": 2}
MMDIT = [  # Stable Diffusion 3
    (r"pos_embed\.pos_embed$", "pos_embed"),
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks\.", "joint_blocks."),
    (
        r"(joint_blocks\.1)\.norm1_context\.linear",
        r"\1.context_block.adaLN_modulation.1~",
    ),  # of the last block
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"attn\.to_([qkv])\.", r"x_block.attn.qkv#\1."),
    (r"attn\.add_([qkv])_proj\.", r"context_block.attn.qkv#\1."),
    (r"attn\.to_out\.0", "x_block.attn.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
]
FLUX = [
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
    (r"^proj_out", "final_layer.linear"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.linear1#\2."),
    (r"\.proj_mlp\.", ".linear1#9."),
    (r"^(single_transformer_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"^(single_transformer_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^transformer_blocks", "double_blocks"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"attn\.to_([qkv])\.", r"img_attn.qkv#\1."),
    (r"attn\.add_([qkv])_proj\.", r"txt_attn.qkv#\1."),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
]
LDM = [  # U-Nets of two levels with one layer each
    (r"^", "model.diffusion_model."),
    (r"\.time_embedding\.linear_1", ".time_embed.0"),
    (r"\.time_embedding\.linear_2", ".time_embed.2"),
    (r"\.add_embedding\.linear_1", ".label_emb.0.0"),
    (r"\.add_embedding\.linear_2", ".label_emb.0.2"),
    (r"\.conv_in\.", ".input_blocks.0.0."),
    (r"\.conv_norm_out\.", ".out.0."),
    (r"\.conv_out\.", ".out.2."),
    (r"(resnets\.\d)\.norm1", r"\1.in_layers.0"),
    (r"(resnets\.\d)\.conv1", r"\1.in_layers.2"),
    (r"(resnets\.\d)\.norm2", r"\1.out_layers.0"),
    (r"(resnets\.\d)\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
    (r"down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
    (r"mid_block\.resnets\.0", "middle_block.0"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
    (r"up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
]
Z_IMAGE = [
    (r"^", "model.diffusion_model."),
    (r"all_final_layer\.2-1", "final_layer"),
    (r"all_x_embedder\.2-1", "x_embedder"),
    (r"attention\.to_out\.0", "attention.out"),
    (r"attention\.norm_([qk])", r"attention.\1_norm"),
    (r"attention\.to_([qkv])\.", r"attention.qkv#\1."),
]
LUMINA2 = [
    (r"time_caption_embed\.caption_embedder", "cap_embedder"),
    (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"norm_out\.linear_2", "final_layer.linear"),
    (r"(context_refiner\.\d)\.norm1\.", r"\1.attention_norm1."),
    (r"norm1\.norm\.", "attention_norm1."),
    (r"norm1\.linear", "adaLN_modulation.1"),
    (r"\.norm2\.", ".attention_norm2."),
    (r"feed_forward\.linear_(\d)", r"feed_forward.w\1"),
    (r"attn\.to_([qkv])\.", r"attention.qkv#\1."),
    (r"attn\.to_out\.0", "attention.out"),
    (r"attn\.norm_([qk])", r"attention.\1_norm"),
]
WAN = [
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"to_out\.0", "o"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"^proj_out", "head.head"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"\.norm2\.", ".norm3."),
]
LTX = [
    (r"^", "model.diffusion_model."),
    (r"\.proj_in", ".patchify_proj"),
    (r"time_embed", "adaln_single"),
    (r"norm_([qk])", r"\1_norm"),
]
AURAFLOW = [
    (r"pos_embed\.pos_embed$", "positional_encoding"),
    (r"pos_embed\.proj", "init_x_linear"),
    (r"time_step_proj\.linear_1", "t_embedder.mlp.0"),
    (r"time_step_proj\.linear_2", "t_embedder.mlp.2"),
    (r"context_embedder", "cond_seq_linear"),
    (r"^proj_out", "final_linear"),
    (r"norm_out\.linear", "modF.1~"),
    (r"single_transformer_blocks\.(\d+)\.ff\.", r"single_layers.\1.mlp."),
    (r"single_transformer_blocks\.(\d+)\.norm1\.linear", r"single_layers.\1.modCX.1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_layers.\1.attn.w1\2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out\.0", r"single_layers.\1.attn.w1o"),
    (r"joint_transformer_blocks", "double_layers"),
    (r"\.ff_context\.", ".mlpC."),
    (r"\.ff\.", ".mlpX."),
    (r"norm1_context\.linear", "modC.1"),
    (r"norm1\.linear", "modX.1"),
    (r"attn\.to_([qkv])", r"attn.w2\1"),
    (r"attn\.add_([qkv])_proj", r"attn.w1\1"),
    (r"attn\.to_out\.0", "attn.w2o"),
    (r"attn\.to_add_out", "attn.w1o"),
    (r"linear_([12])", r"c_fc\1"),
    (r"out_projection", "c_proj"),
]


def under_source_names(state: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under diffusers' names as their file has them."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in state.items():
        for pattern, template in rules:
            name = re.sub(pattern, template, name, count=1)
        order = re.search(r"#(\w)", name)
        place = 0 if order is None else QKV.get(order.group(1), 9)
        parts.setdefault(re.sub(r"#\w", "", name), []).append((place, tensor))
    found = {}
    for name, pieces in parts.items():
        joined = torch.cat([tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])])
        if "~" in name:
            joined = torch.cat(joined.chunk(2)[::-1])
        found[name.replace("~", "")] = joined
    return found


def of(class_name: str, **config: Any) -> Callable[[], torch.nn.Module]:
    """Builds a denoiser of diffusers from a config, always with the same weights."""

    def build() -> torch.nn.Module:
        import diffusers

        return families.seeded(lambda: getattr(diffusers, class_name)(**config)).eval()

    return build


def z_image() -> torch.nn.Module:
    config = {
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
    }
    return of("ZImageTransformer2DModel", in_channels=4, axes_dims=(4, 6, 6), axes_lens=(8, 8, 8), **config)()


def wan() -> torch.nn.Module:
    config = {
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 4,
    }
    return of("WanTransformer3DModel", num_attention_heads=2, attention_head_dim=16, **config)()


def ltx() -> torch.nn.Module:
    config = {"cross_attention_dim": 32, "caption_channels": 32, "num_layers": 2, "in_channels": 4}
    return of(
        "LTXVideoTransformer3DModel", out_channels=4, num_attention_heads=2, attention_head_dim=16, **config
    )()


def auraflow() -> torch.nn.Module:
    config = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 32, "in_channels": 4}
    sizes = {"sample_size": 8, "caption_projection_dim": 32, "pos_embed_max_size": 16, "out_channels": 4}
    return of("AuraFlowTransformer2DModel", attention_head_dim=16, num_attention_heads=2, **config, **sizes)()


def qwen_image() -> torch.nn.Module:
    config = {"num_layers": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 32}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return of("QwenImageTransformer2DModel", **config, **heads)()


TINY: dict[str, tuple[Callable[[], torch.nn.Module], list[tuple[str, str]]]] = {
    "sd15": (lambda: families.sd15().unet, LDM),
    "sdxl": (lambda: families.sdxl().unet, LDM),
    "sd3": (lambda: families.sd3().transformer, MMDIT),
    "z_image": (z_image, Z_IMAGE),
    "qwen_image": (qwen_image, []),
    "wan": (wan, WAN),
    "ltx": (ltx, LTX),
    "auraflow": (auraflow, AURAFLOW),
}
"""Families by name: the tiny model, and the rules of its published file."""

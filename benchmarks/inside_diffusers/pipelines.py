"""Tiny pipelines of real classes for `benchmarks/integration.py`, and what their quantized layers hold.

The models are as small as the libraries allow: 64 channels, since several keep to layers of 32 or more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from tiny import tiny_tokenizer, tiny_vae  # noqa: E402

DTYPE = torch.bfloat16  # the only one that every library supports
WIDTH = 64
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Pipelines


def _clip(tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def t5(tokenizer: Any) -> nn.Module:
    """T5 encoder of one layer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
    )
    return T5EncoderModel(config)


def unet() -> Any:
    """Stable Diffusion: convolutions, attention, GEGLU, skips."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = tiny_tokenizer()
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart(width: int = WIDTH, blocks: int = 2) -> Any:
    """PixArt: blocks with cross-attention."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = tiny_tokenizer()
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=width,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=tiny_vae(),
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(),
    )


def flux() -> Any:
    """FLUX: a double and a single stream block."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = tiny_tokenizer()
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1159),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tiny_tokenizer(),
        transformer=model,
    )


PIPELINES: dict[str, tuple[str, Callable[[], Any]]] = {
    "U-Net": ("unet", unet),
    "PixArt": ("transformer", pixart),
    "FLUX": ("transformer", flux),
}


def call(model: nn.Module, dtype: torch.dtype = DTYPE) -> Tensor:
    """One call of a denoiser with fixed random inputs, with gradient if that is on."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 6, WIDTH, generator=generator).to(dtype)
    sample = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    kind = type(getattr(model, "_orig_mod", model)).__name__
    if kind.startswith("UNet"):
        return model(sample, torch.tensor([5]), states).sample
    if kind.startswith("PixArt"):
        sizes = {"resolution": None, "aspect_ratio": None}
        return model(sample, states, timestep=torch.tensor([5]), added_cond_kwargs=sizes).sample
    return model(
        hidden_states=sample.view(1, 16, 16),
        encoder_hidden_states=states,
        pooled_projections=states[:, 0],
        timestep=torch.tensor([0.5]).to(dtype),
        img_ids=torch.arange(48.0).view(16, 3).to(dtype),
        txt_ids=torch.zeros(6, 3).to(dtype),
    ).sample


def output(model: nn.Module, dtype: torch.dtype = DTYPE) -> Tensor:
    """`call` without gradient."""
    with torch.no_grad():
        return call(model, dtype)


# Tensors inside of a model, whatever class they have


def plain_tensors(tensor: Tensor, name: str = "") -> dict[str, Tensor]:
    """The tensors that a tensor consists of: itself, or what a subclass of torch wraps."""
    if (
        type(tensor).__name__ == "TinyGemmWeightQBitsTensor"
    ):  # quanto: another layout for a kernel, the same numbers
        tensor = tensor.weight_qbits_tensor()
    if not hasattr(tensor, "__tensor_flatten__"):
        found = {name: tensor.detach()}
        state = getattr(tensor, "quant_state", None)  # bitsandbytes: scales are an attribute
        if state is not None:
            found[f"{name}.absmax"] = state.absmax.detach()
        return found
    found = {}
    for attribute in tensor.__tensor_flatten__()[0]:
        found |= plain_tensors(getattr(tensor, attribute), f"{name}.{attribute}")
    return found


def tensors_of(layer: nn.Module, name: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a module as plain tensors, by name; those of a LoRA around it left out."""
    found: dict[str, Tensor] = {}
    for key, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        found |= plain_tensors(tensor, f"{name}.{key}")
    return found


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of a layer holds anything but usual floating-point numbers."""
    weight = layer._parameters.get("weight", layer._buffers.get("weight"))
    return weight is not None and any(t.dtype not in PLAIN_DTYPES for t in plain_tensors(weight).values())


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, without the wrappers of PEFT."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if is_quantized(module)
    }


def codes_and_scales(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of everything in quantized layers: what is not floating point, and what is (biases left out)."""
    found: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model).items():
        found |= {k: t.clone() for k, t in tensors_of(layer, name).items() if k != f"{name}.bias"}
    codes = {name: tensor for name, tensor in found.items() if tensor.dtype not in PLAIN_DTYPES}
    return codes, {name: tensor for name, tensor in found.items() if name not in codes}

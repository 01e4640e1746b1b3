"""Pipelines of real size with their published configurations and random weights, to measure time and memory without a download.

    python benchmarks/real_models.py sd15 DIR                  # Stable Diffusion 1.5: 0.86 B weights in the U-Net
    python benchmarks/real_models.py pixart DIR                # PixArt-XL/2 512: 0.61 B weights in the transformer
    python benchmarks/real_models.py flux DIR --blocks 2 4     # FLUX.1-dev: 11.9 B weights in 19 and 38 blocks, here 2 and 4
    python benchmarks/real_models.py measure NAME --json FILE -- quantize DIR OUT --recipe rtn    # wall time and peak memory

Weights are drawn with a deviation of 1 / sqrt(inputs), so that every layer's output stays finite in half precision. The words
of the tokenizers are those of the built-in prompts, since what a text encoder is fed matters for no time or size. T5-XXL is
built with as many of its 24 layers as ``--text-layers`` says, since all of them take 9.5 GB. The transformer of FLUX is written
block by block, so that it need not fit the memory; with fewer blocks than it has, what all would take is printed.

``measure`` runs a difloat command in a process of its own and adds its wall time, CPU time and peak resident memory to a JSON
file, with the machine and the commit; ``table`` prints such a file as the table of docs/real_models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import safetensors.torch
import torch
from torch import nn

from difloat import api
from difloat.report import render

_TOKENS = {"sd15": 77, "pixart": 120}


def main() -> None:
    """Build one pipeline and save it, or measure a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[*sorted(MODELS), "flux", "measure", "table"])
    parser.add_argument(
        "name", help="directory of the pipeline; of a measurement its name; of a table the JSON file"
    )
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--text-layers", type=int, default=2, help="layers of T5-XXL")
    parser.add_argument(
        "--blocks", type=int, nargs="+", help="of FLUX double and single ones, of PixArt; default: all"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("real_models.json"), help="where measurements are added"
    )
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # what follows is a command of difloat
    arguments = parser.parse_args(sys.argv[1:end])
    dtype = getattr(torch, arguments.dtype)
    if arguments.model == "measure":
        add(arguments.json, measure(arguments.name, sys.argv[end + 1 :]))
    elif arguments.model == "table":
        print(table(json.loads(Path(arguments.name).read_text(encoding="utf-8"))))
    elif arguments.model == "flux":
        flux(Path(arguments.name), dtype, arguments.text_layers, tuple(arguments.blocks or (19, 38)))
    elif arguments.model == "pixart":
        pixart(dtype, arguments.text_layers, *(arguments.blocks or ())).save_pretrained(arguments.name)
    else:
        MODELS[arguments.model](dtype, arguments.text_layers).save_pretrained(arguments.name)


def measure(name: str, command: Sequence[str]) -> dict[str, Any]:
    """Run a command of difloat in a process of its own; what it took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "difloat", *command], check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "name": name,
        "command": shlex.join(["difloat", *command]),
        "exit": done.returncode,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_rss_mb": round(after.ru_maxrss / 1024),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "machine": render.machine(),
        "commit": harness.commit(),
    }


def add(path: Path, entry: Mapping[str, Any]) -> None:
    """Put a measurement into a JSON file in the place of the one of its name."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    others = [one for one in found if one["name"] != entry["name"]]
    path.write_text(json.dumps([*others, entry], indent=1) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=1))


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Measurements as a table in Markdown."""
    lines = [
        "| what | wall time | CPU time | peak RSS | others at work | command |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        failed = "" if one["exit"] == 0 else f" (exit {one['exit']})"
        others = max(0.0, one["load"] - 1)
        lines.append(
            f"| {one['name']}{failed} | {one['wall_s']:,.0f} s | {one['cpu_s']:,.0f} s | {one['peak_rss_mb'] / 1000:.2f} GB | "
            f"load {others:.1f} | `{one['command']}` |"
        )
    return "\n".join(lines)


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


def pixart(dtype: torch.dtype, text_layers: int, blocks: int = 28) -> Any:
    """PixArt-alpha XL/2 at 512 pixels."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = filled(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=blocks,
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


def flux(directory: Path, dtype: torch.dtype, text_layers: int, blocks: tuple[int, int]) -> None:
    """FLUX.1-dev with so many of its 19 double and 38 single blocks, written to a directory."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    whole = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
    built = {**whole, "num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        model, full = FluxTransformer2DModel(**built), FluxTransformer2DModel(**whole)
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=text_layers, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip
    tiny = FluxTransformer2DModel(
        num_layers=0, num_single_layers=0, num_attention_heads=1, attention_head_dim=128
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=filled(lambda: AutoencoderKL(**vae), dtype),
        text_encoder=filled(lambda: CLIPTextModel(clip), dtype),
        tokenizer=tokenizer_of(77),
        text_encoder_2=filled(lambda: T5EncoderModel(t5), dtype),
        tokenizer_2=tokenizer_of(512),
        transformer=tiny,
    )
    pipeline.save_pretrained(directory)
    shutil.rmtree(directory / "transformer")
    _write_blocks(model, directory / "transformer", dtype)
    have, all_ = (sum(weight.numel() for weight in one.parameters()) for one in (model, full))
    print(
        f"{have / 1e9:.2f} of {all_ / 1e9:.2f} B weights; all would take {all_ * dtype.itemsize / 1e9:.1f} GB"
    )


def _write_blocks(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Random weights of a model on the meta device, a file for every block."""
    folder.mkdir()
    model.save_config(folder)
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in state:
        files.setdefault(".".join(name.split(".")[:2]) if "blocks" in name else "others", []).append(name)
    weight_map = {}
    for number, names in enumerate(files.values(), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(files):05d}.safetensors"
        made = {}
        for name in names:
            one = torch.empty(state[name].shape, dtype=dtype)
            norm = "norm" in name and name.endswith("weight") and one.dim() == 1
            made[name] = (
                one.fill_(float(norm))
                if one.dim() < 2
                else one.normal_(0, one[0].numel() ** -0.5, generator=generator)
            )
        safetensors.torch.save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )


MODELS: dict[str, Callable[[torch.dtype, int], Any]] = {"sd15": sd15, "pixart": pixart}


if __name__ == "__main__":
    main()

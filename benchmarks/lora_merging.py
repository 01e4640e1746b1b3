"""What merging a LoRA into a packed model costs: unmerged, merged, and merged before quantizing, at several widths.

The denoiser's output on fixed latents, texts and timesteps is compared with that of the float model with the LoRA. Errors are
relative to what the LoRA changes there: 1 is as far off as the float model without it.

python examples/train_lora.py --out emoji-inverted && python benchmarks/lora_merging.py emoji-inverted

Writes ``benchmarks/results/lora_merging.json``.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import difloat
from difloat import run

WIDTHS = ("w3a8", "w4a8", "w6a8", "w8a8")


@torch.no_grad()
def outputs(pipeline: Any, texts: Tensor) -> Tensor:
    """Predicted noise for every text at four timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(texts), 4, 16, 16, generator=generator)
    return torch.stack([pipeline.unet(latents, torch.tensor(t), texts).sample for t in (50, 350, 650, 950)])


def measure(source: Path, recipe: str, bits: str, samples: int) -> dict[str, float]:
    """Errors of one width."""
    plain = difloat.reference("emoji-unet")
    prompts = run.prompts_of(plain, "emoji-unet", None) or []
    texts = plain.encode_prompt(prompts[:16], "cpu", 1, False)[0].detach()
    arguments = {"recipe": recipe, "bits": bits, "prompts": prompts, "samples": samples, "progress": False}
    adapted = copy.deepcopy(plain)
    difloat.lora.load(adapted, source)
    without, target = outputs(plain, texts), outputs(adapted, texts)

    def error(pipeline: Any, aim: Tensor) -> float:
        return float((outputs(pipeline, texts) - aim).norm() / (target - without).norm())

    packed = copy.deepcopy(plain)
    difloat.quantize(packed, **arguments)
    result = {"without LoRA": error(packed, without)}
    difloat.lora.load(packed, source)
    result["unmerged"] = error(packed, target)
    shares = difloat.lora.merge(packed)
    result |= {
        "merged": error(packed, target),
        "share that arrived, mean of layers": sum(shares.values()) / len(shares),
    }
    difloat.lora.merge(adapted)
    difloat.lora.unload(adapted)
    difloat.quantize(adapted, **arguments)
    return {**result, "merged before quantizing": error(adapted, target)}


def main() -> None:
    """Measure, print, write."""
    parser = harness.parser(__doc__, out=harness.RESULTS / "lora_merging.json")
    parser.add_argument("lora", type=Path, help="directory of a LoRA of emoji-unet")
    parser.add_argument("--recipe", default="rtn")
    parser.add_argument("--samples", type=int, default=64, help="calibration rows")
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS))
    options = harness.arguments(parser)
    warnings.filterwarnings("ignore", "rounding took away")  # it is what is measured
    errors = {}
    for bits in options.widths:
        errors[bits] = measure(options.lora, options.recipe, bits, options.samples)
        print(bits, "  ".join(f"{name} {value:.3f}" for name, value in errors[bits].items()))
    harness.write(options.out, {"recipe": options.recipe, "error": errors})


if __name__ == "__main__":
    main()

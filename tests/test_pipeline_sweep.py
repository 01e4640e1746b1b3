"""Every pipeline class of the installed diffusers: quantized, saved, loaded and sampled, by commands and by diffusers alone."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

import difloat
import pipeline_parts as parts
from difloat import cli, evaluation, pipelines
from difloat.layers import quantizable
from difloat.layers.packed import QuantizedLayer
from difloat.report import build as report
from pipeline_table import BUILT, CALIBRATED, QUICK, REASONS, Row, pipeline, pipeline_classes
from tiny import PROMPTS

# What diffusers deprecates and what attention says of the CPU is not what is tested here.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "UserWarning", "DeprecationWarning", "RuntimeWarning")
]
FEW = ["--recipe", "lbfp", "--set", "rounding=nearest", "--samples", "4", "--batch", "2"]
Command = Callable[..., None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls the command line as a shell does, in this process, and expects success."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["difloat", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code

    return call


def files_of(row: Row, folder: Path) -> Iterator[str]:
    """Writes the pictures and arrays of a row; `name=FILE` of each."""
    generator = np.random.default_rng(0)
    for name, count in row.pictures.items():
        shape = (row.size, row.size) if "mask" in name else (row.size, row.size, 3)
        for number in range(count):
            pixels = generator.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
            yield f"{name}={folder}/{name}-{number}.png"
    for name, shape in row.arrays.items():
        np.save(folder / f"{name}.npy", generator.standard_normal(shape, dtype=np.float32))
        yield f"{name}={folder}/{name}.npy"


def options_of(row: Row, inputs: list[str], steps: int | None) -> list[str]:
    """The row's call on the command line."""
    found = [] if steps is None else ["--steps", str(steps)]
    for name, value in row.call.items():
        found += ["--call", f"{name}={json.dumps(value)}"]
    return found + [word for pair in inputs for word in ("--input", pair)]


def draw(model: Any, row: Row, inputs: list[str]) -> evaluation.Generated:
    return evaluation.generate(
        model,
        PROMPTS[:1] if row.prompts else None,
        seeds=[0],
        steps=row.steps,
        progress=False,
        call_kwargs={**row.call, **pipelines.inputs_of(inputs)},
    )


def packed(model: Any) -> int:
    modules = [part for part in model.components.values() if isinstance(part, nn.Module)]
    return sum(isinstance(layer, QuantizedLayer) for module in modules for layer in module.modules())


def through_all(name: str, recipe: list[str], folder: Path, command: Command) -> None:
    """A float pipeline is saved, quantized and sampled by commands; diffusers loads it by itself and samples the same."""
    row = BUILT[name]
    if row.needs is not None:
        pytest.importorskip(row.needs)
    before, inputs = pipeline(name), list(files_of(row, folder))
    before.save_pretrained(folder / "float")
    calibrated = options_of(row, inputs, None if row.steps is None else max(row.steps, 2))
    command("quantize", folder / "float", folder / "small", "--images", 0, *recipe, *calibrated)
    prompt = ["--prompt", PROMPTS[0]] if row.prompts else []
    sampler = options_of(row, inputs, row.steps)
    command("generate", folder / "small", folder / "drawn", "--count", 1, *prompt, *sampler)
    loaded = DiffusionPipeline.from_pretrained(folder / "small")
    assert type(loaded).__name__ == name and packed(loaded) > 0 == packed(before)
    after, exact = draw(loaded, row, inputs), draw(before, row, inputs)
    pictures = [np.asarray(Image.open(file)) for file in sorted((folder / "drawn").glob("*.png"))]
    assert len(pictures) == len(after.images)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, report.to_uint8(after.images), strict=True))
    if after.signal is not None:
        assert np.array_equal(np.load(folder / "drawn/00000.npy"), after.signal[0].numpy())
        assert not torch.equal(after.signal, exact.signal)
    else:
        assert not torch.equal(after.images, exact.images)


def test_every_class_is_built_or_has_one_reason() -> None:
    assert not BUILT.keys() & REASONS.keys()
    assert pipeline_classes() == BUILT.keys() | REASONS.keys()
    assert all(reason and "\n" not in reason for reason in REASONS.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in BUILT]
)
def test_a_pipeline_goes_through_quantize_save_load_and_sample(
    name: str, tmp_path: Path, command: Command
) -> None:
    through_all(name, ["--recipe", "rtn"], tmp_path, command)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "StableAudioPipeline"))
        for name in sorted(CALIBRATED)
    ],
)
def test_a_calibrated_pipeline_goes_the_same_way(name: str, tmp_path: Path, command: Command) -> None:
    through_all(name, FEW, tmp_path, command)


def test_the_page_of_families_says_what_the_lists_say() -> None:
    script = Path(__file__).parents[1] / "benchmarks/families.py"
    found = runpy.run_path(str(script))
    assert found["PAGE"].read_text(encoding="utf-8") == found["page"]()


@pytest.mark.parametrize(
    ("name", "kind", "stays"),
    [
        ("WanTransformer3DModel", nn.Conv3d, True),
        ("StableAudioDiTModel", nn.Conv1d, True),
        ("UNetMotionModel", nn.Conv2d, False),
        ("HiDreamImageTransformer2DModel", nn.Linear, False),
        pytest.param("NucleusMoEImageTransformer2DModel", None, True, marks=pytest.mark.slow),
    ],
)
def test_what_the_page_says_of_kinds_of_layers(name: str, kind: type[nn.Module] | None, stays: bool) -> None:
    model = parts.denoiser(name)
    left = quantizable.staying_float(model)
    if kind is None:
        assert any("experts" in reason.lower() for reason in left.values())
        return
    ours = [module for module, one in model.named_modules() if type(one) is kind]
    assert ours and all((module in left) == stays for module in ours)


def test_transposed_convolutions_stay_float() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 4))
    assert list(quantizable.staying_float(model)) == ["0"] and list(quantizable.quantizable(model)) == ["1"]


def image_prompt_adapter(unet: Any) -> dict[str, Any]:
    """Random weights of an IP-Adapter for a U-Net: a picture's embedding of 16 numbers becomes 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    widths, text = unet.config.block_out_channels, unet.config.cross_attention_dim
    weights = {}
    crossed = [name.split(".") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, (place, block, *_) in enumerate(crossed):
        level = {"mid_block": -1, "down_blocks": int(block) if block.isdigit() else 0}.get(place)
        width = widths[::-1][int(block)] if level is None else widths[level]
        for matrix in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{matrix}.weight"] = torch.randn(width, text, generator=generator) / 4
    projection = {
        "proj.weight": torch.randn(4 * text, 16, generator=generator) / 4,
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def test_an_image_prompt_adapter_goes_onto_a_quantized_pipeline_and_is_not_saved_with_it(tmp_path) -> None:
    quantized, row = pipeline("StableDiffusionPipeline"), BUILT["StableDiffusionPipeline"]
    difloat.quantize(quantized, "rtn", progress=False)
    plain = draw(quantized, row, [])
    difloat.save(quantized, tmp_path / "small")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small")
    embedding = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    row = Row(call={"ip_adapter_image_embeds": [embedding]})
    weights = image_prompt_adapter(quantized.unet)
    drawn = []
    for one in (quantized, loaded):
        one.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
        drawn.append(draw(one, row, []).images)
    assert torch.equal(*drawn) and not torch.equal(drawn[0], plain.images)
    with pytest.raises(difloat.CheckpointError, match="unload_ip_adapter"):
        difloat.save(quantized, tmp_path / "with")

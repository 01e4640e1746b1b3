"""A whole pipeline under one plan: planned, applied, saved, loaded by plain from_pretrained, restored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import difloat
from difloat import checkpoint, components
from difloat.checkpoint import data_free
from difloat.layers.packed import QuantizedLayer
from difloat.plan.rules import Bits
from tiny import tiny_pixart, tiny_unet, tiny_vae

SAMPLING = {"samples": 8, "steps": 2, "prompts_per_batch": 2, "progress": False}
BINNING = {"use_resolution_binning": False}


def draw(pipeline) -> np.ndarray:
    arguments = BINNING if hasattr(pipeline, "transformer") else {}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        ["a red cat"], num_inference_steps=2, generator=generator, output_type="np", **arguments
    ).images


def files(directory: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Files of some components; a tokenizer is not written the same way again by its own library."""
    paths = [path for name in names for path in sorted((directory / name).iterdir())]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def quantized_layers(model: nn.Module) -> int:
    return sum(isinstance(module, QuantizedLayer) for module in model.modules())


@pytest.mark.parametrize("make, denoiser", [(tiny_pixart, "transformer"), (tiny_unet, "unet")])
def test_one_plan_for_all_components(make, denoiser, tmp_path) -> None:
    pipeline = make()
    wanted = [denoiser, "text_encoder", "vae=w8a8"]
    call = BINNING if denoiser == "transformer" else None
    plan = difloat.quantize(pipeline, "rtn", "w4a8", components=wanted, call_kwargs=call, **SAMPLING)
    assert {name: own.bits for name, own in plan.components.items()} == {
        "text_encoder": "w4a8",
        "vae": "w8a8",
    }
    assert len(components.notes(plan)) == 2
    names = (denoiser, "text_encoder", "vae")
    for name in names:
        assert quantized_layers(getattr(pipeline, name)) > 0
    expected = draw(pipeline)
    directory = difloat.save(pipeline, tmp_path / "p", max_shard_bytes=20_000)
    assert all(finding.passed for finding in difloat.verify(directory))
    assert {f.component for f in difloat.verify(directory)} == {"", *names}
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(directory)), expected)
    again = difloat.load(directory)
    assert np.array_equal(draw(again), expected)
    second = difloat.save(again, tmp_path / "q", max_shard_bytes=20_000)
    assert files(second, names) == files(directory, names)
    difloat.restore(again)
    assert not any(quantized_layers(m) for m in again.components.values() if isinstance(m, nn.Module))
    with pytest.raises(ValueError, match="must have a quantized component"):
        checkpoint.save(again, tmp_path / "r")


def test_components_must_be_models_of_the_pipeline_with_its_denoiser() -> None:
    pipeline = tiny_pixart()
    with pytest.raises(ValueError, match="must name the denoiser 'transformer'"):
        difloat.plan(pipeline, components=["text_encoder"])
    with pytest.raises(ValueError, match="must be among text_encoder, vae, transformer, got 'unet'"):
        difloat.plan(pipeline, components=["transformer", "unet"])
    with pytest.raises(ValueError, match="bits must look like"):
        difloat.plan(pipeline, components=["transformer", "vae=8"])
    with pytest.raises(ValueError, match="for pipelines only"):
        difloat.plan(pipeline.transformer, forward_loop=lambda model: None, components=["transformer"])


def test_a_plan_for_another_pipeline_changes_nothing() -> None:
    pipeline = tiny_unet()
    settings = components.parse(pipeline, {"unet": None, "text_encoder": None}, Bits(4, 8))
    plan = components.with_components(difloat.Plan("rtn", "w4a8", {}), pipeline, settings, progress=False)
    other = tiny_pixart()
    with pytest.raises(ValueError, match="plan must fit the model"):
        difloat.apply(other, plan)
    assert not quantized_layers(other.text_encoder)


@pytest.mark.parametrize("outside", ["keep", "8bit"])
def test_a_packed_model_of_diffusers_changes_its_dtype_as_a_float_one(outside: str) -> None:
    vae = tiny_vae().half()
    difloat.apply(
        vae, data_free.plan(vae, data_free.settings({"bits": "w8a8", "outside": outside}), progress=False)
    )
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for cast, dtype in (
        (lambda: vae.to(dtype=torch.float32), torch.float32),  # what StableDiffusionXLPipeline does to decode
        (lambda: vae.to("cpu", torch.float16), torch.float16),
        (vae.float, torch.float32),
        (vae.half, torch.float16),
    ):
        assert cast() is vae and vae.dtype == dtype
        with torch.no_grad():
            picture = vae.decode(latents.to(dtype)).sample
        assert picture.dtype == dtype and bool(picture.isfinite().all())
    after = vae.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())

"""A directory as its configs and headers describe it: the same layers and bytes as the loaded model, and no values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import difloat
from difloat.checkpoint import CheckpointError
from difloat.checkpoint.outline import outline
from difloat.layers import packed
from difloat.pipelines import denoiser_of
from tiny import tiny_pixart, tiny_unet


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", [tiny_unet, tiny_pixart])
def test_a_pipeline_of_floats(make, tmp_path: Path) -> None:
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    found = outline(tmp_path)
    model = denoiser_of(pipeline)[1]
    assert type(found.model) is type(model) and shapes(found.model) == shapes(model)
    assert {tensor.device.type for tensor in found.model.state_dict().values()} == {"meta"}
    assert found.stored_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_half_precision_counts_two_bytes(tmp_path: Path) -> None:
    model = denoiser_of(tiny_pixart())[1].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert outline(tmp_path).stored_bytes == 2 * sum(t.numel() for t in model.state_dict().values())


def test_a_packed_checkpoint(tmp_path: Path) -> None:
    pipeline = difloat.reference("emoji-pixart")
    model = denoiser_of(pipeline)[1]
    plan = {"recipe": "rtn", "bits": "w4a16", "samples": 2, "steps": 2, "progress": False}
    difloat.quantize(pipeline, prompts=["a cat"], **plan)
    difloat.save(pipeline, tmp_path / "out")
    found = outline(tmp_path / "out")
    layers = {n: m.weight_formats() for n, m in model.named_modules() if isinstance(m, packed.QuantizedLayer)}
    assert layers == {
        n: m.weight_formats() for n, m in found.model.named_modules() if isinstance(m, packed.QuantizedLayer)
    }
    assert shapes(found.model) == shapes(model)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        outline(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(
        CheckpointError, match="class of the model must be one of diffusers, got 'NoSuchModel'"
    ):
        outline(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(CheckpointError, match="pipeline must have a denoiser named"):
        outline(tmp_path)

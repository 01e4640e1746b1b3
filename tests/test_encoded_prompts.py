"""Text encoders run first and are let go, and nothing that calibration records changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from difloat import encoded_prompts, job
from difloat.calibration.collect import CalibrationSettings, collect
from difloat.sources import Source, load
from tiny import PROMPTS, tiny_unet

SETTINGS = CalibrationSettings(samples=8, steps=2, prompts_per_batch=2, seed=3)  # two batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("encoded") / "pipeline"
    tiny_unet().save_pretrained(where)
    return where


def rows(pipeline: Any, cache: Path | None = None) -> list[Any]:
    data = collect(pipeline, PROMPTS, SETTINGS, cache_dir=cache, progress=False)
    return [(row.timestep, row.part, row.leaves) for row in data._rows]


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def fitted(pipeline: Any) -> job.Job:
    return job.fit(pipeline, job.request("auto", "w4a8", {}, SETTINGS))


def test_rows_are_the_same_and_encoders_are_empty_meanwhile(folder: Path, tmp_path: Path) -> None:
    expected = rows(load(Source(str(folder))), tmp_path / "cache")
    pipeline = load(Source(str(folder)))
    before = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    whole = bytes_of(pipeline.text_encoder)
    job_ = fitted(pipeline)
    calls: list[int] = []
    with encoded_prompts.freed(job_, Source(str(folder)), PROMPTS, {}):
        assert bytes_of(pipeline.text_encoder) < 0.01 * whole
        handle = pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        assert rows(pipeline) == expected and not calls
        # The folder of the cache is that of the whole pipeline.
        asked = [path.name for path in (tmp_path / "cache").iterdir()]
        assert rows(pipeline, tmp_path / "cache") == expected
        assert [path.name for path in (tmp_path / "cache").iterdir()] == asked
        handle.remove()
    assert "encode_prompt" not in vars(pipeline)
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_encoder_that_is_called_all_the_same_comes_back(folder: Path) -> None:
    pipeline, other = load(Source(str(folder))), load(Source(str(folder)))
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    expected = other.encode_prompt("a prompt that nobody planned", **arguments)
    with encoded_prompts.freed(fitted(pipeline), Source(str(folder)), PROMPTS, {}):
        given = pipeline.encode_prompt("a prompt that nobody planned", **arguments)
    assert all(torch.equal(one, two) for one, two in zip(given, expected, strict=True))
    ids = torch.tensor([[1, 2, 3]])
    with encoded_prompts.freed(fitted(pipeline), Source(str(folder)), PROMPTS, {}):
        assert torch.equal(pipeline.text_encoder(ids)[0], other.text_encoder(ids)[0])


def test_a_pipeline_of_the_user_and_encoders_to_quantize_stay(folder: Path) -> None:
    pipeline = load(Source(str(folder)))
    whole = bytes_of(pipeline.text_encoder)
    asked = job.request("auto", "w4a8", {}, SETTINGS, components="unet,text_encoder")
    with encoded_prompts.freed(job.fit(pipeline, asked), Source(str(folder)), PROMPTS, {}):
        assert bytes_of(pipeline.text_encoder) == whole
    with encoded_prompts.freed(fitted(pipeline), Source("emoji-unet"), PROMPTS, {}):
        assert bytes_of(pipeline.text_encoder) == whole

"""The embedded reference models: they load, repeat themselves, survive a save, and draw what they are asked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difloat import reference_models
from difloat.evaluation import emoji_features


def draw(name: str, pipeline: Any, prompts: list[str], steps: int, seed: int = 0) -> np.ndarray:
    """Samples prompts with a seeded generator: pictures [n, 64, 64, 3] in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **reference_models.call_arguments(name),
    ).images


@pytest.fixture(scope="module", params=reference_models.NAMES)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A name and its pipeline."""
    return request.param, reference_models.load(request.param)


def test_samples_have_size_and_range_and_repeat(named: tuple[str, Any]) -> None:
    name, pipeline = named
    prompts = reference_models.captions()[:2]
    pictures = draw(name, pipeline, prompts, steps=2)
    assert pictures.shape == (2, 64, 64, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1 and np.isfinite(pictures).all()
    assert np.array_equal(pictures, draw(name, pipeline, prompts, steps=2))
    assert not np.array_equal(pictures, draw(name, pipeline, prompts, steps=2, seed=1))


def test_weights_are_float32_and_small(named: tuple[str, Any]) -> None:
    _, pipeline = named
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 3
    assert all(parameter.dtype == torch.float32 for module in modules for parameter in module.parameters())
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) < 7e6


def test_save_and_load_give_the_same_pictures(named: tuple[str, Any], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    name, pipeline = named
    prompts = reference_models.captions()[:1]
    pipeline.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipeline)
    assert np.array_equal(draw(name, pipeline, prompts, steps=2), draw(name, again, prompts, steps=2))


def test_both_pipelines_embed_a_prompt_alike() -> None:
    unet, pixart = (reference_models.load(name) for name in reference_models.NAMES)
    prompt = reference_models.captions()[:3]
    plain = unet.encode_prompt(prompt, "cpu", 1, True)
    masked = pixart.encode_prompt(prompt, max_sequence_length=12)
    assert torch.equal(plain[0], masked[0])
    assert torch.equal(plain[1], masked[2])


def test_prompt_length_does_not_change_what_pixart_draws() -> None:
    pipeline = reference_models.load("emoji-pixart")
    pipeline.set_progress_bar_config(disable=True)
    arguments = reference_models.call_arguments("emoji-pixart") | {
        "num_inference_steps": 2,
        "output_type": "np",
    }
    short, long = (
        pipeline(
            "red apple",
            generator=torch.Generator().manual_seed(0),
            **(arguments | {"max_sequence_length": n}),
        )
        for n in (12, 120)
    )
    # Padding is masked; only the order of summation differs.
    assert np.abs(short.images - long.images).max() < 1e-3


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"emoji-unet, emoji-pixart, got 'emoji-flux'"):
        reference_models.load("emoji-flux")


def test_captions_are_words_the_tokenizer_knows() -> None:
    tokenizer = reference_models.load("emoji-unet").tokenizer
    names = reference_models.captions()
    assert 300 <= len(names) == len(set(names))
    tokens = tokenizer(names, padding="max_length", truncation=True)
    assert all(tokenizer.unk_token_id not in row for row in tokens.input_ids)
    assert all(tokenizer.eos_token_id in row for row in tokens.input_ids)


def test_features_take_any_size_and_feature_maps_have_unit_length() -> None:
    pictures = torch.rand(3, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    assert emoji_features.features(pictures).shape == (3, 128)
    for level in emoji_features.feature_maps(pictures):
        assert torch.allclose(level.norm(dim=1), torch.ones(()), atol=1e-4)
    mean, covariance = emoji_features.data_statistics()
    assert mean.shape == (128,) and covariance.shape == (128, 128)
    assert np.allclose(covariance, covariance.T, atol=1e-5)
    with pytest.raises(ValueError, match="images must have shape"):
        emoji_features.features(torch.rand(3, 64, 64))


def test_retrieval_depends_on_the_caption() -> None:
    names = reference_models.captions()
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert emoji_features.retrieval_accuracy(noise, names[:20]) < 0.5
    with pytest.raises(ValueError, match="one per picture"):
        emoji_features.retrieval_accuracy(noise, names[:3])


@pytest.mark.slow
def test_pictures_follow_their_prompts(named: tuple[str, Any]) -> None:
    name, pipeline = named
    prompts = reference_models.captions()[::7]
    pictures = draw(name, pipeline, prompts, steps=20)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert emoji_features.retrieval_accuracy(images, prompts) >= 0.6

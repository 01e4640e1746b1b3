"""What a pipeline's call is completed with, on calls that take what the families' calls take."""

from __future__ import annotations

import pytest
from torch import nn

from difloat import pipelines


class Denoiser(nn.Module):
    def __init__(self, **config: int | None) -> None:
        super().__init__()
        self.config = config


class TextPipeline:
    """PixArt's arguments: the size defaults to the model's own."""

    def __call__(
        self,
        prompt,
        negative_prompt="",
        height=None,
        width=None,
        clean_caption=True,
        use_resolution_binning=True,
    ):
        return None


class FixedSizePipeline:
    """Sana's: the size defaults to a number, which binning turns into the model's."""

    def __call__(self, prompt, height=1024, width=1024, use_resolution_binning=True):
        return None


class ClassPipeline:
    """DiT's: classes are a must."""

    def __call__(self, class_labels, guidance_scale=4.0):
        return None


class PixelPipeline:
    """A consistency model's: classes where the U-Net has some; the number of pictures besides."""

    def __call__(self, batch_size=1, class_labels=None, **kwargs):
        return None


def test_binning_is_off_only_where_the_size_is_the_models_own() -> None:
    off = {"clean_caption": False, "use_resolution_binning": False}
    assert pipelines.completed(TextPipeline(), {"eta": 1}) == {"eta": 1, **off}
    assert pipelines.completed(TextPipeline(), {"height": 64}) == {"height": 64, "clean_caption": False}
    mine = {"clean_caption": True, "use_resolution_binning": True}
    assert pipelines.completed(TextPipeline(), mine) == mine
    assert pipelines.completed(FixedSizePipeline(), {}) == {}


def test_what_is_shown_follows_from_signature_and_config() -> None:
    ten, none = Denoiser(num_class_embeds=10), Denoiser(num_class_embeds=None)
    assert pipelines.condition_of(TextPipeline(), none) == "prompt"
    assert pipelines.condition_of(ClassPipeline(), none) == "class_labels"
    assert pipelines.condition_of(PixelPipeline(), ten) == "class_labels"
    assert pipelines.condition_of(PixelPipeline(), none) is None
    assert pipelines.takes(PixelPipeline(), "anything") and not pipelines.takes(ClassPipeline(), "prompt")


def test_a_class_depends_on_its_seed_alone() -> None:
    model = Denoiser(num_embeds_ada_norm=1000)
    drawn = pipelines.draw_classes(model, range(50))
    assert len(set(drawn)) > 40 and min(drawn) >= 0 and max(drawn) < 1000
    assert pipelines.draw_classes(model, [7, 3]) == [drawn[7], drawn[3]]
    with pytest.raises(ValueError, match="number of classes in its config .* got neither; give class_labels"):
        pipelines.draw_classes(Denoiser(), [0])


def test_a_text_beside_the_prompt_is_repeated_for_every_picture() -> None:
    given = {
        "negative_prompt": "",
        "prompt_2": "a",
        "negative_prompt_2": ["b", "c"],
        "prompt": "d",
        "output_type": "np",
    }
    assert pipelines.for_pictures(FixedSizePipeline(), given, {}, 2) == {
        "negative_prompt": ["", ""],
        "prompt_2": ["a", "a"],
        "negative_prompt_2": ["b", "c"],
        "prompt": "d",
        "output_type": "np",
    }

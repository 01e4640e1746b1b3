"""Two denoisers of one trajectory, videos, sounds and embeddings, and pictures as inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import difloat
from class_table import TABLE, arguments, build
from difloat import evaluation, pipelines
from difloat.calibration.collect import CalibrationSettings, collect, collect_from_loop, sampling_of
from difloat.evaluation.generation import Generated
from difloat.evaluation.outputs import outputs_of
from difloat.evaluation.picture_metrics import NotFiniteError, signal_to_noise
from difloat.layers.packed import QuantizedLayer
from difloat.report import build as report
from families import seeded
from test_class_sweep import classes
from tiny import PROMPTS, tiny_t5, tiny_tokenizer, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}
SIZES: dict[str, Any] = {"samples": 8, "steps": 4, "prompts_per_batch": 2, "progress": False}


def wan() -> Any:
    """Wan 2.2: a denoiser for timesteps of noise and one for the others, over a tiny causal video autoencoder."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    def denoiser() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()

    def autoencoder() -> Any:
        return AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()

    tokenizer = tiny_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(lambda: tiny_t5(tokenizer)),
        vae=seeded(autoencoder),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=seeded(denoiser),
        transformer_2=seeded(lambda: (denoiser(), denoiser())[1]),
        boundary_ratio=0.8,
    )


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(layer, QuantizedLayer) for layer in module.modules())


def draw(pipeline: Any, **more: Any) -> Generated:
    return evaluation.generate(
        pipeline, PROMPTS[:2], seeds=[4, 5], steps=4, progress=False, call_kwargs=CALL, **more
    )


def test_two_denoisers_are_calibrated_each_at_its_own_timesteps() -> None:
    pipeline = wan()
    settings = CalibrationSettings(samples=8, steps=4, prompts_per_batch=2)
    rows = {
        name: collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=CALL, component=name)
        for name in ("transformer", "transformer_2")
    }
    first, second = (set(found.timesteps) for found in rows.values())
    assert min(first) >= 800 > max(second)
    assert first | second == {float(timestep) for timestep in pipeline.scheduler.timesteps}
    assert all(len(found) == 8 for found in rows.values())
    requests = [sampling_of(pipeline, PROMPTS, settings, CALL, name).request() for name in (None, *rows)]
    assert requests[0] == requests[1] != requests[2]


def test_two_denoisers_are_quantized_saved_and_loaded(tmp_path) -> None:
    pipeline = wan()
    before = draw(pipeline)
    plan = difloat.quantize(
        pipeline, "lbfp", "w4a8", rounding="nearest", prompts=PROMPTS, call_kwargs=CALL, **SIZES
    )
    assert list(plan.components) == ["transformer_2"] and plan.components["transformer_2"].recipe == "lbfp"
    counts = [packed(pipeline.transformer), packed(pipeline.transformer_2)]
    assert counts == [len(plan.layers), len(plan.components["transformer_2"].layers)] and min(counts) > 0
    drawn = draw(pipeline)
    assert drawn.frames == 5 and drawn.images.shape == (10, 3, 16, 16) and len(drawn) == 2
    assert not torch.equal(before.images, drawn.images)
    difloat.save(pipeline, tmp_path / "saved")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "saved"))
    assert torch.equal(draw(difloat.load(tmp_path / "saved")).images, drawn.images)


@pytest.mark.parametrize(
    "chosen, widths",
    [(["transformer"], {}), (["transformer", "transformer_2"], {"transformer_2": "w4a8"}),
     (["transformer", "transformer_2=w8a8"], {"transformer_2": "w8a8"})],
)  # fmt: skip
def test_components_choose_denoisers(chosen: list[str], widths: dict[str, str]) -> None:
    plan = difloat.plan(wan(), "rtn", "w4a8", components=chosen, prompts=PROMPTS, call_kwargs=CALL, **SIZES)
    assert {name: own.bits for name, own in plan.components.items()} == widths
    assert {own.recipe for own in plan.components.values()} <= {"rtn"}


def test_frames_are_judged_per_video_and_shown_in_a_report() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3 * 9, 3, 16, 16, generator=generator)
    noisy = (clean + 0.1).clamp(0, 1)
    left, right = (Generated(images, None, [1.0], 0.0, frames=9) for images in (clean, noisy))
    found = evaluation.compare(left, right, features=lambda x: x.flatten(1), feature_maps=lambda x: [x])
    expected = evaluation.picture_metrics.psnr(clean, noisy).unflatten(0, (3, 9)).mean(1)
    assert found.samples == 3 and found.metrics["psnr"].value == pytest.approx(
        float(expected.mean()), rel=1e-5
    )
    assert "frechet_to_full_precision" not in found.metrics and "signal_to_noise" not in found.metrics
    pictures, chosen = report.shown(left, 8)
    assert [one.sample for one in chosen] == [0] * 4 + [1] * 4
    assert [one.label for one in chosen[:4]] == [f", frame {n} of 9" for n in (1, 4, 6, 9)]
    assert np.array_equal(pictures[3], report.to_uint8(clean)[8])


def test_waveforms_have_a_signal_to_noise_ratio_and_no_pictures() -> None:
    wave = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(0))
    found = outputs_of(SimpleNamespace(audios=wave.numpy()), [1, 2])
    assert not len(found.images) and torch.equal(found.signal, wave)
    left, right = (Generated(found.images, None, [], 0.0, 1, signal) for signal in (wave, 0.9 * wave))
    measured = evaluation.compare(left, right, features=lambda x: x, feature_maps=lambda x: [x])
    assert list(measured.metrics) == ["signal_to_noise"] and measured.samples == 2
    assert measured.metrics["signal_to_noise"].value == pytest.approx(20.0, abs=1e-3)
    assert signal_to_noise(wave, wave).tolist() == [100.0, 100.0]
    assert report.shown(left, 4)[1] == []
    with pytest.raises(NotFiniteError, match=r"seeds \[2\]"):
        outputs_of(SimpleNamespace(audios=torch.stack([wave[0], wave[0] * float("nan")])), [1, 2])
    with pytest.raises(ValueError, match="must give one of images, frames"):
        outputs_of(SimpleNamespace(logits=wave), [1, 2])


def test_a_picture_as_input_goes_with_every_sample_and_into_the_cache_key() -> None:
    pipeline = StableDiffusionImg2ImgPipeline(**tiny_unet().components, requires_safety_checker=False)
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    call = {"image": Image.fromarray(noise), "strength": 1.0, "negative_prompt": "a dog"}
    plan = difloat.quantize(pipeline, "lbfp", rounding="nearest", prompts=PROMPTS, call_kwargs=call, **SIZES)
    assert plan.layers and packed(pipeline.unet) == len(plan.layers)
    options: dict[str, Any] = {"seeds": [1, 2], "steps": 4, "progress": False, "trajectory": True}
    drawn = evaluation.generate(pipeline, PROMPTS[:2], call_kwargs=call, **options)
    alone = evaluation.generate(pipeline, PROMPTS[1:2], **{**options, "seeds": [2]}, call_kwargs=call)
    assert drawn.latents.shape[1] == 2 and torch.equal(drawn.images[1], alone.images[0])
    settings = CalibrationSettings(samples=8, steps=4)
    requests = [
        sampling_of(pipeline, PROMPTS, settings, {"image": Image.fromarray(picture)}).request()
        for picture in (noise, noise.copy(), 255 - noise)
    ]
    assert requests[0] == requests[1] != requests[2]


def test_inputs_are_pictures_or_a_sentence(tmp_path) -> None:
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    Image.new("RGBA", (4, 3)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    found = pipelines.inputs_of(
        [
            f"image={tmp_path}/a.png",
            f"mask_image={tmp_path}/a.png",
            f"ref={tmp_path}/a.png",
            f"ref={tmp_path}/b.png",
        ]
    )
    assert found["image"].mode == "RGB" and found["image"].size == (4, 3) and found["mask_image"].mode == "L"
    assert [picture.mode for picture in found["ref"]] == ["RGB", "RGBA"] and pipelines.inputs_of([]) == {}
    for pair in ("image", "image=", "=a.png"):
        with pytest.raises(ValueError, match="an input must be name=FILE"):
            pipelines.inputs_of([pair])
    with pytest.raises(FileNotFoundError, match="check the path"):
        pipelines.inputs_of([f"image={tmp_path}/none.png"])
    with pytest.raises(ValueError, match="does not open as one"):
        pipelines.inputs_of([f"image={tmp_path}/c.png"])


def rows_of_class(name: str) -> Any:
    """Six rows of a class of diffusers' denoisers, called three times."""
    model, call = seeded(
        lambda: (build(classes()[name], TABLE[name]), arguments(classes()[name], TABLE[name]))
    )
    key = next((key for key in ("timestep", "timesteps") if key in call), None)

    def loop(module: Any) -> None:
        for factor in (1.0, 0.6, 0.2):
            module(**call, **{}) if key is None else module(**{**call, key: call[key] * factor})

    return collect_from_loop(model, loop, CalibrationSettings(samples=6), progress=False)


@pytest.mark.parametrize(
    "name", ["HiDreamImageTransformer2DModel", "HunyuanVideoFramepackTransformer3DModel", "UNetMotionModel"]
)
def test_unusual_batch_axes_are_cut_and_merged(name: str) -> None:
    assert len(rows_of_class(name)) == 6


@pytest.mark.parametrize("name", ["SparseControlNetModel", "TransformerTemporalModel", "UTransformer2DModel"])
def test_what_returns_no_result_per_row_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="a denoiser must return one result per row"):
        rows_of_class(name)

"""Every family through its stock pipeline: quantize, save, load, sample; what is captured; what is found in the model."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    PixArtTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

import difloat
import families
from difloat import evaluate
from difloat.calibration.collect import Calibration, CalibrationSettings, collect, denoiser_of
from difloat.calibration.rows import first_tensor
from difloat.evaluation.comparison import Generated
from difloat.layers import dtype_readers, packed, quantizable
from difloat.layers.packed import QuantConv2d
from difloat.methods import trace
from difloat.methods.training import relation_loss
from difloat.plan.plan import Plan
from family_table import FAMILIES, Family
from tiny import PROMPTS, tiny_unet

# diffusers hands torch tensors to numpy 2 in its schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZES = {"samples": 12, "steps": 2, "prompts_per_batch": 3}
# A new recipe is one row more; every family then runs it.
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"recipe": "rtn", "activation": "online"},
    "lbfp": {"recipe": "lbfp", "rounding": "nearest"},
    "fp4dit": {"recipe": "fp4dit", "rounding": "nearest", "softmax": "8"},
    "mpqdm": {"recipe": "mpqdm", "epochs": 1, "rows": 2, "rank": 2, "relation_every": 1},
}
SLOW = {
    "lbfp",
    "mpqdm",
}  # 5 to 30 seconds on some families; `test_contracts` runs them on a U-Net and a transformer
FLUX_SIZE = FAMILIES["flux"].call


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def texts(family: Family) -> list[str] | None:
    return PROMPTS if family.conditions and isinstance(family.conditions[0], str) else None


def draw(pipeline: Any, family: Family, **more: Any) -> Generated:
    options = {"seeds": [4, 5], "steps": 2, "trajectory": True, "progress": False, **more}
    return evaluate.generate(
        pipeline, family.conditions, guidance_scale=family.guidance, call_kwargs=family.call, **options
    )


def quantize(pipeline: Any, family: Family, **options: Any) -> Plan:
    options = {
        "prompts": texts(family),
        "guidance_scale": family.guidance,
        "progress": False,
        **SIZES,
        **options,
    }
    return difloat.quantize(pipeline, bits="w4a8", call_kwargs=family.call, **options)


@functools.cache
def calibrated(name: str) -> tuple[Any, Calibration, list[tuple[Any, dict[str, Any], Tensor]]]:
    """The float pipeline, its calibration rows, and every call that the sampler made, with its result."""
    family = FAMILIES[name]
    pipeline, calls = family.build(), []

    def watch(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, first_tensor(output).clone()))

    handle = denoiser_of(pipeline)[1].register_forward_hook(watch, with_kwargs=True)
    settings = CalibrationSettings(**SIZES, guidance_scale=family.guidance)
    rows = collect(pipeline, texts(family), settings, progress=False, call_kwargs=family.call)
    handle.remove()
    return pipeline, rows, calls[:-3]  # the last three prove that rows can be merged


def shown(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Noisy sample and condition of every row of a call; without a condition the sample again."""
    sample = args[0] if args else kwargs["hidden_states"]
    condition = next(
        (
            value
            for key in ("encoder_hidden_states", "class_labels")
            if (value := kwargs.get(key)) is not None
        ),
        sample,
    )
    return sample, condition


def content(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def test_rows_are_what_the_sampler_called_with_at_every_timestep(name: str) -> None:
    pipeline, rows, calls = calibrated(name)
    expected = {
        (content(sample), content(condition)): result
        for args, kwargs, results in calls
        for sample, condition, result in zip(*shown(args, kwargs), results, strict=True)
    }
    args, kwargs = rows.batch(range(len(rows)))
    with torch.no_grad():
        merged = first_tensor(denoiser_of(pipeline)[1](*args, **kwargs))
    assert len(rows) == 12
    for sample, condition, result in zip(*shown(args, kwargs), merged, strict=True):
        torch.testing.assert_close(
            result, expected[content(sample), content(condition)], rtol=1e-4, atol=1e-5
        )
    steps = {float(step) * FAMILIES[name].unit for step in pipeline.scheduler.timesteps}
    assert sorted(set(rows.timesteps)) == pytest.approx(sorted(steps))
    assert set(Counter(rows.timesteps).values()) == {6}


def test_conditional_and_unconditional_rows_are_told_apart(name: str) -> None:
    family, (_, rows, _) = FAMILIES[name], calibrated(name)
    _, condition = shown(*rows.batch(range(len(rows))))
    seen: dict[int, set[bytes]] = {}
    for row, value in zip(rows._rows, condition, strict=True):
        seen.setdefault(row.part, set()).add(content(value))
    if family.unconditional is None:
        assert set(seen) == {0} and rows.conditional_part is None
        return
    assert rows.conditional_part == 1 - family.unconditional
    assert rows.describe()["parts"] == {0: 6, 1: 6}
    without, with_ = seen[family.unconditional], seen[1 - family.unconditional]
    assert len(without) == 1 < len(with_) and not without & with_


def test_blocks_edges_and_concatenations_are_found(name: str) -> None:
    family, (pipeline, rows, _) = FAMILIES[name], calibrated(name)
    model = denoiser_of(pipeline)[1]
    units = packed.blocks(model)
    assert {unit for unit, members in units.items() if members != [unit]} == family.blocks
    assert {unit for unit, members in units.items() if members == [unit]} == family.outside - family.uncalled
    seen = trace.trace(model, rows.batch([0, 1]))
    assert (
        set(packed.quantizable(model)) == set(seen.order)
        and dtype_readers.kept(model).keys() == family.uncalled
    )
    assert (seen.first, seen.last, seen.splits) == ([family.first], family.last, family.splits)


def test_the_last_block_and_its_positions_are_found(name: str) -> None:
    pipeline, rows, _ = calibrated(name)
    model, call = denoiser_of(pipeline)[1], rows.batch([0, 1])
    found = relation_loss.feature_block(model, call)
    stacks = ("up_blocks", "single_transformer_blocks", "transformer_blocks", "blocks")
    stack = next(stack for stack in stacks if len(getattr(model, stack, ())))
    assert found == f"{stack}.{len(getattr(model, stack)) - 1}"
    seen: list[Tensor] = []
    handle = model.get_submodule(found).register_forward_hook(
        lambda m, i, output: seen.append(relation_loss.positions(output))
    )
    model(*call[0], **call[1])
    handle.remove()
    assert seen[0].dim() == 3 and len(seen[0]) == 2 and seen[0].shape[1] > 1


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RECIPES]
)
def test_quantized_pipelines_sample_the_same_after_loading(name: str, recipe: str, tmp_path) -> None:
    family = FAMILIES[name]
    pipeline = family.build()
    before, found = draw(pipeline, family), packed.quantizable(denoiser_of(pipeline)[1])
    plan = quantize(pipeline, family, **RECIPES[recipe])
    # A recipe may leave out what is outside of blocks, but says so; what is read without a call cannot be quantized.
    never = quantizable.staying_float(denoiser_of(pipeline)[1]).keys() - family.uncalled
    skipped = plan.skipped.keys() - never
    assert plan.layers.keys() == found.keys() - skipped
    assert family.uncalled <= skipped <= family.outside
    assert packed.quantizable(denoiser_of(pipeline)[1]).keys() == skipped - family.uncalled
    after = draw(pipeline, family)
    difloat.save(pipeline, tmp_path / "saved")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "saved"))
    loaded = draw(difloat.load(tmp_path / "saved"), family)
    assert torch.equal(after.images, loaded.images) and torch.equal(after.latents, loaded.latents)
    assert after.timesteps == before.timesteps
    # Random weights amplify errors; 4-bit weights still leave most of what the sampler does.
    error = float((after.latents[-1] - before.latents[-1]).norm() / before.latents[-1].norm())
    assert 1e-4 < error < 0.5


def test_pictures_do_not_depend_on_the_batch_and_states_count_one_per_picture(name: str) -> None:
    family, (pipeline, _, _) = FAMILIES[name], calibrated(name)
    together, apart = draw(pipeline, family), draw(pipeline, family, batch_size=1)
    assert together.latents.shape == apart.latents.shape
    assert together.latents.shape[:2] == (len(together.timesteps), 2)
    torch.testing.assert_close(together.images, apart.images, rtol=1e-3, atol=1e-3)
    assert not torch.equal(together.images[0], together.images[1])


@pytest.mark.slow
def test_rounding_is_learned_in_every_block(name: str) -> None:
    family = FAMILIES[name]
    plan = quantize(family.build(), family, recipe="lbfp", iterations=8, rounding_rows=12)
    blocks = plan.measured["blocks"]
    kept = {family.first, family.last} | family.uncalled
    assert set(blocks) == (family.blocks | family.outside) - kept
    assert all(block["learned"] <= block["nearest"] for block in blocks.values())


@pytest.mark.slow
def test_half_precision_pipelines_come_back_as_they_were(name: str, tmp_path) -> None:
    family = FAMILIES[name]
    if not family.bfloat16:
        pytest.skip("the stock pipeline samples in float32 only")
    family.build().save_pretrained(tmp_path / "float")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize(pipeline, family, recipe="rtn", activation="online")
    difloat.save(pipeline, tmp_path / "saved")
    loaded = difloat.load(tmp_path / "saved")
    assert denoiser_of(loaded)[1].dtype == torch.bfloat16
    assert torch.equal(draw(pipeline, family).images, draw(loaded, family).images)


def test_guidance_by_two_calls_gives_both_kinds_of_rows() -> None:
    pipeline = families.flux()
    settings = CalibrationSettings(**SIZES)
    call = {**FLUX_SIZE, "true_cfg_scale": 2.0, "negative_prompt": ""}
    rows = collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=call)
    _, kwargs = rows.batch(range(12))
    assert rows.describe()["parts"] == {0: 6, 1: 6}
    kinds = {
        part: {
            content(text)
            for row, text in zip(rows._rows, kwargs["pooled_projections"], strict=True)
            if row.part == part
        }
        for part in (0, 1)
    }
    assert len(kinds[1]) == 1 < len(kinds[0]) and not kinds[0] & kinds[1]
    plain = collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=FLUX_SIZE)
    assert rows.pace.picture_rows == 2 * plain.pace.picture_rows == 2 * settings.steps
    drawn = [
        evaluate.generate(
            pipeline, PROMPTS, seeds=[1, 2, 3], steps=2, batch_size=2, progress=False, call_kwargs=kw
        )
        for kw in (FLUX_SIZE, call)
    ]
    assert not torch.equal(drawn[0].images, drawn[1].images)


def test_a_distilled_guidance_embedding_is_part_of_the_row() -> None:
    _, flux, _ = calibrated("flux")
    assert set(flux.batch(range(12))[1]["guidance"].tolist()) == {3.5}
    pipeline = tiny_unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8).eval()
    settings = CalibrationSettings(**SIZES, guidance_scale=6.0)
    rows = collect(pipeline, PROMPTS, settings, progress=False)
    assert rows.batch(range(12))[1]["timestep_cond"].shape == (12, 8)
    assert rows.describe()["parts"] == {0: 12} and set(rows.timesteps) == {501.0, 1.0}


def test_size_conditions_are_no_skip_concatenation() -> None:
    config = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
    model = PixArtTransformer2DModel.from_config(
        calibrated("pixart-alpha")[0].transformer.config, **config
    ).eval()
    sizes = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    call = {
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "timestep": torch.tensor([1, 2]),
        "added_cond_kwargs": sizes,
    }
    seen = trace.trace(model, ((torch.randn(2, 4, 8, 8),), call))
    assert "adaln_single.emb.resolution_embedder.linear_1" in seen.order and not seen.splits


def test_a_sampler_may_be_given_one_timestep_per_picture() -> None:
    parts = families.sana().components
    config = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    parts["transformer"] = SanaTransformer2DModel.from_config(parts["transformer"].config, **config).eval()
    pipeline = SanaSprintPipeline(**{**parts, "scheduler": SCMScheduler()})
    call = FAMILIES["sana"].call
    rows = collect(pipeline, PROMPTS, CalibrationSettings(**SIZES), progress=False, call_kwargs=call)
    assert rows.describe()["parts"] == {0: 12} and rows.batch([0, 11])[1]["guidance"].shape == (2,)
    drawn = draw(pipeline, FAMILIES["sana"])
    assert drawn.timesteps == pytest.approx(pipeline.scheduler.timesteps[:2].tolist())


def test_a_depthwise_convolution_is_quantized_over_all_its_channels() -> None:
    family, pipeline = FAMILIES["sana"], families.sana()
    quantize(pipeline, family, recipe="lbfp", rounding="nearest")
    layer = pipeline.transformer.transformer_blocks[0].ff.conv_depth
    assert isinstance(layer, QuantConv2d) and layer.groups == layer.in_channels == 80
    assert [part.channels for part in layer.parts] == [1] and layer.input_scale.shape == (1,)


def test_classes_are_drawn_with_each_pictures_seed() -> None:
    family = FAMILIES["dit"]
    pipeline, rows, _ = calibrated("dit")
    classes = set(rows.batch(range(12))[1]["class_labels"].tolist())
    assert 1000 in classes and len(classes) > 3 and max(classes - {1000}) < 1000
    drawn = evaluate.generate(pipeline, None, seeds=[7, 8], steps=2, progress=False)
    again = evaluate.generate(pipeline, None, seeds=[7, 8], steps=2, batch_size=1, progress=False)
    given = draw(pipeline, family, seeds=[7, 8], trajectory=False)
    torch.testing.assert_close(drawn.images, again.images, rtol=1e-3, atol=1e-3)
    assert not torch.equal(drawn.images, given.images)


def test_what_a_family_cannot_do_is_refused_in_a_sentence() -> None:
    skipping = {**SIZES, "steps": 4, "samples": 24}
    call = {**FAMILIES["sd3"].call, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    with pytest.raises(ValueError, match=r"must agree .* different values or structure of \['skip_layers'\]"):
        difloat.plan(
            families.sd3(),
            "rtn",
            activation="static",
            prompts=PROMPTS,
            progress=False,
            call_kwargs=call,
            **skipping,
        )
    with pytest.raises(ValueError, match="DiTPipeline must be given no prompts"):
        difloat.plan(families.dit(), "rtn", activation="static", prompts=PROMPTS, progress=False, **SIZES)
    with pytest.raises(ValueError, match="'guidance_scale' must be None for LDMPipeline"):
        difloat.plan(families.ldm(), "rtn", activation="static", guidance_scale=2.0, progress=False, **SIZES)
    with pytest.raises(ValueError, match="prompts of LDMPipeline must be None"):
        evaluate.generate(families.ldm(), PROMPTS, seeds=[1], steps=1, progress=False)

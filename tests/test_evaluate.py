"""The judge: closed forms for every metric, seeds that fix pictures, gates that speak."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from difloat import evaluate
from difloat.evaluation import picture_metrics, set_distances
from difloat.evaluation.comparison import Evaluation, Generated
from difloat.evaluation.picture_metrics import Estimate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=generator(seed))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 5, stride=3).eval()


def features_of(net: nn.Module):
    return lambda images: net(images).relu().mean((2, 3))


def maps_of(net: nn.Module):
    return lambda images: [nn.functional.normalize(net(images), dim=1)]


# --- paired metrics


def test_psnr_of_known_offset_and_cap():
    reference = pictures() * 0.5
    offset = torch.tensor([0.1, 0.2, 0.3, 0.01, 0.05, 0.0]).reshape(6, 1, 1, 1)
    expected = [-20 * math.log10(x) if x else picture_metrics.PSNR_CAP_DB for x in offset.flatten().tolist()]
    assert picture_metrics.psnr(reference, reference + offset).tolist() == pytest.approx(expected, rel=1e-4)


def test_ssim_of_constant_pictures_is_the_luminance_term():
    bright, dark = torch.full((2, 3, 16, 16), 0.8), torch.full((2, 3, 16, 16), 0.4)
    c1 = 0.01**2
    expected = (2 * 0.8 * 0.4 + c1) / (0.8**2 + 0.4**2 + c1)
    # Variances of constant pictures cancel to float32 rounding (1e-7), against c2 = 9e-4.
    assert picture_metrics.ssim(bright, dark).tolist() == pytest.approx([expected] * 2, rel=1e-3)
    assert picture_metrics.ssim(pictures(), pictures()).tolist() == pytest.approx([1.0] * 6)
    assert picture_metrics.ssim(pictures(1), pictures(1, seed=1)).shape == (1,)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        picture_metrics.ssim(pictures(side=10), pictures(side=10))


def test_perceptual_is_zero_for_equal_and_four_for_opposite_maps(net):
    assert picture_metrics.perceptual(pictures(), pictures(), maps_of(net)).tolist() == [0.0] * 6
    signs = lambda images: [images.sign(), -images.sign()]  # noqa: E731
    one_channel = torch.ones(3, 1, 4, 4)
    assert picture_metrics.perceptual(one_channel, -one_channel, signs).tolist() == [4.0] * 3


def test_paired_metrics_refuse_different_shapes():
    with pytest.raises(ValueError, match="of one shape"):
        picture_metrics.psnr(pictures(3), pictures(4))


def test_batches_do_not_change_a_metric(monkeypatch, net):
    whole = picture_metrics.perceptual(pictures(), pictures(seed=1), maps_of(net))
    monkeypatch.setattr(picture_metrics, "_BATCH", 4)
    assert torch.allclose(picture_metrics.perceptual(pictures(), pictures(seed=1), maps_of(net)), whole)


# --- intervals


def test_mean_interval_has_the_width_of_the_standard_error():
    values = torch.randn(400, generator=generator())
    estimate = picture_metrics.mean_interval(values, seed=1)
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.15)
    assert picture_metrics.mean_interval(values, seed=1) == estimate
    assert picture_metrics.mean_interval(torch.ones(1)) == Estimate(1.0, 1.0, 1.0)


def test_mean_interval_covers_the_truth_at_its_rate():
    draws = torch.rand(120, 60, generator=generator())
    estimates = [picture_metrics.mean_interval(row, resamples=100, seed=i) for i, row in enumerate(draws)]
    covered = sum(e.low <= 0.5 <= e.high for e in estimates) / 120
    assert 0.88 <= covered <= 0.99  # 95 % with a binomial error of 2 %, less the known 1 % of small samples


# --- Fréchet distance


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    a, b = torch.rand(40, generator=generator(1)) + 0.1, torch.rand(40, generator=generator(2))
    b[:5] = 0.0  # a singular covariance is no special case
    mean = torch.randn(40, generator=generator(3))
    expected = mean.double().square().sum() + (a.double().sqrt() - b.double().sqrt()).square().sum()
    value = set_distances.frechet_from_moments(mean, a.diag(), torch.zeros(40), b.diag())
    assert value == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_of_commuting_full_covariances_is_the_closed_form():
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator(), dtype=torch.float64)).Q
    a, b = (torch.rand(12, generator=generator(i), dtype=torch.float64) + 0.1 for i in (1, 2))
    covs = [rotation * x @ rotation.T for x in (a, b)]
    zero = torch.zeros(12)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert set_distances.frechet_from_moments(zero, covs[0], zero, covs[1]) == pytest.approx(
        expected, rel=1e-11
    )


def test_frechet_of_two_by_two_covariances_is_the_closed_form():
    # For 2x2 matrices tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB))): not commuting, unlike the cases above.
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)
    cross = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.linalg.det(a @ b)))
    expected = (a.trace() + b.trace()).item() - 2 * cross
    zero = torch.zeros(2)
    assert set_distances.frechet_from_moments(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_is_symmetric_and_zero_for_equal_sets():
    x, y = torch.randn(30, 8, generator=generator(1)), torch.randn(50, 8, generator=generator(2)) * 2 + 1
    assert set_distances.frechet(x, y) == pytest.approx(set_distances.frechet(y, x), rel=1e-12)
    assert set_distances.frechet(x, x) == pytest.approx(0.0, abs=1e-12)
    fewer = x[:5]  # fewer samples than dimensions
    assert set_distances.frechet(fewer, fewer.flip(0)) == pytest.approx(0.0, abs=1e-12)
    assert set_distances.frechet(x, x + 2) == pytest.approx(8 * 4, rel=1e-6)


def test_frechet_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="one d"):
        set_distances.frechet(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="finite"):
        set_distances.frechet(torch.full((4, 3), torch.nan), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2 samples"):
        set_distances.frechet(torch.zeros(1, 3), torch.zeros(4, 3))


def test_frechet_interval_covers_the_expectation_at_this_sample_size():
    spots = generator(4)
    data = (torch.full((6,), 0.4), torch.eye(6) * 1.5)
    sets = [torch.randn(100, 6, generator=spots) for _ in range(60)]
    estimates = [set_distances.frechet_interval(x, data, resamples=40, seed=i) for i, x in enumerate(sets)]
    expectation = sum(e.value for e in estimates) / len(estimates)
    assert expectation > 6 * (0.16 + (math.sqrt(1.5) - 1) ** 2)  # biased upwards, as documented
    covered = [e.low <= expectation <= e.high for e in estimates]
    assert sum(covered) >= 54
    assert not all(e.low == 0 for e in estimates)


def test_frechet_interval_of_pairs_is_narrower_and_zero_for_equal_sets():
    x = torch.randn(200, 6, generator=generator(1)) * 3
    y = x + 0.5
    paired = set_distances.frechet_interval(x, y, paired=True, resamples=40)
    unpaired = set_distances.frechet_interval(x, y, resamples=40)
    assert paired.value == unpaired.value
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    same = set_distances.frechet_interval(x, x, paired=True, resamples=10)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_ratio_interval_is_narrower_than_that_of_its_parts():
    x = torch.randn(200, 6, generator=generator(1))
    quantized = x + 0.05 * torch.randn(200, 6, generator=generator(2))
    data = (torch.full((6,), 0.5), torch.eye(6))
    ratio = set_distances.frechet_ratio_interval(quantized, x, data, resamples=40)
    above, below = (set_distances.frechet_interval(f, data, resamples=40) for f in (quantized, x))
    assert ratio.value == pytest.approx(above.value / below.value)
    assert (ratio.high - ratio.low) / ratio.value < 0.5 * (below.high - below.low) / below.value
    assert set_distances.frechet_ratio_interval(x, x, data, resamples=10) == Estimate(1.0, 1.0, 1.0)


# --- kernel distance


def test_kernel_distance_equals_the_double_loop():
    a, b = (
        torch.randn(5, 3, generator=generator(1)).double(),
        torch.randn(4, 3, generator=generator(2)).double(),
    )

    def mean(pairs):
        values = [((x @ y).item() / 3 + 1) ** 3 for x, y in pairs]
        return sum(values) / len(values)

    within = [mean([(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (a, b)]
    expected = sum(within) - 2 * mean([(x, y) for x in a for y in b])
    assert set_distances.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    source = generator(5)
    values = torch.tensor(
        [
            set_distances.kernel_distance(
                torch.randn(40, 4, generator=source), torch.randn(40, 4, generator=source)
            )
            for _ in range(100)
        ]
    )
    assert abs(values.mean()) < 3 * values.std() / 10
    assert values.min() < 0 < values.max()


def test_kernel_distance_of_pairs_blocks_and_intervals():
    x = torch.randn(1200, 4, generator=generator(1))  # more than one block of rows
    assert set_distances.kernel_distance(x, x, paired=True) == pytest.approx(0.0, abs=1e-12)
    assert set_distances.kernel_distance(x, x) < 0  # why pairs are left out
    shifted = torch.randn(150, 4, generator=generator(2)) + 1
    estimate = set_distances.kernel_interval(x[:150], shifted, resamples=40)
    assert 0 < estimate.low < estimate.value < estimate.high


# --- pictures


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' DPM-Solver, numpy 2
@pytest.mark.parametrize(
    ("build", "prompts"),
    [(tiny.tiny_unet, tiny.PROMPTS[:2]), (tiny.tiny_pixart, tiny.PROMPTS[:2]), (tiny.tiny_ddim, None)],
)
def test_a_seed_fixes_the_picture_for_every_batch_size(build, prompts):
    pipeline = build()
    one, three = (
        evaluate.generate(
            pipeline, prompts, seeds=[5, 6, 7, 5], steps=3, batch_size=size, trajectory=True, progress=False
        )
        for size in (1, 3)
    )
    assert one.images.shape[:2] == (4, 3) and one.images.dtype == torch.float32
    assert 0 <= one.images.min() and one.images.max() <= 1
    # Products of other batch sizes add up in another order: float32 rounding through 3 steps.
    assert torch.allclose(one.images, three.images, atol=1e-4)
    assert not torch.allclose(one.images[0], one.images[1], atol=1e-2)
    assert one.latents is not None and one.latents.shape[:2] == (3, 4)
    assert len(one.timesteps) == 3 and one.timesteps == sorted(one.timesteps, reverse=True)
    assert "step" not in vars(pipeline.scheduler)
    last = evaluate.latent_error(one, three)
    assert len(last) == 3 and max(e.high for e in last) < 1e-3


def test_prompts_are_recycled_and_default_arguments_are_the_pipelines():
    pipeline = tiny.tiny_unet()
    prompts = tiny.PROMPTS[:2]
    drawn = evaluate.generate(pipeline, prompts, seeds=[1, 1, 1], steps=2, guidance_scale=5.0, progress=False)
    assert drawn.latents is None
    assert torch.allclose(drawn.images[0], drawn.images[2], atol=1e-5)
    assert not torch.equal(drawn.images[0], drawn.images[1])
    stock = pipeline(
        prompts[1], num_inference_steps=2, guidance_scale=5.0, generator=generator(1), output_type="np"
    ).images
    assert torch.allclose(drawn.images[1], torch.from_numpy(stock[0]).permute(2, 0, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("build", "prompts", "options", "message"),
    [
        (tiny.tiny_ddim, ["a cat"], {}, "must be None"),
        (tiny.tiny_unet, None, {}, "at least one entry"),
        (tiny.tiny_unet, [], {}, "at least one entry"),
        (tiny.tiny_unet, "a cat", {}, "at least one entry"),
        (tiny.tiny_ddim, None, {"guidance_scale": 2.0}, "guidance_scale; leave that out"),
        (tiny.tiny_ddim, None, {"seeds": []}, "at least 1"),
    ],
)
def test_generate_refuses_what_the_pipeline_cannot_take(build, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.generate(build(), prompts, **({"seeds": [1], "steps": 1, "progress": False} | options))


def test_generate_names_the_seed_of_a_broken_picture_and_restores_the_scheduler():
    pipeline = tiny.tiny_ddim()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity for seeds \[41\]"):
        evaluate.generate(pipeline, None, seeds=[41], steps=1, progress=False)
    assert "step" not in vars(pipeline.scheduler)


# --- comparison


def generated(noise: float, n: int = 12, side: int = 16, latents: bool = True) -> Generated:
    images = pictures(n, side)
    noisy = (images + noise * torch.randn(images.shape, generator=generator(9))).clamp(0, 1)
    states = torch.ones(2, n, 4, 2, 2) * (1 + noise) if latents else None
    return Generated(noisy, states, [999.0, 499.0], 1.0)


@pytest.fixture(scope="module")
def evaluation(net) -> Evaluation:
    return evaluate.compare(
        generated(0.0),
        generated(0.1),
        features=features_of(net),
        feature_maps=maps_of(net),
        data_moments=(np.zeros(5, np.float32), np.eye(5, dtype=np.float32)),
        captions=["a"] * 12,
        retrieval=lambda images, captions: torch.arange(len(images)) % 2 == 0,
    )


def test_compare_measures_everything_in_the_fixed_order(evaluation):
    assert [name for name, _, _ in evaluation.rows()] == [
        name
        for name in picture_metrics.METRICS
        if name != "signal_to_noise"  # of what is no picture
    ]
    assert all(e.low <= e.value <= e.high for e in evaluation.metrics.values())
    assert evaluation.samples == 12
    assert evaluation.timesteps == (999.0, 499.0)
    assert [e.value for e in evaluation.trajectory] == pytest.approx([0.1, 0.1], rel=1e-5)
    assert evaluation.metrics["retrieval"].value == 0.5
    assert (
        19 < evaluation.metrics["psnr"].value < 24
    )  # noise of 0.1 is 20 dB, clipping at 0 and 1 takes a little


def test_compare_of_equal_sets_is_perfect_and_leaves_out_what_does_not_apply(net):
    small = generated(0.0, side=8, latents=False)
    result = evaluate.compare(small, small, features=features_of(net), feature_maps=maps_of(net))
    assert list(result.metrics) == ["psnr", "perceptual", "frechet_to_full_precision", "kernel_distance"]
    assert result.metrics["psnr"] == Estimate(100.0, 100.0, 100.0)
    for name in ("perceptual", "frechet_to_full_precision", "kernel_distance"):
        assert result.metrics[name].value == pytest.approx(0.0, abs=1e-9)
    assert result.trajectory is None


def test_compare_wants_one_caption_per_picture(net):
    sets = generated(0.0), generated(0.1)
    with pytest.raises(ValueError, match="one per picture, got 3 for 12"):
        evaluate.compare(
            *sets,
            features=features_of(net),
            feature_maps=maps_of(net),
            captions=["a"] * 3,
            retrieval=lambda images, captions: torch.ones(len(images)),
        )


def test_latent_error_asks_for_trajectories():
    with pytest.raises(ValueError, match="trajectory=True"):
        evaluate.latent_error(generated(0.0, latents=False), generated(0.1))


def test_json_round_trip(evaluation):
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    bare = Evaluation({"psnr": Estimate(30.0, 29.0, 31.0)}, 4)
    assert Evaluation.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"metrics": {"psnr": 3}, "samples": 1, "trajectory": null, "timesteps": []}']
)
def test_foreign_json_gives_one_sentence(text):
    with pytest.raises(ValueError, match="must be JSON as difloat writes it"):
        Evaluation.from_json(text)


# --- gate


JUDGED = Evaluation({"psnr": Estimate(18.25, 17, 19), "frechet_to_data": Estimate(12.5, 11, 14)}, 100)


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("psnr=18.25", True),
        ("psnr=20", False),
        ("psnr >= 18", True),
        ("psnr<=18", False),
        ("frechet_to_data=13", True),
        ("frechet_to_data=12", False),
        ("frechet_to_data<=1.25e1", True),
        ("frechet_to_data>=13", False),
    ],
)
def test_gate_directions(rule, holds):
    assert (evaluate.gate(JUDGED, [rule]) == []) is holds


def test_gate_speaks_in_sentences():
    assert evaluate.gate(JUDGED, ["psnr=20", "frechet_to_data<=12", "psnr>=1"]) == [
        "psnr must be at least 20 dB, got 18.25 dB (95 % interval 17 to 19).",
        "frechet_to_data must be at most 12, got 12.5 (95 % interval 11 to 14).",
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sharpness=1", r"name a metric \(psnr, ssim, .*\), got 'sharpness'"),
        ("ssim=1", r"measured metric \(psnr, frechet_to_data\)"),
        ("psnr>20", "must be"),
        ("psnr=x", "must be"),
    ],
)
def test_gate_refuses_rules_it_cannot_judge(rule, message):
    with pytest.raises(ValueError, match=message):
        evaluate.gate(JUDGED, [rule])


# --- metrics of other libraries


def test_external_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r'pip install "difloat\[eval\]"'):
        evaluate.external("lpips", pictures(), pictures(), None)


def test_external_checks_its_input():
    with pytest.raises(ValueError, match="lpips, clip_score"):
        evaluate.external("fid", pictures(), pictures(), None)
    with pytest.raises(ValueError, match="needs reference pictures"):
        evaluate.external("lpips", None, pictures(), None)
    with pytest.raises(ValueError, match=r"one per picture \(6\), got 1"):
        evaluate.external("clip_score", None, pictures(), ["a cat"])


def test_clip_score_of_a_tiny_clip(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny.tiny_tokenizer()
    text = sizes | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8
        )
        model = CLIPModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    scores = evaluate.external(
        "clip_score", None, pictures(2), ["a cat", "two red fish"], clip_model=str(tmp_path)
    )
    alone = evaluate.external("clip_score", None, pictures(2)[:1], ["a cat"], clip_model=str(tmp_path))
    assert scores.shape == (2,) and 0 <= scores.min() and scores.max() <= 100
    assert scores.max() > 0
    assert scores[0].item() == pytest.approx(alone[0].item(), rel=1e-4, abs=1e-4)

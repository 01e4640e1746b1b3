"""The metrics of a quantized set of samples against the full-precision set from the same seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

from torch import Tensor

from difloat.evaluation.generation import Generated
from difloat.evaluation.picture_metrics import (
    METRICS,
    Estimate,
    Metric,
    in_batches,
    mean_interval,
    perceptual,
    psnr,
    signal_to_noise,
    ssim,
)
from difloat.evaluation.set_distances import (
    Moments,
    frechet_interval,
    frechet_ratio_interval,
    kernel_interval,
)
from difloat.plan.validation import LISTED, read, record

_KERNEL_PICTURES = 8


@record("evaluation", finite=False)
class Evaluation:
    """The measured difference between a quantized and a full-precision model.

    >>> evaluation = Evaluation({"psnr": Estimate(27.0, 26.0, 28.0)}, samples=16)
    >>> for name, metric, estimate in evaluation.rows():
    ...     print(f"{metric.label}: {estimate.value} {metric.unit}")
    PSNR to full precision: 27.0 dB

    Attributes:
        metrics: The estimates by the names of `METRICS`. A metric that was not measured is absent.
        samples: How many samples each set has.
        trajectory: The relative error of the latents after every sampler step, or None.
        timesteps: The timesteps of these steps, or of the sampler where there is no trajectory.
    """

    metrics: dict[str, Estimate]
    samples: int
    trajectory: list[Estimate] | None = None
    timesteps: Annotated[tuple[float, ...], LISTED] = ()

    def rows(self) -> list[tuple[str, Metric, Estimate]]:
        """The measured metrics `(name, how to show it, estimate)` in the fixed order of `METRICS`."""
        return [
            (name, metric, self.metrics[name]) for name, metric in METRICS.items() if name in self.metrics
        ]

    def to_json(self) -> str:
        """One JSON object with the attributes, of which `from_json` makes an equal evaluation."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation of a text that `to_json` made.

        Raises:
            ValueError: if the text is no such object.
        """
        try:
            evaluation = read(cls, json.loads(text))
        except ValueError as error:
            raise ValueError(
                f"an evaluation must be JSON as difloat writes it, got {text[:60]!r} ({error}); evaluate again."
            ) from error
        unknown = sorted(set(evaluation.metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(unknown)}.")
        return evaluation


def compare(
    reference: Generated,
    quantized: Generated,
    *,
    features: Callable[[Tensor], Tensor],
    feature_maps: Callable[[Tensor], Sequence[Tensor]],
    data_moments: Moments | None = None,
    captions: Sequence[str] | None = None,
    retrieval: Callable[[Tensor, list[str]], Tensor] | None = None,
    seed: int = 0,
) -> Evaluation:
    """All metrics of a quantized set of samples against the full-precision set of the same seeds and prompts.

    >>> import torch
    >>> from difloat.evaluation import emoji_features
    >>> pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> first = Generated(pictures, None, [], 0.0)
    >>> second = Generated((pictures + 0.1).clamp(0, 1), None, [], 0.0)
    >>> found = compare(
    ...     first, second, features=emoji_features.features, feature_maps=emoji_features.feature_maps
    ... )
    >>> sorted(found.metrics)
    ['frechet_to_full_precision', 'perceptual', 'psnr', 'ssim']
    >>> 20 < found.metrics["psnr"].value < 21                              # dB
    True

    A metric is measured where it applies. SSIM needs pictures of at least 11 pixels a side. The kernel distance needs at least
    8 pictures, because with fewer a resample may hold a single picture. Distances to data need `data_moments`, retrieval
    needs `captions` and `retrieval`, and the trajectory needs latents in both sets. The metrics of a video are means over its
    frames, and distances of sets of videos are not measured. Waveforms and embeddings have one metric of their own, the
    signal-to-noise ratio.

    Args:
        reference: The full-precision samples, at least 2.
        quantized: The samples of the quantized model from the same seeds.
        features: A function of pictures `[n, 3, h, w]` that returns features `[n, d]`.
        feature_maps: A function of pictures that returns a list of maps `[n, c, h', w']`, normalised over channels.
        data_moments: The mean `[d]` and covariance `[d, d]` of the data's features, as tensors or arrays.
        captions: One caption per picture that says what it should show.
        retrieval: A function of pictures and captions that returns hits `[n]`, boolean or 0 and 1.
        seed: The seed of all bootstrap resampling.

    Raises:
        ValueError: if the sets do not have one shape, or there is not one caption per picture.
    """
    if len(reference) != len(quantized) or reference.frames != quantized.frames:
        got = [(len(drawn), drawn.frames) for drawn in (reference, quantized)]
        raise ValueError(f"both sets must have as many samples and frames, got {got}; generate both alike.")
    metrics = _of_pairs(reference, quantized, feature_maps, seed)
    if len(reference.images) and reference.frames == 1:
        metrics |= _of_sets(reference.images, quantized.images, features, data_moments, seed)
    if captions is not None and retrieval is not None and reference.frames == 1:
        metrics["retrieval"] = _retrieval_estimate(retrieval, quantized.images, captions, seed)
        metrics["retrieval_of_full_precision"] = _retrieval_estimate(
            retrieval, reference.images, captions, seed
        )
    both = reference.latents is not None and quantized.latents is not None
    trajectory = latent_error(reference, quantized, seed=seed) if both else None
    return Evaluation(metrics, len(reference), trajectory, tuple(reference.timesteps))


def _of_pairs(
    reference: Generated,
    quantized: Generated,
    feature_maps: Callable[[Tensor], Sequence[Tensor]],
    seed: int,
) -> dict[str, Estimate]:
    """The metrics of each sample against the full-precision one of its seed. For a video they are means over its frames."""
    values: dict[str, Tensor] = {}
    if len(reference.images):
        values["psnr"] = psnr(reference.images, quantized.images)
        if min(reference.images.shape[-2:]) >= 11:
            values["ssim"] = ssim(reference.images, quantized.images)
        values["perceptual"] = perceptual(reference.images, quantized.images, feature_maps)
        values = {name: value.unflatten(0, (-1, reference.frames)).mean(1) for name, value in values.items()}
    if reference.signal is not None and quantized.signal is not None:
        values["signal_to_noise"] = signal_to_noise(reference.signal, quantized.signal)
    return {name: mean_interval(value, seed=seed) for name, value in values.items()}


def _of_sets(
    reference: Tensor,
    quantized: Tensor,
    features: Callable[[Tensor], Tensor],
    data_moments: Moments | None,
    seed: int,
) -> dict[str, Estimate]:
    """The distances between the sets of pictures. Frames of a video are no independent draws, so videos have none."""
    metrics = {}
    a, b = in_batches(features, reference), in_batches(features, quantized)
    metrics["frechet_to_full_precision"] = frechet_interval(b, a, paired=True, seed=seed)
    if len(a) >= _KERNEL_PICTURES:
        metrics["kernel_distance"] = kernel_interval(b, a, paired=True, seed=seed)
    if data_moments is not None:
        metrics["frechet_to_data"] = frechet_interval(b, data_moments, seed=seed)
        metrics["frechet_to_data_of_full_precision"] = frechet_interval(a, data_moments, seed=seed)
        metrics["frechet_to_data_ratio"] = frechet_ratio_interval(b, a, data_moments, seed=seed)
    return metrics


def _retrieval_estimate(
    retrieval: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,
    captions: Sequence[str],
    seed: int,
) -> Estimate:
    if len(captions) != len(images):
        raise ValueError(f"captions must be one per picture, got {len(captions)} for {len(images)} pictures.")
    return mean_interval(retrieval(images, list(captions)), seed=seed)


def latent_error(reference: Generated, quantized: Generated, *, seed: int = 0) -> list[Estimate]:
    """The relative error of the sampler's state after every step: `|q - r| / |r|` per sample (L2), and its mean.

    >>> import torch
    >>> state = torch.ones(1, 2, 4)                                        # one step, two samples
    >>> first = Generated(torch.zeros(2, 3, 8, 8), state, [500.0], 0.0)
    >>> second = Generated(torch.zeros(2, 3, 8, 8), 1.5 * state, [500.0], 0.0)
    >>> latent_error(first, second)
    [Estimate(value=0.5, low=0.5, high=0.5)]

    Args:
        reference: The full-precision samples with latents `[steps, n, ...]`.
        quantized: The samples of the quantized model from the same seeds, with latents of the same shape.
        seed: The seed of the bootstrap resampling.

    Returns:
        One estimate per sampler step.

    Raises:
        ValueError: if a set has no latents, or they do not have one shape.
    """
    a, b = reference.latents, quantized.latents
    if a is None or b is None or a.shape != b.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
        raise ValueError(
            f"latents must be recorded for both sets and have one shape, got {shapes}; generate both with "
            "trajectory=True, the same seeds and steps."
        )
    errors = []
    for state, other in zip(a, b, strict=True):
        flat = state.double().flatten(1)  # [n, d]
        relative = (other.double().flatten(1) - flat).norm(dim=1) / flat.norm(dim=1)  # [n]
        errors.append(mean_interval(relative, seed=seed))
    return errors

"""Metrics of a picture against the full-precision one of its seed (PSNR, SSIM, perceptual), and intervals for their means.

Pictures are float `[n, 3, h, w]` in [0, 1]. Distances of whole sets are in `set_distances`, and `METRICS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from difloat.methods.intervals import Estimate as Estimate
from difloat.methods.intervals import mean_interval as mean_interval

PSNR_CAP_DB = 100.0
"""Larger values of PSNR are cut here, since such a difference is float32 rounding. Identical pictures would have infinity."""

_BATCH = 100  # pictures per call of a metric or feature network: bounds memory, not part of any result
NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class NotFiniteError(ValueError):
    """A model drew pictures with NaN or infinity."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its label, its unit ("" if it has none), and whether "higher" or "lower" is better.

    >>> METRICS["psnr"]
    Metric(label='PSNR to full precision', unit='dB', better='higher')
    """

    label: str
    unit: str
    better: Literal["higher", "lower"]


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR to full precision", "dB", "higher"),
    "ssim": Metric("SSIM to full precision", "", "higher"),
    "perceptual": Metric("Perceptual distance to full precision, emoji features", "", "lower"),
    "signal_to_noise": Metric("Signal-to-noise ratio of the waveform or embedding", "dB", "higher"),
    "frechet_to_full_precision": Metric("Fréchet distance to full precision, emoji features", "", "lower"),
    "frechet_to_data": Metric("Fréchet distance to data", "", "lower"),
    "frechet_to_data_of_full_precision": Metric("Fréchet distance to data, full precision", "", "lower"),
    "frechet_to_data_ratio": Metric("Fréchet distance to data / full precision's", "", "lower"),
    "kernel_distance": Metric("Kernel distance to full precision, emoji features", "", "lower"),
    "retrieval": Metric("Caption retrieval", "", "higher"),
    "retrieval_of_full_precision": Metric("Caption retrieval, full precision", "", "higher"),
}
"""Every metric of an evaluation, in the order of its table. The network that gives features was trained on emoji."""

NEED_CAPTIONS = tuple(name for name in METRICS if name.startswith(("frechet_to_data", "retrieval")))
"""The metrics that are only measured with the captions of the embedded models."""


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of every picture in dB, with a peak of 1, cut at `PSNR_CAP_DB`.

    >>> pictures = torch.full((2, 3, 8, 8), 0.5)
    >>> psnr(pictures, pictures + 0.1)
    tensor([20.0000, 20.0000])

    Args:
        reference: The full-precision pictures `[n, c, h, w]` in [0, 1].
        images: The pictures to judge, in the same shape.

    Returns:
        float32 `[n]`.

    Raises:
        ValueError: if the shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def ratio(target: Tensor, batch: Tensor) -> Tensor:
        return peak_signal_noise_ratio(batch, target, data_range=1.0, reduction="none", dim=(1, 2, 3))

    return _per_image(ratio, reference, images).clamp(max=PSNR_CAP_DB)


def signal_to_noise(reference: Tensor, signals: Tensor) -> Tensor:
    """The energy of the full-precision signal over that of the difference in dB, `[n]`, cut at `PSNR_CAP_DB` on both sides.

    >>> signal_to_noise(torch.ones(1, 4), torch.full((1, 4), 1.1))
    tensor([20.0000])

    Args:
        reference: The full-precision waveforms or embeddings `[n, ...]`.
        signals: The signals to judge, in the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != signals.shape:
        raise ValueError(
            f"signals must have one shape, got {tuple(reference.shape)} and {tuple(signals.shape)}; generate both alike."
        )
    clean = reference.double().flatten(1)  # [n, d]
    energy, error = clean.square().sum(1), (signals.double().flatten(1) - clean).square().sum(1)
    ratio = 10 * (energy / error).log10()
    # Silence that is reproduced exactly is 0 / 0, which counts as identical.
    return ratio.nan_to_num(PSNR_CAP_DB).clamp(-PSNR_CAP_DB, PSNR_CAP_DB).float()


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """The structural similarity of every picture, `[n]` in [-1, 1], with a Gaussian window of 11 pixels (Wang et al. 2004).

    >>> pictures = torch.rand(1, 3, 16, 16)
    >>> ssim(pictures, pictures)
    tensor([1.])

    Raises:
        ValueError: if the shapes differ, or a side is shorter than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < 11:
        raise ValueError(
            f"ssim needs pictures of at least 11 x 11 pixels, got {tuple(images.shape[-2:])}; leave ssim out."
        )

    def similarity(target: Tensor, batch: Tensor) -> Tensor:
        result = structural_similarity_index_measure(batch, target, data_range=1.0, reduction="none")
        assert isinstance(result, Tensor)
        return result.reshape(len(batch))

    return _per_image(similarity, reference, images)


def perceptual(
    reference: Tensor, images: Tensor, feature_maps: Callable[[Tensor], Sequence[Tensor]]
) -> Tensor:
    """The perceptual distance of every picture, `[n]`: LPIPS (arXiv:1801.03924 Eq. 1) with unit weights, averaged over layers.

    It is the squared distance of the channel vectors, averaged over positions. With maps of unit channel norm it is
    `2 - 2 cos`, so 0 for equal pictures and at most 4.

    >>> from difloat.evaluation.emoji_features import feature_maps
    >>> pictures = torch.rand(2, 3, 64, 64)
    >>> perceptual(pictures, pictures, feature_maps)
    tensor([0., 0.])

    Args:
        reference: The full-precision pictures `[n, 3, h, w]` in [0, 1].
        images: The pictures to judge, in the same shape.
        feature_maps: A function of pictures that returns a list of maps `[n, c, h', w']`, normalised over channels.

    Raises:
        ValueError: if the shapes differ.
    """

    def distance(target: Tensor, batch: Tensor) -> Tensor:
        pairs = zip(feature_maps(target), feature_maps(batch), strict=True)
        layers = [(a.float() - b.float()).square().sum(1).mean((1, 2)) for a, b in pairs]  # [n] per layer
        return torch.stack(layers).mean(0)

    return _per_image(distance, reference, images)


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The results of a function of pictures `[n, ...]`, called on bounded batches without gradients, joined on the CPU."""
    with torch.no_grad():
        return torch.cat([function(batch).cpu() for batch in images.split(_BATCH)])


def _per_image(distance: Callable[[Tensor, Tensor], Tensor], reference: Tensor, images: Tensor) -> Tensor:
    if reference.shape != images.shape or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"reference and images must be two batches [n, c, h, w] of one shape, got {tuple(reference.shape)} "
            f"and {tuple(images.shape)}; generate both with the same seeds and size."
        )
    pairs = zip(reference.split(_BATCH), images.split(_BATCH), strict=True)
    with torch.no_grad():
        return torch.cat([distance(a.float(), b.float()).cpu() for a, b in pairs])

"""Evaluation of a quantized pipeline: pictures of the same seeds from two pipelines, and what differs between them.

`generate` draws pictures, `compare` measures a quantized set against the full-precision one, and `gate` turns thresholds into
sentences for a continuous-integration job. Users reach all of it as `difloat.evaluate`.
"""

from difloat.evaluation.comparison import Evaluation, compare, latent_error
from difloat.evaluation.gates import gate
from difloat.evaluation.generation import Generated, generate
from difloat.evaluation.picture_metrics import (
    METRICS,
    Estimate,
    Metric,
    mean_interval,
    perceptual,
    psnr,
    ssim,
)
from difloat.evaluation.published_metrics import external
from difloat.evaluation.set_distances import (
    frechet,
    frechet_from_moments,
    frechet_interval,
    frechet_ratio_interval,
    kernel_distance,
    kernel_interval,
    moments,
)

__all__ = [
    "METRICS",
    "Estimate",
    "Evaluation",
    "Generated",
    "Metric",
    "compare",
    "external",
    "frechet",
    "frechet_from_moments",
    "frechet_interval",
    "frechet_ratio_interval",
    "gate",
    "generate",
    "kernel_distance",
    "kernel_interval",
    "latent_error",
    "mean_interval",
    "moments",
    "perceptual",
    "psnr",
    "ssim",
]

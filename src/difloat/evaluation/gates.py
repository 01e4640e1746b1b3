"""Thresholds on metrics for a continuous-integration job: rules like ``psnr=20``, and a sentence for each broken one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from difloat.evaluation.comparison import Evaluation
from difloat.evaluation.picture_metrics import METRICS

_RULE = re.compile(r"\s*(\w+)\s*(<=|>=|=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Rule:
    """A threshold: `metric` must be at least (or at most) `limit`, in the metric's unit."""

    metric: str
    at_least: bool
    limit: float


def parse(text: str) -> Rule:
    """The rule of a text ``name<=number``, ``name>=number`` or ``name=number``.

    The last form asks for at least that good a value in the metric's own direction.

    >>> parse("psnr=20"), parse("perceptual=0.1")
    (Rule(metric='psnr', at_least=True, limit=20.0), Rule(metric='perceptual', at_least=False, limit=0.1))

    Raises:
        ValueError: if the text has another form, or there is no such metric.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(f"a gate rule must be name<=number, name>=number or name=number, got {text!r}.")
    name, sign, limit = match[1], match[2], float(match[3])
    if name not in METRICS:
        raise ValueError(f"a gate rule must name a metric ({', '.join(METRICS)}), got {name!r}.")
    return Rule(name, sign == ">=" or (sign == "=" and METRICS[name].better == "higher"), limit)


def gate(evaluation: Evaluation, rules: Sequence[str]) -> list[str]:
    """One sentence for every rule that an evaluation breaks. Values are judged, not their intervals.

    >>> from difloat.evaluation.picture_metrics import Estimate
    >>> evaluation = Evaluation({"psnr": Estimate(19.0, 18.0, 20.0)}, samples=16)
    >>> gate(evaluation, ["psnr=20"])
    ['psnr must be at least 20 dB, got 19 dB (95 % interval 18 to 20).']
    >>> gate(evaluation, ["psnr>=15"])
    []

    Args:
        evaluation: The measured metrics.
        rules: Texts that `parse` reads.

    Raises:
        ValueError: if a rule cannot be read, or its metric was not measured.
    """
    failures = []
    for rule in map(parse, rules):
        if rule.metric not in evaluation.metrics:
            measured = ", ".join(row[0] for row in evaluation.rows())
            raise ValueError(f"a gate rule must name a measured metric ({measured}), got {rule.metric!r}.")
        metric, found = METRICS[rule.metric], evaluation.metrics[rule.metric]
        if found.value >= rule.limit if rule.at_least else found.value <= rule.limit:
            continue
        unit = f" {metric.unit}" if metric.unit else ""
        failures.append(
            f"{rule.metric} must be {'at least' if rule.at_least else 'at most'} {rule.limit:g}{unit}, "
            f"got {found.value:.4g}{unit} (95 % interval {found.low:.4g} to {found.high:.4g})."
        )
    return failures

"""Markdown tables of what `outlier_rows.py` measured."""

from __future__ import annotations

import statistics
from typing import Any

from quality_tables import spread


def tables(results: dict[str, Any]) -> str:
    """Mean over seeds for every regime, and the change from rows at random, paired by seed."""
    lines: list[str] = []
    for bits in dict.fromkeys(key.split(" | ")[0] for key in results):
        regimes = list(dict.fromkeys(key.split(" | ")[1] for key in results if key.startswith(bits)))
        labels = list(dict.fromkeys(key.split(" | ")[2] for key in results if key.startswith(bits)))
        lines += [
            "",
            f"| {bits.upper()}, dB | " + " | ".join(regimes) + " |",
            "|---" * (len(regimes) + 1) + "|",
        ]
        shapes = [of(results, bits, regime, labels[0]) for regime in regimes]
        cells = [mean_kurtosis(list(shape.values())) for shape in shapes]
        lines.append("| kurtosis of rows, median and 95 % | " + " | ".join(cells) + " |")
        for label in labels:
            cells = [values(of(results, bits, regime, label)) for regime in regimes]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        for label in (one for one in labels if one.startswith("by ")):
            chance = label.replace(label.split(",")[0], "at random")
            cells = [change(of(results, bits, r, chance), of(results, bits, r, label)) for r in regimes]
            lines.append(f"| {label}: change from random | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def of(results: dict[str, Any], bits: str, regime: str, label: str) -> dict[str, dict[str, Any]]:
    """The results of a cell, by seed."""
    start = f"{bits} | {regime} | {label} | "
    return {key[len(start) :]: value for key, value in results.items() if key.startswith(start)}


def mean_kurtosis(cell: list[dict[str, Any]]) -> str:
    """The mean over seeds of the median and of the 95th percentile."""
    return ", ".join(f"{statistics.mean(one['kurtosis'][n] for one in cell):.3g}" for n in ("median", "high"))


def values(cell: dict[str, dict[str, Any]]) -> str:
    """The mean over seeds with its interval, or a single value."""
    found = [one["snr_db"] for one in cell.values()]
    return "" if not found else spread(found) if len(found) > 2 else f"{statistics.mean(found):.3g}"


def change(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> str:
    """The mean change over the seeds of both, with its interval."""
    found = [after[seed]["snr_db"] - before[seed]["snr_db"] for seed in before if seed in after]
    return "" if not found else spread(found) if len(found) > 2 else f"{statistics.mean(found):.2g}"

"""Markdown tables of what `quality.py` measured."""

from __future__ import annotations

import statistics
from typing import Any

COLUMNS = {
    "frechet_to_full_precision": "FD to FP32",
    "frechet_to_data": "FD to data",
    "frechet_to_data_ratio": "FD to data / FP32's",
    "psnr": "PSNR dB",
    "perceptual": "perceptual",
    "retrieval": "retrieval",
}


def table(results: dict[str, Any], order: list[str]) -> str:
    """All results as Markdown, one table per model, rows in the order of the paper's list."""
    lines: list[str] = []
    for model in dict.fromkeys(key.split(" | ")[0] for key in results):
        there = {
            key.split(" | ")[1]: value for key, value in results.items() if key.startswith(f"{model} | ")
        }
        rows = {label: there[label] for label in order if label in there}
        first = next(iter(rows.values()))
        lines += [
            f"\n**{model}**, {first['samples']} pictures, {first['steps']} steps, weights {first['weights']}\n"
        ]
        heads = [
            "weights/activations",
            *COLUMNS.values(),
            "MB",
            "bits",
            "zeros",
            "integer grids",
            "quantize s",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        full = first["metrics"]
        cells = ["FP32", "0", interval(full["frechet_to_data_of_full_precision"]), "1", "", "0"]
        cells += [
            interval(full["retrieval_of_full_precision"]),
            f"{first['original_bytes'] / 1e6:.2f} (16 bit)",
        ]
        lines.append("| " + " | ".join([*cells, "16", "", "", ""]) + " |")
        for label, value in rows.items():
            cells = [label, *(interval(value["metrics"][name]) for name in COLUMNS)]
            cells += [
                f"{value['packed_bytes'] / 1e6:.2f}",
                f"{value['effective_bits']:.2f}",
                f"{value['zeros']:.1%}",
            ]
            cells += [f"{value['integer_grid_share']:.0%}", f"{value['quantize_s']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        commits = ", ".join(sorted({value["commit"] for value in rows.values()}))
        machines = " and ".join(sorted({value["machine"] for value in rows.values()}))
        lines.append(f"\nCommits {commits}; {machines}; `{first['command']}` and other `--rows`.")
    return "\n".join(lines) + "\n"


STUDENTS = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points for so many seeds
SHOWN = ("psnr", "frechet_to_full_precision", "frechet_to_data", "perceptual")


def seed_table(results: dict[str, Any], order: list[str]) -> str:
    """Mean over seeds of what was measured with at least three, and the change from such a row to the next one, as Markdown.

    Intervals are Student's, 95 %; changes are paired by seed.
    """
    heads = " | ".join(COLUMNS[name] for name in SHOWN)
    lines = ["", f"| mean of seeds | seeds | {heads} |", "|---" * (len(SHOWN) + 2) + "|"]
    for model in dict.fromkeys(key.split(" | ")[0] for key in results):
        last: tuple[str, list[dict[str, Any]]] | None = None
        for label in (label for label in order if ", seed " not in label):
            names = [f"{model} | {label}"] + [f"{model} | {label}, seed {n}" for n in range(1, 5)]
            rows = [results[name]["metrics"] for name in names if name in results]
            if len(rows) < 3:
                continue
            means = [spread([row[name]["value"] for row in rows]) for name in SHOWN]
            lines.append(f"| {model}, {label} | {len(rows)} | " + " | ".join(means) + " |")
            same_bits = last is not None and last[0].split()[0] == label.split()[0]
            if last is not None and same_bits and len(last[1]) == len(rows):
                pairs = list(zip(last[1], rows, strict=True))
                changes = [spread([b[name]["value"] - a[name]["value"] for a, b in pairs]) for name in SHOWN]
                lines.append(f"| change from {last[0]} | {len(rows)} | " + " | ".join(changes) + " |")
            last = label, rows
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def spread(values: list[float]) -> str:
    """Mean and half width of its interval."""
    half = STUDENTS[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3g} ± {half:.2g}"


def interval(estimate: dict[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"

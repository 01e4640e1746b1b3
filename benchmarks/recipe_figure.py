"""PSNR against bytes, one line per recipe, of what `quality.py` measured: the figure of docs/which_recipe.md and of auto.md.

    python benchmarks/recipe_figure.py        # writes docs/which-recipe.svg

Shown are recipes as they are: rows whose options are the defaults, or another budget of training, with the first seed. Of
several rows of a recipe with the same bits the one with the highest PSNR counts, which favours no recipe but that with more
rows. Bytes are all that is stored, with layers in full precision as the embedded models have them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from quality_rows import PAPERS
from quality_tables import interval

from difloat.reference_models import NAMES

FIGURE = harness.ROOT / "docs/which-recipe.svg"
BUDGETS = {"epochs", "iterations"}
COLOURS = {
    "auto": "#d62728",
    "guided": "#1f77b4",
    "msfp": "#2ca02c",
    "mpqdm": "#9467bd",
    "efficientdm": "#8c564b",
    "lbfp": "#ff7f0e",
    "qdiffusion": "#17becf",
    "fp4dit": "#e377c2",
    "viditq": "#7f7f7f",
    "qdit": "#bcbd22",
    "gptq": "#000000",
    "rtn": "#aaaaaa",
}
PANELS = {f"{bits}-bit inputs": (bits,) for bits in (8, 6, 4)}


@dataclass(frozen=True)
class Point:
    """One measured row.

    Attributes:
        recipe: Its recipe.
        bits: As asked for.
        bytes: All that is stored.
        minutes: What quantizing took.
        psnr: With its interval, in dB, as the results hold it.
        pictures: How many.
    """

    recipe: str
    bits: str
    bytes: int
    minutes: float
    psnr: dict[str, float]
    pictures: int


def points(model: str) -> list[Point]:
    """The rows of one model that show recipes as they are, one per recipe and bits, by bytes."""
    found: dict[tuple[str, str], Point] = {}
    for paper, rows in PAPERS.items():
        path = harness.RESULTS / f"quality-{paper}.json"
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for row in rows:
            own = set(row.options) <= BUDGETS or (row.recipe == "rtn" and row.options.get("grid") == "int")
            changed = row.allocated is not None or row.blocks_only or row.timesteps != "sampler" or row.seed
            there = results.get(f"{model} | {row.label}")
            if there is None or not own or changed:
                continue
            psnr, size = there["metrics"]["psnr"], there["packed_bytes"]
            point = Point(row.recipe, row.bits, size, there["quantize_s"] / 60, psnr, there["samples"])
            before = found.get((row.recipe, row.bits))
            if before is None or before.psnr["value"] < psnr["value"]:
                found[row.recipe, row.bits] = point
    return sorted(found.values(), key=lambda point: point.bytes)


def inputs(point: Point) -> int:
    """The bits of the inputs."""
    return int(point.bits.partition("a")[2])


def which_table() -> str:
    """Every point as a Markdown table, by model, inputs and bytes."""
    lines = ["| model | bits | recipe | MB | PSNR dB | minutes | pictures |", "|---|---|---|---|---|---|---|"]
    for model in NAMES:
        for widths in PANELS.values():
            for point in points(model):
                if inputs(point) in widths:
                    cells = [
                        f"`{model}`",
                        point.bits.upper(),
                        f"`{point.recipe}`",
                        f"{point.bytes / 1e6:.2f}",
                    ]
                    cells += [interval(point.psnr), f"{point.minutes:.0f}", str(point.pictures)]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Draw the figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "difloat"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(NAMES), len(PANELS), figsize=(15, 8), sharex="row")
    for row, model in enumerate(NAMES):
        for column, (title, widths) in enumerate(PANELS.items()):
            axis = axes[row][column]
            of_panel = [point for point in points(model) if inputs(point) in widths]
            for recipe, colour in COLOURS.items():
                line = [point for point in of_panel if point.recipe == recipe]
                if not line:
                    continue
                x, y = [point.bytes / 1e6 for point in line], [point.psnr["value"] for point in line]
                low = [point.psnr["value"] - point.psnr["low"] for point in line]
                high = [point.psnr["high"] - point.psnr["value"] for point in line]
                axis.errorbar(x, y, [low, high], marker="o", ms=4, lw=1.3, color=colour, label=recipe)
            axis.set(title=f"{model}, {title}", xlabel="MB stored", ylabel="PSNR to full precision, dB")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    harness.arguments(harness.parser(__doc__))
    draw(FIGURE)

"""Write what was measured into docs/papers and docs/which_recipe.md, between `<!-- quality NAME -->` and `<!-- end -->`.

python benchmarks/quality_pages.py           # write
python benchmarks/quality_pages.py --check   # exit code 1 if a page says something else than benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlier_tables import tables
from quality_rows import MODELS, PAPERS
from quality_tables import interval, seed_table, table
from recipe_figure import which_table

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs" / "papers").glob("*.md")), ROOT / "docs" / "which_recipe.md"]
MARK = re.compile(r"(<!-- quality ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Comparison:
    """Rows of several papers' tables side by side: (what the page calls it, table, label in it), all of one model."""

    title: str
    model: str
    rows: tuple[tuple[str, str, str], ...]
    costs: bool = True  # with bits and minutes


COMPARISONS = {
    "guided-unet-w4a4": Comparison(
        "`emoji-unet`, W4A4",
        "emoji-unet",
        (
            ("**guided**", "guided", "W4A4 guided"),
            ("MSFP, two adapters, 40 epochs", "msfp", "W4A4 + DFA (MSFP)"),
            ("MSFP, one adapter, 20 epochs", "mpqdm", "W4A4 MSFP, one adapter"),
            ("MPQ-DM, 20 epochs", "mpqdm", "W4A4 MPQ-DM"),
            ("EfficientDM, 20 epochs", "mpqdm", "W4A4 EfficientDM"),
            ("LBFP", "msfp", "W4A4 LBFP"),
            ("Q-Diffusion", "msfp", "W4A4 Q-Diffusion"),
            ("nearest, integers", "mpqdm", "W4A4 nearest"),
        ),
    ),
    "guided-unet-w2a4": Comparison(
        "`emoji-unet`, W2A4",
        "emoji-unet",
        (
            ("**guided**", "guided", "W2A4 guided"),
            ("MPQ-DM, 20 epochs", "mpqdm", "W2A4 MPQ-DM"),
            ("MPQ-DM, 20 epochs, FP grids", "mpqdm", "W2A4 MPQ-DM, FP grids"),
            ("EfficientDM, 20 epochs", "mpqdm", "W2A4 EfficientDM"),
            (
                "EfficientDM, 20 epochs, learned rounding, guidance kept",
                "mpqdm",
                "W2A4 EfficientDM, learned rounding, guidance kept",
            ),
            ("MSFP, one adapter, 20 epochs", "mpqdm", "W2A4 MSFP, one adapter"),
            ("nearest, integers", "mpqdm", "W2A4 nearest"),
        ),
    ),
    "guided-pixart-w4a4": Comparison(
        "`emoji-pixart`, W4A4",
        "emoji-pixart",
        (
            ("**guided**", "guided", "W4A4 guided"),
            ("MSFP, two adapters, 40 epochs", "msfp", "W4A4 + DFA (MSFP)"),
            ("EfficientDM, 40 epochs", "msfp", "W4A4 EfficientDM"),
            ("LBFP", "msfp", "W4A4 LBFP"),
            ("Q-Diffusion", "msfp", "W4A4 Q-Diffusion"),
        ),
    ),
    "guided-unet-w3a6": Comparison(
        "`emoji-unet`, W3A6",
        "emoji-unet",
        (
            ("**guided**", "guided", "W3A6 guided"),
            ("MPQ-DM, 20 epochs", "mpqdm", "W3A6 MPQ-DM"),
            ("EfficientDM, 20 epochs", "mpqdm", "W3A6 EfficientDM"),
            ("MSFP, one adapter, 20 epochs", "mpqdm", "W3A6 MSFP, one adapter"),
            ("nearest, integers", "mpqdm", "W3A6 nearest"),
        ),
    ),
    "guided-pixart-w2a4": Comparison(
        "`emoji-pixart`, W2A4",
        "emoji-pixart",
        (
            ("**guided**", "guided", "W2A4 guided"),
            ("MPQ-DM, 20 epochs", "mpqdm", "W2A4 MPQ-DM"),
            ("EfficientDM, 20 epochs", "mpqdm", "W2A4 EfficientDM"),
        ),
    ),
    "msfp-guidance": Comparison(
        "`emoji-unet`, one packed weight of 4.1 bits",
        "emoji-unet",
        (
            ("not fine-tuned", "msfp", "W4A4 MSFP, not fine-tuned"),
            ("10 epochs, MSFP's loss", "msfp", "W4A4 MSFP, one adapter, 10 epochs"),
            (
                "10 epochs, timesteps weighted by the squared factor",
                "msfp",
                "W4A4 MSFP, one adapter, 10 epochs, squared factors",
            ),
            (
                "10 epochs, MSFP's loss and the guidance term",
                "msfp",
                "W4A4 MSFP, one adapter, 10 epochs, guidance weighted",
            ),
            (
                '10 epochs, both ("guidance kept")',
                "msfp",
                "W4A4 MSFP, one adapter, guidance kept, 10 epochs",
            ),
            ("40 epochs, both", "msfp", "W4A4 MSFP, one adapter, guidance kept"),
            (
                "learned rounding (`rounding=learned`), not fine-tuned",
                "msfp",
                "W4A4 MSFP, learned rounding, not fine-tuned",
            ),
            (
                "learned rounding, then 10 epochs of both",
                "msfp",
                "W4A4 MSFP, learned rounding, one adapter, guidance kept, 10 epochs",
            ),
            (
                "the recipe [`guided`](guided.md), whose weights may have zero points",
                "guided",
                "W4A4 guided",
            ),
        ),
        costs=False,
    ),
}
RIVALS = {
    "MPQ-DM": "MPQ-DM",
    "EfficientDM": "EfficientDM",
    "MSFP": "MSFP, one adapter",
    "nearest": "nearest",
}


def main() -> None:
    """Write every block of every page, or say which differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that differ")
    arguments = parser.parse_args()
    changed = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = MARK.sub(lambda found: f"{found[1]}{block(found[2])}{found[4]}", text)
        if filled != text:
            changed.append(page.name)
            if not arguments.check:
                page.write_text(filled, encoding="utf-8")
    if arguments.check and changed:
        sys.exit(f"pages must show what benchmarks/results holds, got {changed}; run {Path(__file__).name}")


def block(name: str) -> str:
    """What stands under one name: a paper's whole table, a comparison, or the settings of MPQ-DM."""
    if name in COMPARISONS:
        return comparison(COMPARISONS[name])
    if name == "mpqdm-settings":
        return settings()
    if name == "which-recipe":
        return which_table()
    if name == "outliers":
        return tables(json.loads((ROOT / "benchmarks/results/outlier-rows.json").read_text(encoding="utf-8")))
    if name not in PAPERS:
        raise KeyError(f"a block must be named after one of {[*PAPERS, *COMPARISONS]}, got {name!r}")
    order = [row.label for row in PAPERS[name]]
    return table(results(name), order) + seed_table(results(name), order)


def results(paper: str) -> dict[str, Any]:
    """What is measured of one table."""
    path = ROOT / "benchmarks" / "results" / f"quality-{paper}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def comparison(wanted: Comparison) -> str:
    """Rows of several tables as one Markdown table."""
    heads = [wanted.title, "PSNR dB", "Frechet to FP32"]
    heads += ["perceptual", "bits", "minutes"] if wanted.costs else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, paper, label in wanted.rows:
        row = results(paper)[f"{wanted.model} | {label}"]
        metrics = row["metrics"]
        cells = [name, interval(metrics["psnr"]), interval(metrics["frechet_to_full_precision"])]
        if wanted.costs:
            cells += [interval(metrics["perceptual"]), f"{row['effective_bits']:.2f}"]
            cells += [f"{row['quantize_s'] / 60:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def settings() -> str:
    """PSNR and Fréchet distance of MPQ-DM and its rivals, one line per model, table and bit setting."""
    lines = ["| PSNR dB / Frechet to FP32 | " + " | ".join(RIVALS) + " |", "|" + "---|" * (1 + len(RIVALS))]
    for paper, title in (("mpqdm", "20 epochs"), ("mpqdm-short", "10 epochs")):
        there = results(paper)
        for model in MODELS[paper]:
            for bits in ("W4A4", "W3A6", "W3A4", "W2A6", "W2A4"):
                rows = [there.get(f"{model} | {bits} {label}") for label in RIVALS.values()]
                if None not in rows[:2]:
                    cells = ["" if row is None else pair(row["metrics"]) for row in rows]
                    lines.append(f"| `{model}`, {title}, {bits} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair(metrics: dict[str, Any]) -> str:
    """PSNR with its interval, and the Fréchet distance to full precision."""
    return f"{interval(metrics['psnr'])} / {metrics['frechet_to_full_precision']['value']:.3g}"


if __name__ == "__main__":
    main()

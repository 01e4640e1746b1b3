"""What MSFP decided in a checkpoint: share of asymmetric inputs, formats, and the router's table as a figure.

    difloat quantize emoji-unet out --recipe msfp --bits w4a4
    python benchmarks/router.py out docs/papers/msfp-router.svg

Prints Markdown: how many inputs may be asymmetric, which of them took an unsigned format with a zero point, how often each
format was chosen, and how many layers use which adapter at how many timesteps. The figure is that of the report.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import harness

from difloat.report import build, figures
from difloat.report.record import Record

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
COLORS = (
    'style="--quantized:#2a6f97;--soft:#555;--line:#999"'  # the report's page defines them for its figures
)


def described(found: Record) -> str:
    """Shares and counts as Markdown."""
    asymmetric = [shape for shape in found.inputs if shape.asymmetric]
    unsigned = [shape for shape in asymmetric if shape.unsigned]
    weights = Counter(row.weight_format for row in found.layers)
    inputs = Counter(row.activation_format for row in found.layers)
    lines = [
        f"* {len(asymmetric)} of {len(found.inputs)} inputs are asymmetric; {len(unsigned)} of them took an unsigned format.",
        "* Weights: " + ", ".join(f"{name} {count}" for name, count in weights.most_common()) + ".",
        "* Inputs: " + ", ".join(f"{name} {count}" for name, count in inputs.most_common()) + ".",
    ]
    if found.adapters is not None:
        columns = list(zip(*found.adapters.table, strict=True))
        several = [column for column in columns if len(set(column)) > 1]
        changes = [sum(a != b for a, b in zip(c, c[1:], strict=False)) for c in several]
        lines.append(
            f"* {len(several)} of {len(columns)} layers use more than one adapter over {len(found.adapters.timesteps)} "
            f"timesteps, and change it {sum(changes) / max(1, len(changes)):.1f} times on average."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read, print, draw."""
    parser = harness.parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("figure", type=Path, help="an SVG file")
    arguments = harness.arguments(parser)
    found, *_ = build.read(arguments.checkpoint)
    sys.stdout.write(described(found))
    if found.adapters is not None:
        figure = figures.adapters(found.adapters.timesteps, found.adapters.table, "router")
        alone = str(figure).replace("<svg ", f"<svg {NAMESPACES} {COLORS} ", 1)
        arguments.figure.write_text(alone, encoding="utf-8")


if __name__ == "__main__":
    main()

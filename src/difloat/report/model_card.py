"""The model card: README.md with the front matter that a model hub reads, and the measured table of a checkpoint's record."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from difloat.checkpoint.directories import CARD, CARD_MARK, replace_file
from difloat.report import build
from difloat.report.render import Record
from difloat.report.text import size_text


def write(
    directory: str | os.PathLike[str],
    base_model: str,
    *,
    license: str | None = None,
    tags: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write the card of a checkpoint that has a record, as `difloat quantize` writes one, and return the file.

    Args:
        directory: The checkpoint.
        base_model: The name on the hub of the model that was quantized, like ``owner/model``.
        license: The identifier of the licence, which quantizing does not change. None leaves it out.
        tags: Further tags of the card.
        overwrite: Whether to replace a README.md that `write` has not written.

    Raises:
        FileNotFoundError: if there is no record.
        FileExistsError: if a README.md of another origin is there.
        ValueError: if `base_model` is no name of a repository.
    """
    target = Path(directory) / CARD
    content = text(directory, base_model, license, tags)
    if target.exists() and CARD_MARK not in target.read_text(encoding="utf-8") and not overwrite:
        raise FileExistsError(
            f"{CARD} must be one that difloat wrote, got another; say --overwrite to replace it"
        )
    return replace_file(target, content.encode())


def text(
    directory: str | os.PathLike[str], base_model: str, license: str | None = None, tags: Sequence[str] = ()
) -> str:
    """The card that `write` writes. It raises the errors of `write` about the record and the name."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(base_model)
    made = build.read(Path(directory))[0]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized",
        library_name="diffusers",
        license=license,
        tags=[*_tags(made), *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n\n{body(made, base_model)}"


def _tags(made: Record) -> list[str]:
    """The tags for method, widths and grids, without repeats."""
    grids = sorted({name for row in made.layers for name in row.weight_format.split(" + ")})
    integer = all(row.integer_grid for row in made.layers)
    kind = f"{'int' if integer else 'fp'}{made.weight_bits_nominal:g}"
    return list(dict.fromkeys(["difloat", "quantized", made.recipe, made.bits, kind, *grids]))


def _text(value: str) -> str:
    """A text of a record as Markdown shows it: on one line, without marks, tags, links or table columns of its own."""
    line = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", line)


def body(made: Record, base_model: str) -> str:
    """The text of the card below the front matter."""
    change = size_text(made.original_bytes, made.packed_bytes, 2)
    measured = (
        f"The same {made.samples} prompts and seeds through both models; intervals are 95 % bootstrap intervals over pictures."
        if made.quality
        else "No pictures were drawn for this checkpoint, so there is no measured quality."
    )
    return "\n".join(
        [
            f"# {_text(base_model)}, {_text(made.recipe)} {_text(made.bits)}",
            "",
            f"The denoiser of [{_text(base_model)}](https://huggingface.co/{base_model}), quantized by difloat with the recipe "
            f"{_text(made.recipe)} at {_text(made.bits)}: {decimal(made.packed_bytes, precision=2)} instead of "
            f"{decimal(made.original_bytes, precision=2)} in 16 bits ({change}), {made.effective_bits:.2f} bits per "
            "quantized weight with scales.",
            "",
            "## Use",
            "",
            "```python",
            "import difloat  # lets diffusers read the packed layers",
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("path or name of this repository")',
            "```",
            "",
            "## Measured",
            "",
            measured,
            "",
            *_table(made),
            "## What is quantized",
            "",
            f"{len(made.layers)} layers; {len(made.left_float)} layers and {len(made.skipped) - len(made.left_float)} "
            f"other modules stay in high precision. {_text(made.attention)}".strip(),
            f"Made with difloat {_text(made.versions.get('difloat', ''))}".strip()
            + f" on {_text(made.created[:10])}.",
            "",
        ]
    )


def _table(made: Record) -> list[str]:
    if not made.quality:
        return []
    lines = ["| measure | value | 95 % interval | full precision |", "|---|---|---|---|"]
    for row in made.quality:
        value = f"{row.value:.4g} {_text(row.unit)}".strip()
        interval = "-"
        if row.low is not None and row.high is not None and math.isfinite(row.low + row.high):
            interval = f"{row.low:.4g} to {row.high:.4g}"
        reference = "-" if row.reference is None else f"{row.reference:.4g}"
        lines.append(f"| {_text(row.label)} | {value} | {interval} | {reference} |")
    return [*lines, ""]

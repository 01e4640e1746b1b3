"""Commands that look at what is there: inspect, card, verify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from difloat.cli.app import app
from difloat.cli.options import Checkpoint, Revision, Source, quiet_libraries
from difloat.cli.tables import console


@app.command()
def inspect(
    source: Source,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Say what computes it on this machine.")] = False,
    revision: Revision = None,
) -> None:
    """Show what a model consists of, and what of it can be quantized or is. Only configs and headers are read."""
    from difloat import sources
    from difloat.cli import kernel_summary
    from difloat.layers import packed as rooms

    quiet_libraries()
    found = sources.outlined(sources.Source(source, revision=revision))
    module = found.model
    rows: list[tuple[str, str, Sequence[int], str, str]] = []
    for name, layer in module.named_modules():
        if isinstance(layer, rooms.QuantizedLayer):
            spec = layer.parts[0].activation
            activation = "-" if spec is None else spec.format.name
            rows.append((name, layer.plan().kind, layer.float_shape, layer.weight_formats(), activation))
    quantized = len(rows)
    for name, plain in rooms.quantizable(module).items():
        kind = "linear" if plain.weight.dim() == 2 else "conv2d"
        rows.append((name, kind, tuple(plain.weight.shape), "float", "-"))
    if layers:
        table = Table("layer", "kind", "weight shape", "values", "weight format", "activation format")
        for name, kind, shape, weight_format, activation in rows:
            shape_text = " x ".join(map(str, shape))
            table.add_row(name, kind, shape_text, f"{math.prod(shape):,}", weight_format, activation)
        console.print(table)
    weights = sum(math.prod(shape) for _, _, shape, _, _ in rows)
    console.print(
        f"{type(module).__name__}: {quantized} quantized and {len(rows) - quantized} float layers, {weights:,} weights "
        f"in them, {decimal(found.stored_bytes, precision=2)} in its files"
    )
    if kernels:
        console.print(
            "\n".join([kernel_summary.machine(), kernel_summary.times(), *kernel_summary.layers(module)]),
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def card(
    directory: Checkpoint,
    base_model: Annotated[str, typer.Option(help="Name on the hub of what was quantized, like owner/model.")],
    license: Annotated[str | None, typer.Option(help="Identifier of the base model's licence.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; repeatable.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md of another origin.")
    ] = False,
) -> None:
    """Write README.md for a model hub: front matter, and the measured table from the checkpoint's report."""
    from difloat.report import model_card as cards

    file = cards.write(directory, base_model, license=license, tags=tag or [], overwrite=overwrite)
    console.print(f"card       {file}", highlight=False, soft_wrap=True)


@app.command()
def verify(directory: Checkpoint) -> None:
    """Prove a checkpoint: hashes, shapes, scales, legal codes, bit-exact re-encoding, size. Exit code 1 if one fails."""
    from difloat import checkpoint

    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be a directory, but {directory} does not exist; check the path")
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json", "difloat.json")):
        raise ValueError(f"checkpoint must have a config.json or model_index.json, got none in {directory}")
    findings = checkpoint.verify(directory)
    for finding in findings:
        mark = "[green]ok  [/green]" if finding.passed else "[red]FAIL[/red]"
        console.print(mark, f"{finding.check:10} {finding.component}", finding.message, highlight=False)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)

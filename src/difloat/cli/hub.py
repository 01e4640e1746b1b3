"""The command that sends a checkpoint to a model hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from difloat.cli.app import app
from difloat.cli.options import Checkpoint
from difloat.cli.tables import console


@app.command()
def push(
    directory: Checkpoint,
    repository: Annotated[str, typer.Argument(help="On the hub, owner/name; made if it is not there.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="What was quantized, owner/model; left out, the card that difloat card wrote."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Identifier of the base model's licence.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; repeatable.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    upload: Annotated[
        bool, typer.Option("--upload", help="Send it; without, only say what would be.")
    ] = False,
) -> None:
    """Send a checkpoint to the Hugging Face hub with its card and report. Says only what it would send, until --upload."""
    from difloat.report import hub

    made = hub.parcel(directory, repository, base_model=base_model, license=license, tags=tag or [])
    for name, size in made.files.items():
        console.print(f"{decimal(size):>10}  {name}", highlight=False, soft_wrap=True)
    for name in made.left:
        console.print(
            f"  stays here {name}, which is none of difloat's files", highlight=False, soft_wrap=True
        )
    total = f"{len(made.files)} files, {decimal(sum(made.files.values()))}"
    if "\nlicense:" not in made.card:
        console.print(
            "no licence in the card: give --license as the base model states it",
            highlight=False,
            soft_wrap=True,
        )
    if not upload:
        console.print(
            f"{total} for {repository}; nothing was sent, say --upload", highlight=False, soft_wrap=True
        )
        return
    console.print(
        f"{total} sent to {hub.push(directory, made, private=private)}", highlight=False, soft_wrap=True
    )

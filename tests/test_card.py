"""The card's front matter is what hubs read, its numbers are those of the record, and no other README is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from difloat.checkpoint import directories
from difloat.report import build, model_card
from difloat.report.render import LayerRow, Record


def made(**changes: object) -> Record:
    row = LayerRow(
        "proj", "linear", (4, 4), "e2m1 + e1m2", "tensor", None, "-", 1, -20.0, 0.1, 0.0, False, 9, 32, 4.5
    )  # fmt: skip
    quality = [
        {"name": "psnr", "label": "PSNR to full precision", "value": 23.456, "low": 22.0, "high": 25.0, "unit": "dB",
         "better": "higher", "reference": None},
        {"name": "retrieval", "label": "Caption retrieval", "value": 0.5, "low": 0.4, "high": float("inf"), "unit": "",
         "better": "higher", "reference": 0.75},
    ]  # fmt: skip
    fields = dict(
        title="t", recipe="lbfp", bits="w4a8", model="m", model_class="UNet", command="difloat quantize m out",
        created="2026-11-21T10:00:00", versions={"difloat": "1.2"}, machine="x", options={}, recipe_notes=[],
        original_bytes=4_000_000,
        packed_bytes=1_000_000, effective_bits=4.25, weight_bits_nominal=4.0, layers=[row],
        skipped=[("norm", "no layer", 8)], quality=quality, samples=8,
    )  # fmt: skip
    return Record(**{**fields, **changes})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    build.write(made(), empty, empty, tmp_path)
    return tmp_path


def parts(path: Path) -> tuple[dict, str]:
    _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_front_matter_and_table(checkpoint: Path) -> None:
    front, text = parts(model_card.write(checkpoint, "someone/emoji", license="apache-2.0", tags=["emoji"]))
    assert front == {
        "base_model": "someone/emoji",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "tags": ["difloat", "quantized", "lbfp", "w4a8", "fp4", "e1m2", "e2m1", "emoji"],
    }
    assert "| PSNR to full precision | 23.46 dB | 22 to 25 | - |" in text
    assert "| Caption retrieval | 0.5 | - | 0.75 |" in text
    assert "1.00 MB instead of 4.00 MB" in text and "4.00x smaller" in text and "4.25 bits" in text
    assert "Made with difloat 1.2 on 2026-11-21." in text
    assert "m out" not in text, "commands name local directories"


def test_the_hub_library_reads_it(checkpoint: Path) -> None:
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(model_card.write(checkpoint, "someone/emoji"))
    assert loaded.data.base_model == "someone/emoji" and loaded.data.library_name == "diffusers"
    assert "license" not in loaded.data.to_dict()


def test_without_pictures_it_says_so(tmp_path: Path) -> None:
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    build.write(made(quality=[], samples=0), empty, empty, tmp_path)
    _, text = parts(model_card.write(tmp_path, "someone/emoji"))
    assert "no measured quality" in text and "| measure |" not in text


def test_a_readme_of_another_origin_is_kept(checkpoint: Path) -> None:
    readme = checkpoint / "README.md"
    readme.write_text("my notes", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--overwrite"):
        model_card.write(checkpoint, "someone/emoji")
    assert readme.read_text(encoding="utf-8") == "my notes"
    model_card.write(checkpoint, "someone/emoji", overwrite=True)
    model_card.write(checkpoint, "someone/other")
    assert parts(readme)[0]["base_model"] == "someone/other"
    assert not list(checkpoint.glob(".README*"))


def test_names_and_records_are_checked(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Repo id"):
        model_card.write(checkpoint, "a b/c")
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        model_card.write(tmp_path / "nowhere", "someone/emoji")


def test_what_a_record_quotes_is_text(checkpoint: Path) -> None:
    from huggingface_hub import ModelCard

    nasty = "x`|[a](http://b) <script>alert(1)</script>\n---\n# *big* _under_"
    quality = [replace(row, label=nasty, unit=nasty) for row in made().quality]
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    changes = dict(
        recipe=nasty, bits=nasty, attention=nasty, quality=quality, versions={"difloat": nasty}, created=nasty
    )
    build.write(made(**changes), empty, empty, checkpoint)
    loaded = ModelCard.load(model_card.write(checkpoint, "some_one/emoji", license=nasty, tags=[nasty]))
    assert loaded.data.license == nasty and nasty in loaded.data.tags
    text = loaded.text.lstrip()
    assert text.startswith(f"{directories.CARD_MARK}\n\n# some\\_one/emoji, x\\`\\|\\[a\\]\\(http")
    assert "<script" not in text and "\n---\n" not in text and "&lt;script&gt;" in text
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Use",
        "## Measured",
        "## What is quantized",
    ]
    for line in text.splitlines():
        if line.startswith("|"):  # four columns, whatever a label says
            assert len(re.findall(r"(?<!\\)\|", line)) == 5


@pytest.mark.parametrize(
    ("packed", "words"),
    [(1_000_000, "(4.00x smaller)"), (4_640_000, "(1.16x larger)"), (4_000_000, "(the same size)")],
)
def test_larger_is_not_called_smaller(tmp_path: Path, packed: int, words: str) -> None:
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    build.write(made(packed_bytes=packed), empty, empty, tmp_path)
    text = parts(model_card.write(tmp_path, "someone/emoji"))[1]
    assert words in text and "0.86x" not in text
    page = (tmp_path / build.PAGE).read_text(encoding="utf-8")
    assert f"<small>{words.strip('()').split()[-1]}</small>" in page
    assert words.split()[-1].strip(")") in build.read(tmp_path)[0].summary

"""The report: complete, self-contained, escaped, the same twice, and honest about what it cannot show."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from difloat.evaluation.picture_metrics import METRICS
from difloat.report import figures, render
from difloat.report import text as text_module
from difloat.report.text import db_text, duration_text, number_text, percent_text, sortable_text

_VOID = {"meta", "img", "input", "br", "link", "hr"}


def _layer(index: int, **changes) -> render.LayerRow:
    row = render.LayerRow(
        name=f"blocks.{index}.proj",
        kind="linear",
        shape=(64, 32),
        weight_format="e2m1",
        weight_granularity="per output channel",
        activation_format="e4m3",
        activation_mode="static per tensor",
        parts=1,
        weight_error_db=-20.0 - index,
        zeros=0.25,
        zeros_before=0.0,
        integer_grid=False,
        bytes=64 * 32 // 2 + 128,
        bytes_before=64 * 32 * 2,
        effective_bits=4.5,
    )
    return replace(row, **changes)


def _record(**changes) -> render.Record:
    layers = [
        *(_layer(i) for i in range(7)),
        _layer(7, weight_format="e1m2", integer_grid=True),
        _layer(
            8,
            kind="conv2d",
            shape=(8, 16, 3, 3),
            activation_format=None,
            activation_mode="-",
        ),
        _layer(9, weight_format="int1+int3", weight_error_db=-math.inf, parts=2, note="split skip"),
    ]
    metric = {"name": "psnr", "label": "PSNR", "value": 21.34, "low": 20.9, "high": 21.8, "unit": "dB"}
    frechet = {
        "name": "frechet_to_data",
        "label": "Fréchet to data",
        "value": 14.2,
        "low": None,
        "high": None,
        "unit": "",
    }
    record = render.Record(
        title="tiny in four bits",
        recipe="lbfp",
        bits="w4a8",
        model="tiny",
        model_class="PixArtAlphaPipeline",
        command="difloat quantize tiny out --recipe lbfp --bits w4a8",
        created="2025-01-02T03:04:05+00:00",
        versions={"python": "3.11.0", "difloat": "0.1.0"},
        machine="a processor, 2 cores",
        options={"keep_8_bit": ["proj_out"], "steps": 200},
        recipe_notes=["The batch size is not stated; 16 is used."],
        original_bytes=7_000_000,
        packed_bytes=1_800_000,
        effective_bits=4.5,
        weight_bits_nominal=4,
        layers=layers,
        skipped=[("proj_out", "output layer", 2048), ("norm", "normalization", 128)],
        quality=[
            {**metric, "better": "higher", "reference": None},
            {**frechet, "better": "lower", "reference": 13.1},
        ],
        samples=100,
        prompts=["a red apple", "<script>alert('x')</script>"],
        seeds=[11, 12],
        trajectory={
            "timesteps": [999, 500, 1],
            "value": [0.001, 0.01, 0.1],
            "low": [5e-4, 5e-3, 0.05],
            "high": [0.002, 0.02, 0.2],
        },
        histograms=[render.Histogram("blocks.0.proj", [-1.0, 0.0, 1.0], [3, 5], [-0.5, 0.0, 0.5], "weight")],
        ranges=[render.TokenRanges("blocks.1.ff", [900.0, 100.0], [[0.0, 1, 2, 3, 40], [1.0, 2, 3, 4, 9]])],
        inputs=[
            render.InputShape("blocks.0.silu", [-0.28, -0.27, 0.1, 3.0, 4.0], 0.93, True, "ue2m2"),
            render.InputShape("blocks.0.norm", [-4.0, -3.0, 0.0, 3.0, 4.5], 0.11, False, "e2m1"),
        ],
        adapters=render.AdapterTable([900.0, 100.0], ["blocks.0.silu", "blocks.0.norm"], [[0, 1], [1, 1]]),
        tried=[
            render.Tried("polish", True, (0.71, 0.4, 1.02), 16, 4.8),
            render.Tried("schedule", False, (0.05, -0.11, 0.2), 16, None),
        ],
        timings=[("search", 1.5), ("learned rounding", 133.0)],
        peak_memory_bytes=1_000_000_000,
    )
    return replace(record, **changes)


def _pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert render.render(_record(), _pictures(2), _pictures(2, seed=1), path) == path
    return path.read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Collects what a page loads, and fails on tags that do not close in order or on an id used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in _VOID else [tag]
        for name, value in attrs:
            assert not name.startswith("on"), f"inline handler {name}"
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                (self.anchors if value.startswith("#") else self.sources).append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing(page):
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {anchor[1:] for anchor in reader.anchors} <= set(reader.ids)
    assert len(reader.sources) == 4 and all(source.startswith("data:image/") for source in reader.sources)
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_page_shows_every_layer_and_everything_that_was_kept(page):
    record = _record()
    for layer in record.layers:
        assert f"<code>{layer.name}</code>" in page
    for name, reason, _ in record.skipped:
        assert name in page and reason in page
    for text in (
        record.command,
        record.machine,
        record.recipe_notes[0],
        "split skip",
        "2 min 13 s",
        "3.11.0",
    ):
        assert text in page
    assert (
        "tiny, LBFP w4a8: 3.9x smaller (1.80 MB instead of 7.00 MB), PSNR 21.3 dB, Fréchet to data 14.2."
        in page
    )
    assert "1 of 10 layers ended on an evenly spaced grid" in page
    assert page.count(">worst<") == 5


def test_attention_is_told_where_it_is_quantized(page, tmp_path):
    said = "Inside 4 attention modules query, key and value are e2m3"
    made = _record(attention=said + ".")
    assert said not in page
    assert said in render.render(made, _pictures(2), _pictures(2), tmp_path / "a.html").read_text()


def test_what_was_tried_and_refused_is_told(page, tmp_path):
    assert "What was tried" in page
    assert '<td>polish</td><td>yes</td><td class="n">0.71</td><td class="n">0.40 to 1.02</td>' in page
    assert '<td>schedule</td><td>no</td><td class="n">0.05</td><td class="n">-0.11 to 0.20</td>' in page
    without = render.render(_record(tried=[]), _pictures(2), _pictures(2), tmp_path / "a.html").read_text()
    assert "What was tried" not in without


def test_text_is_escaped(page):
    assert "alert(&#39;x&#39;)" in page
    assert "alert('x')" not in page


def test_same_record_gives_same_bytes(tmp_path):
    first = render.render(_record(), _pictures(2), _pictures(2, seed=1), tmp_path / "a.html")
    second = render.render(_record(), _pictures(2), _pictures(2, seed=1), tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()


def test_page_and_user_style_leave_each_other_alone(page, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9.0, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        path = render.render(_record(), _pictures(2), _pictures(2, seed=1), tmp_path / "styled.html")
        assert dict(matplotlib.rcParams) == before
    assert path.read_text(encoding="utf-8") == page


def test_json_round_trip():
    record = _record()
    text = render.record_to_json(record)
    assert "Infinity" not in text
    assert render.record_from_json(text) == record


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": [{"nme": 1}]}'])
def test_foreign_json_is_refused(text):
    with pytest.raises(ValueError, match="report record must be JSON with the fields"):
        render.record_from_json(text)


def test_asymmetric_inputs_and_adapters_are_shown(page):
    inputs = page[page.index('id="inputs"') : page.index('id="router"')]
    assert "1 of 2 inputs" in inputs and "1 did" in inputs
    assert "blocks.0.silu" in inputs and "ue2m2" in inputs and "blocks.0.norm" not in inputs
    router = page[page.index('id="router"') : page.index('id="trajectory"')]
    assert "<svg" in router and "timestep" in router


def test_adapters_are_drawn_as_runs_of_timesteps():
    alone = figures.adapters([3.0, 2.0, 1.0], [[0, 0], [0, 0], [0, 0]], "a")
    first = figures.adapters([3.0, 2.0, 1.0], [[1, 0], [1, 0], [1, 0]], "a")
    both = figures.adapters([3.0, 2.0, 1.0], [[1, 0], [0, 1], [1, 0]], "a")
    runs = [picture.count("--quantized") for picture in (alone, first, both)]
    assert runs[0] == 0 < runs[1] < runs[2]


def test_almost_empty_record_renders(tmp_path):
    record = _record(
        layers=[],
        skipped=[],
        quality=[],
        prompts=[],
        seeds=[],
        trajectory=None,
        histograms=[],
        ranges=[],
        inputs=[],
        adapters=None,
        timings=[],
        options={},
    )
    nothing = np.zeros((0, 64, 64, 3), np.uint8)
    page = render.render(record, nothing, nothing, tmp_path / "r.html").read_text(encoding="utf-8")
    _Reader().feed(page)
    for section in ("pictures", "quality", "trajectory", "values", "time", "inputs", "router"):
        assert f'id="{section}"' not in page


def test_every_metric_is_explained(tmp_path):
    quality = [
        {
            "name": name,
            "label": m.label,
            "value": 1.0,
            "low": 0.5,
            "high": 1.5,
            "unit": m.unit,
            "better": m.better,
        }
        for name, m in METRICS.items()
    ]
    record = _record(quality=[{**metric, "reference": None} for metric in quality])
    page = render.render(record, _pictures(2), _pictures(2), tmp_path / "r.html").read_text(encoding="utf-8")
    explanations = re.findall(r'<tr><th scope="row">[^<]+<small>([^<]*)</small>', page)
    assert len(set(explanations)) == len(METRICS) and "" not in explanations


def test_bytes_add_up():
    record = _record(packed_bytes=100_000)
    parts = {part["css"]: part["bytes"] for part in render._byte_parts(record)}
    assert sum(parts.values()) == record.packed_bytes
    assert parts["codes"] == 8 * 64 * 32 // 2 + 8 * 16 * 9 // 2
    assert parts["mixed"] == record.layers[-1].bytes


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="report directory must exist, got .*nowhere"):
        render.render(_record(), _pictures(2), _pictures(2), tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize(
    ("reference", "quantized", "changes", "message"),
    [
        (_pictures(2).astype(np.float32), _pictures(2), {}, "reference_images must be uint8"),
        (_pictures(2), _pictures(1), {}, "must have the shape of reference_images"),
        (_pictures(3), _pictures(3), {}, "record.prompts must be empty or hold one entry per picture"),
        (
            _pictures(2),
            _pictures(2),
            {"quality": [{"name": "psnr"}]},
            "measure of a report must have the fields",
        ),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, reference, quantized, changes, message):
    with pytest.raises(ValueError, match=message):
        render.render(_record(**changes), reference, quantized, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(self, content):
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        render.render(_record(), _pictures(2), _pictures(2), path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "old"


def test_pictures_shrink_until_they_fit(monkeypatch):
    pictures = _pictures(4, 64)
    whole, how = figures.data_uris(pictures)
    assert all(uri.startswith("data:image/png") for uri in whole) and how == "stored without loss"
    monkeypatch.setattr(figures, "_PICTURE_BUDGET_BYTES", 6000)
    small, how = figures.data_uris(pictures)
    assert sum(map(len, small)) <= 6000 and how.startswith("reduced to 1/")
    monkeypatch.setattr(figures, "_PICTURE_BUDGET_BYTES", 100)
    with pytest.raises(ValueError, match="pictures must fit 100 bytes in all, got 4 of 64 by 64 pixels"):
        figures.data_uris(pictures)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (number_text, 0.1, "0.100"),
        (number_text, None, "–"),
        (db_text, -math.inf, "exact"),
        (db_text, -21.34, "-21.3"),
        (percent_text, 1e-6, "< 0.01 %"),
        (percent_text, 0.254, "25 %"),
        (duration_text, 0.42, "0.42 s"),
        (duration_text, 3725, "1 h 2 min"),
        (sortable_text, math.nan, ""),
    ],
)
def test_numbers_read_well(function, value, text):
    assert function(value) == text


def test_machine_and_versions_name_the_essentials():
    assert "cores" in render.machine()
    assert {"python", "torch", "numpy"} <= render.versions().keys()


def test_reports_of_earlier_versions_are_read():
    """They had a column of errors of outputs, which was never filled."""
    data = json.loads(render.record_to_json(_record()))
    for row in data["layers"]:
        row["output_error_db"] = None
    assert render.record_from_json(json.dumps(data)) == _record()


@pytest.mark.parametrize(
    ("original", "packed", "digits", "text"),
    [
        (390, 100, 1, "3.9x smaller"),
        (100, 116, 2, "1.16x larger"),
        (100, 116, 1, "1.2x larger"),
        (102, 100, 1, "1.02x smaller"),
        (100, 100, 2, "the same size"),
        (100_001, 100_000, 2, "the same size"),
        (100, 0, 1, "100.0x smaller"),
    ],
)
def test_sizes_say_in_which_direction(original, packed, digits, text):
    assert text_module.size_text(original, packed, digits) == text


def test_bytes_beyond_the_bits_are_explained_where_they_are():
    plain = replace(_record().layers[0], shape=(64, 32), bytes=1100, note="")
    packed_twice = replace(plain, bytes=2200, note="2 packed weights, one per stretch of timesteps")
    little_beside = replace(plain, bytes=1400, note="1 x rank 4 beside, 300 bytes in float16")
    assert _record(layers=[plain, little_beside], weight_bits_nominal=4.0).size_remark == ""
    remark = _record(layers=[plain, packed_twice, little_beside], weight_bits_nominal=4.0).size_remark
    assert remark.startswith("2 layers take 3.60 kB, 1.8 times what one weight of 4 bits takes")
    assert "2 packed weights" in remark and "--set adapters=1" in remark
    rotated = replace(plain, bytes=2200, note="input rotated in blocks of 256")
    assert _record(layers=[rotated], weight_bits_nominal=4.0).size_remark == ""
    branch = replace(plain, bytes=2200, note="1 x rank 4 beside, 1000 bytes in float16")
    remark = _record(layers=[branch], weight_bits_nominal=4.0).size_remark
    assert remark.endswith("; a smaller rank of the branches takes less")
    both = replace(rotated, note=f"{rotated.note}; {packed_twice.note}")
    assert "2 packed weights" in _record(layers=[both], weight_bits_nominal=4.0).size_remark


def test_layers_left_float_are_told_from_modules_without_a_layer():
    skipped = [("a", "excluded by the user", 8), ("norm", "LayerNorm, no layer to quantize", 4)]
    assert _record(skipped=skipped).left_float == [skipped[0]]

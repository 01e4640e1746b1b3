"""The report: what was quantized, what it saved and what it cost, as one HTML file that needs nothing else.

A `Record` is the plain data of one quantization run. It is stored as JSON, and `render` turns it, with pictures of both models,
into a page with inline styles, scripts, pictures and figures. The page opens without a network, and the same record gives the
same bytes. Nothing here looks at a model, which is left to those who fill the record.
"""

from __future__ import annotations

import math
import os
import platform
import re
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.filesize import decimal

from difloat.checkpoint.directories import replace_file
from difloat.numbers import formats
from difloat.report import figures, text
from difloat.report.record import (
    AdapterTable,
    Histogram,
    InputShape,
    LayerRow,
    Measure,
    Record,
    Share,
    TokenRanges,
    Tried,
    record_from_json,
    record_to_json,
    zeros_note,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterTable",
    "Histogram",
    "InputShape",
    "LayerRow",
    "Measure",
    "Record",
    "Share",
    "Tried",
    "TokenRanges",
    "machine",
    "record_from_json",
    "record_to_json",
    "render",
    "versions",
]
_WORST_LAYERS = 5


def machine() -> str:
    """The processor, cores, memory and CUDA device, if there is one, of this machine, in one line."""
    import torch

    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        processor = found.group(1).strip() if found else processor
    parts = [processor, f"{os.cpu_count()} cores"]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB RAM")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers. Packages that are not installed are left out."""
    result = {"python": platform.python_version()}
    for name in ("difloat", "torch", "diffusers", "transformers", "numpy", "safetensors"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def render(
    record: Record, reference_images: np.ndarray, quantized_images: np.ndarray, path: str | Path
) -> Path:
    """Write the report to a file and return its path. An older file is replaced only when the new one is complete.

    Args:
        record: The data to show.
        reference_images: The pictures of the full-precision model, uint8 [n, h, w, 3], where n may be 0.
        quantized_images: The pictures of the same seeds and prompts with the quantized model, in the same shape.
        path: The HTML file to write, in a directory that exists.

    Raises:
        ValueError: if pictures are not uint8 [n, h, w, 3] twice, prompts or seeds are too few, or a metric lacks a key.
        FileNotFoundError: if the directory does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"report directory must exist, got {str(path.parent)!r}; create it first")
    reference_images, quantized_images = np.asarray(reference_images), np.asarray(quantized_images)
    _check(record, reference_images, quantized_images)
    page = _page(record, reference_images, quantized_images)
    return replace_file(path, page.encode())


def _check(record: Record, reference: np.ndarray, quantized: np.ndarray) -> None:
    for name, pictures in (("reference_images", reference), ("quantized_images", quantized)):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            got = f"{pictures.dtype} {list(pictures.shape)}"
            raise ValueError(
                f"{name} must be uint8 of shape [n, h, w, 3], got {got}; convert the pictures first"
            )
    if reference.shape != quantized.shape:
        got = f"{list(quantized.shape)} and {list(reference.shape)}"
        raise ValueError(
            f"quantized_images must have the shape of reference_images, got {got}; sample the same seeds"
        )
    for name, items in (("prompts", record.prompts), ("seeds", record.seeds)):
        if items and len(items) < len(reference):
            got = f"{len(items)} for {len(reference)} pictures"
            raise ValueError(
                f"record.{name} must be empty or hold one entry per picture, got {got}; list all of them"
            )


def _page(record: Record, reference: np.ndarray, quantized: np.ndarray) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = partial(decimal, precision=2)
    for name in ("number", "db", "percent", "duration", "sortable"):
        environment.filters[name] = getattr(text, f"{name}_text")
    template = (
        resources.files("difloat").joinpath("assets").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    pairs, storage = _pairs(record, reference, quantized)
    curves = [
        figures.histogram(h.edges, h.counts, h.grid, f"histogram-{i}")
        for i, h in enumerate(record.histograms)
    ]
    return environment.from_string(template).render(
        r=record,
        inf=math.inf,
        size=text.size_text(record.original_bytes, record.packed_bytes).rpartition(" "),
        pairs=pairs,
        storage=storage,
        pixelated=bool(len(reference)) and max(reference.shape[1:3]) <= 160,
        byte_parts=_byte_parts(record),
        rows=_layer_rows(record),
        census=_census(record),
        zeros=_mean_zeros(record.layers, "zeros"),
        zeros_before=_mean_zeros(record.layers, "zeros_before"),
        zeros_note=zeros_note(record.layers),
        histograms=list(zip(record.histograms, curves, strict=True)),
        ranges=[
            (r.layer, figures.ranges(r.timesteps, r.quantiles, f"ranges-{i}"))
            for i, r in enumerate(record.ranges)
        ],
        lopsided=sorted((i for i in record.inputs if i.asymmetric), key=lambda i: -i.lopsided),
        router=figures.adapters(record.adapters.timesteps, record.adapters.table, "adapters")
        if record.adapters
        else None,
        bought=figures.bought([(share.bits, share.errors) for share in record.shares], "bought")
        if record.shares
        else None,
        trajectory=figures.trajectory(**record.trajectory) if record.trajectory else None,
        reasons=_by_reason(record.skipped),
    )


def _pairs(record: Record, reference: np.ndarray, quantized: np.ndarray) -> tuple[list[dict[str, Any]], str]:
    count = len(reference)
    uris, storage = figures.data_uris(np.concatenate([reference, quantized]))
    squared = (reference.astype(np.float64) - quantized) ** 2
    pairs = []
    for index in range(count):
        mean = float(squared[index].mean())
        pairs.append(
            {
                "reference": uris[index],
                "quantized": uris[count + index],
                "prompt": record.prompts[index] if record.prompts else "",
                "seed": record.seeds[index] if record.seeds else None,
                "psnr": 10 * math.log10(255**2 / mean) if mean else math.inf,
            }
        )
    return pairs, storage


def _byte_parts(record: Record) -> list[dict[str, Any]]:
    """The bytes by kind: packed codes, scales and the like, layers with several formats, and the rest in high precision."""
    codes_bytes = beside_bytes = mixed_bytes = 0
    for layer in record.layers:
        bits = _code_bits(layer.weight_format)
        layer_codes_bytes = min(layer.bytes, math.ceil(math.prod(layer.shape) * bits / 8)) if bits else 0
        codes_bytes += layer_codes_bytes
        beside_bytes += layer.bytes - layer_codes_bytes if bits else 0
        mixed_bytes += 0 if bits else layer.bytes
    after_bytes = max(0, record.packed_bytes - codes_bytes - beside_bytes - mixed_bytes)
    before_bytes = min(record.original_bytes, sum(layer.bytes_before for layer in record.layers))
    rest_bytes = record.original_bytes - before_bytes
    return [
        {"name": "weights before quantization", "css": "before", "bytes": 0, "before": before_bytes},
        {"name": "packed codes", "css": "codes", "bytes": codes_bytes, "before": 0},
        {"name": "layers of several formats", "css": "mixed", "bytes": mixed_bytes, "before": 0},
        {"name": "scales, zero points, adapters", "css": "scales", "bytes": beside_bytes, "before": 0},
        {"name": "kept in high precision", "css": "rest", "bytes": after_bytes, "before": rest_bytes},
    ]


def _code_bits(format_name: str) -> int | None:
    """The bits of one code, or None for a layer that mixes formats."""
    try:
        return formats.parse(format_name).bits
    except ValueError:
        return None


def _layer_rows(record: Record) -> list[dict[str, Any]]:
    """The layers with the widths of their error bars in percent, and whether they are among the worst."""

    def widths(errors_db: list[float]) -> list[float]:
        finite = [e for e in errors_db if math.isfinite(e)]
        low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
        scaled = [None if not math.isfinite(e) else (e - low) / (span or 1.0) for e in errors_db]
        return [0.0 if s is None else round(6 + 94 * s, 1) for s in scaled]

    def badness(layer: LayerRow) -> float:
        return -math.inf if math.isnan(layer.weight_error_db) else layer.weight_error_db

    worst = {layer.name for layer in sorted(record.layers, key=badness, reverse=True)[:_WORST_LAYERS]}
    weight = widths([layer.weight_error_db for layer in record.layers])
    return [
        {
            "layer": layer,
            "weights": math.prod(layer.shape),
            "weight_bar": w,
            "worst": layer.name in worst,
        }
        for layer, w in zip(record.layers, weight, strict=True)
    ]


def _census(record: Record) -> list[dict[str, Any]]:
    """One entry per weight format, the one with most weights first."""
    groups: dict[tuple[str, bool], list[LayerRow]] = {}
    for layer in record.layers:
        groups.setdefault((layer.weight_format, layer.integer_grid), []).append(layer)
    total = sum(math.prod(layer.shape) for layer in record.layers) or 1
    census = [
        {
            "format": name,
            "integer": integer,
            "layers": len(layers),
            "share": sum(math.prod(layer.shape) for layer in layers) / total,
            "bytes": sum(layer.bytes for layer in layers),
            "zeros": _mean_zeros(layers, "zeros"),
        }
        for (name, integer), layers in groups.items()
    ]
    return sorted(census, key=lambda entry: (-entry["share"], entry["format"]))


def _mean_zeros(layers: Sequence[LayerRow], attribute: str) -> float:
    weights = [math.prod(layer.shape) for layer in layers]
    zeros: float = sum(getattr(layer, attribute) * n for layer, n in zip(layers, weights, strict=True))
    return zeros / (sum(weights) or 1)


def _by_reason(skipped: Iterable[tuple[str, str, int]]) -> list[tuple[str, list[tuple[str, int]]]]:
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, reason, size_bytes in skipped:
        groups.setdefault(reason, []).append((name, size_bytes))
    return sorted(groups.items(), key=lambda item: -sum(size for _, size in item[1]))

"""Verification of a checkpoint: hashes, plan, tensors, scales, codes, re-encoding and size."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from difloat.checkpoint.integrity import first_fault, unlisted
from difloat.checkpoint.layout import INPUT_BUNDLE, CheckpointError, StoredTensor, bundled_names, check_stored
from difloat.checkpoint.manifest import MANIFEST, read_manifest
from difloat.checkpoint.save_load import components, read_plan
from difloat.numbers.packing import pack
from difloat.plan.encode import plan_layer, stored_values
from difloat.plan.plan import LayerPlan, Plan

_MAX_OVERHEAD = 1.03
# A model of a few small layers is mostly header; no header entry needs more than its name and this.
_HEADER_BYTES_PER_TENSOR = 128
_HEADER_BYTES = 256
# What reading damaged files may raise; safetensors and torch have errors of their own.
_DAMAGE = (ValueError, OSError, RuntimeError, MemoryError, SafetensorError)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, in one sentence.

    Attributes:
        check: "hashes", "plan", "scales", "codes", "re-encode" or "size". "plan" covers version, dtypes and shapes.
        component: The component of the pipeline. It is "" for a model on its own, and for the hashes, which cover all files.
        passed: Whether the check holds.
        message: A sentence about the finding.
    """

    check: str
    component: str
    passed: bool
    message: str


def verify(directory: str | os.PathLike[str]) -> list[Finding]:
    """Check everything that can be checked without the original model, and list every check that was made.

    >>> import difloat
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32))
    >>> _ = difloat.quantize(model, "rtn", "w4a8", progress=False)
    >>> [finding.check for finding in verify(difloat.save(model, "model")) if finding.passed]
    ['hashes', 'plan', 'scales', 'codes', 're-encode', 'size']

    The checkpoint is whole exactly if all findings passed. Whatever is wrong is a finding, also a directory that does not exist
    or that difloat has not written. The hashes guard against accidents, not against someone who changes the manifest as well.
    """
    root = Path(directory)
    try:
        found = components(root)
    except _DAMAGE as error:
        return [_failure("plan", "", error)]
    findings = [_hashes(root)]
    for name, path in found.items():
        try:
            plan, stored = read_plan(path)
            message = f"{len(plan.layers)} quantized layers as planned by {plan.recipe} {plan.bits}"
        except _DAMAGE as error:
            findings.append(_failure("plan", name, error))
            continue
        findings.append(Finding("plan", name, True, message))
        try:
            findings += _check_layers(name, plan, stored)
            findings.append(_size(name, stored))
        except _DAMAGE as error:
            findings.append(_failure("codes", name, error))
    return findings


def _failure(check: str, component: str, error: BaseException) -> Finding:
    return Finding(check, component, False, " ".join(str(error).split()) or type(error).__name__)


def _hashes(root: Path) -> Finding:
    if not (root / MANIFEST).is_file():
        hint = (
            f"{MANIFEST} must be there to prove the files, but is missing; save the model with difloat.save"
        )
        return Finding("hashes", "", False, hint)
    try:
        entries = read_manifest(root)
        fault = first_fault(root, entries) or unlisted(root, entries)
    except _DAMAGE as error:
        return _failure("hashes", "", error)
    return Finding(
        "hashes", "", not fault, fault or f"{len(entries)} files have the bytes they were saved with"
    )


def _check_layers(component: str, plan: Plan, stored: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Scales, codes and re-encoding of every layer, one layer in memory at a time."""
    failures: dict[str, list[str]] = {"scales": [], "codes": [], "re-encode": []}
    for name, layer in read_layers(plan, stored):
        try:
            for key, tensor in layer.tensors.items():
                if key != "weight":
                    check_stored(f"{name}.{key}", layer, tensor)
        except CheckpointError as error:
            failures["scales"].append(str(error))
            continue
        plain = [rows for number in range(layer.variants) for rows in layer.variant(number).split_rows()]
        if wrong := next(filter(None, map(_illegal_codes, plain)), ""):
            failures["codes"].append(
                f"{name}.weight must hold codes that the encoder writes, but has {wrong}; quantize or download it again"
            )
        elif not all(map(_encodes_to_itself, plain)):
            failures["re-encode"].append(
                f"{name}.weight must be its own nearest encoding, but is not under its scales; quantize or download it again"
            )
    passed = {
        "scales": "all scales are finite and positive (of tables not 0), all zero points finite, all rows in their bands",
        "codes": "all codes are legal and all padding bits zero",
        "re-encode": "decoding and encoding gives the same bytes in every layer",
    }
    for check, messages in failures.items():
        more = f" (and {len(messages) - 1} more layers)" if len(messages) > 1 else ""
        yield Finding(check, component, not messages, messages[0] + more if messages else passed[check])


def read_layers(plan: Plan, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, LayerPlan]]:
    """The layers of a checkpoint with their tensors, of which one is in memory at a time."""
    opened = {file: safe_open(file, framework="pt") for file in {tensor.file for tensor in stored.values()}}

    def read(name: str) -> torch.Tensor:
        return opened[stored[name].file].get_tensor(name)

    lengths = bundled_names(plan)
    vectors = (
        dict(zip(lengths, read(INPUT_BUNDLE).split(list(lengths.values())), strict=True)) if lengths else {}
    )
    for name, layer in plan.layers.items():
        tensors = {
            key: vectors[f"{name}.{key}"] if f"{name}.{key}" in vectors else read(f"{name}.{key}")
            for key in layer.tensors
        }
        yield name, replace(layer, tensors=tensors)


def _illegal_codes(layer: LayerPlan) -> str:
    """What is wrong with the codes of a layer of one weight and width, or "" if nothing is."""
    of_parts = layer.codes()
    for codes, part in zip(of_parts, layer.parts, strict=True):
        table = part.weight.format.decode_table
        for code in (number for number, value in enumerate(table) if not _legal(value)):
            if bool((codes == code).any()):
                return f"code {code} of {part.weight.format.name}, which is {table[code]}"
    repacked = [
        pack(codes, part.weight.format.bits) for codes, part in zip(of_parts, layer.parts, strict=True)
    ]
    return (
        ""
        if torch.equal(torch.cat(repacked, dim=1), layer.tensors["weight"])
        else "padding bits that are not zero"
    )


def _legal(value: float) -> bool:
    return math.isfinite(value) and not (value == 0 and math.copysign(1.0, value) < 0)


def _encodes_to_itself(layer: LayerPlan) -> bool:
    pieces = list(layer.weight().pieces())
    scales = [piece.scale for piece in pieces]
    zeros = [torch.zeros(0) if piece.zero_point is None else piece.zero_point for piece in pieces]
    weight_only = [type(part)(part.channels, part.weight) for part in layer.parts]
    again = plan_layer(stored_values(layer), weight_only, scales, weight_zero_points=zeros)
    return torch.equal(again.tensors["weight"], layer.tensors["weight"])


def _size(component: str, stored: Mapping[str, StoredTensor]) -> Finding:
    on_disk = sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()})
    bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
    tensors_bytes = sum(
        math.prod(tensor.shape) * bits.get(tensor.dtype, 8) // 8 for tensor in stored.values()
    )
    header_bytes = _HEADER_BYTES + sum(_HEADER_BYTES_PER_TENSOR + len(name.encode()) for name in stored)
    passed = on_disk <= max(_MAX_OVERHEAD * tensors_bytes, tensors_bytes + header_bytes)
    ratio = on_disk / max(tensors_bytes, 1)
    rule = "" if passed else f", which must be at most {_MAX_OVERHEAD}; save it again"
    return Finding(
        "size", component, passed, f"files take {on_disk} bytes, {ratio:.4f} times their tensors{rule}"
    )

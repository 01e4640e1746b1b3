"""Dtypes of what a checkpoint or a source stores, read from the headers of its files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from difloat.checkpoint.layout import INPUT_BUNDLE, StoredTensor, plan_tensors, read_headers
from difloat.plan.plan import Plan

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def common_dtype(plan: Plan | None, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Dtype of most floating values that are not quantized, float32 if there are none."""
    planned = {INPUT_BUNDLE} | (set(plan_tensors(plan)) if plan else set())
    counts: Counter[str] = Counter()
    for name, tensor in stored.items():
        if name not in planned and tensor.dtype in _TORCH_DTYPES:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return _TORCH_DTYPES[max(counts, key=lambda dtype: (counts[dtype], dtype))] if counts else torch.float32


def dtypes_of_tensors(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every floating tensor of a model directory, by name. Empty where there are no safetensors."""
    try:
        stored = read_headers(directory)
    except FileNotFoundError:
        return {}
    return {
        name: (_TORCH_DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in stored.items()
        if tensor.dtype in _TORCH_DTYPES
    }


def stored_dtypes(directory: Path) -> Counter[torch.dtype]:
    """How many floating values of a model directory are stored in which dtype. Empty where there are no safetensors."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, shape in dtypes_of_tensors(directory).values():
        counts[dtype] += math.prod(shape)
    return counts

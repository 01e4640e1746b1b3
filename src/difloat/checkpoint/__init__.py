"""Saving, loading and verifying checkpoints. Methods and recipes are not known here."""

from __future__ import annotations

from difloat.checkpoint.layout import CheckpointError
from difloat.checkpoint.save_load import load, mark_quantized, plan_of, save, unmark_quantized
from difloat.checkpoint.verify import Finding, verify

__all__ = [
    "CheckpointError",
    "Finding",
    "load",
    "mark_quantized",
    "plan_of",
    "save",
    "unmark_quantized",
    "verify",
]

"""The command line: `difloat inspect | quantize | repair | generate | evaluate | report | verify | demo`."""

from difloat.cli import checkpoints, pictures, quantization
from difloat.cli.application import app, main

__all__ = ["app", "checkpoints", "main", "pictures", "quantization"]

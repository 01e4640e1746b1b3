"""The command line; `difloat --help` lists the commands."""

from difloat.cli import checkpoints, diagnosis, interchange, pictures, quantization
from difloat.cli.application import app, main

__all__ = ["app", "checkpoints", "diagnosis", "interchange", "main", "pictures", "quantization"]

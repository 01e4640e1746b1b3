"""The command line, whose commands `difloat --help` lists."""

from difloat.cli import checkpoints, diagnosis, files, hub, pictures, quantization
from difloat.cli.app import app, main

__all__ = ["app", "checkpoints", "diagnosis", "files", "hub", "main", "pictures", "quantization"]

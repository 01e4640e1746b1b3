"""What one core of this machine can multiply at most, by instruction: loops in registers (`limits.cpp`), built by g++.

    python benchmarks/limits.py

prints billions of operations a second. A product and its sum count as two. `kernels.py` stores them beside its times.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("limits.cpp")


def measured() -> dict[str, float]:
    """Billions of operations a second by instruction, or nothing where there is no g++ or the processor is no x86-64."""
    compiler = shutil.which("g++")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        command = [compiler, "-O2", "-march=native", str(_SOURCE), "-o", str(program)]
        if subprocess.run(command, capture_output=True).returncode:
            return {}
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(number) for name, number in map(str.split, lines)}


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name} {rate:.0f}\n" for name, rate in measured().items()))

"""Run by test_finetune under a launcher: trains the students of that test and saves them from the first process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_finetune import in_two_ways

if __name__ == "__main__":
    torch.set_num_threads(1)
    students = in_two_ways()
    if os.environ["RANK"] == "0":
        torch.save(
            {name: one.state_dict() for name, one in students.items()}, Path(sys.argv[1]) / "students.pt"
        )

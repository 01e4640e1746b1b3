"""Run by test_finetune under `accelerate launch`: trains the student of that test and saves it from the first process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_finetune import prepared, student_of, trained

if __name__ == "__main__":
    torch.set_num_threads(1)
    task, plans = prepared()
    student = student_of(task, plans)
    trained(task, student)
    if os.environ["RANK"] == "0":
        torch.save(student.state_dict(), Path(sys.argv[1]) / "student.pt")

"""Fixtures that every test file may use; the suite runs offline, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import of huggingface_hub, so it must come first

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which diffusers and torch do where they please: kernels run in the interpreter on such
    # machines.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import diffusers.utils.logging
import transformers.utils.logging

# Both bind their handler to the stderr of the first call: not to that of a single test, which is closed after it.
diffusers.utils.logging.get_logger("diffusers")
transformers.utils.logging.get_logger("transformers")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes of the suite share the cores; the default is a thread per core for each of them.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test should run on; `pytest -m gpu` asks for the second one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh random generator on the CPU, the same for every test."""
    return torch.Generator().manual_seed(0)

"""Modes of torch that a caller may be in, and that must not change a decision: gradients, inference mode, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute products in the dtype of their operands, on every device, inside a ``with`` block or a decorated function."""
    with ExitStack() as stack:
        for device in {"cpu", *_accelerators()}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def plain() -> Iterator[None]:
    """Use torch as in a fresh program: gradients on, no inference mode, no autocast. It is a decorator as well."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


def normal(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy that autograd accepts where it was made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.detach().clone()


def check_defaults() -> None:
    """Refuse defaults for new tensors that would change decisions and the sampler's noise.

    Raises:
        ValueError: if torch's default dtype is not float32, or its default device not the CPU.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32 or device.type != "cpu":
        raise ValueError(
            "torch's defaults for new tensors must be float32 on the CPU while a model is quantized, got "
            f"{dtype} on {device}; call torch.set_default_dtype(torch.float32) and torch.set_default_device('cpu') before"
        )


def check_gradients(loss: Tensor) -> None:
    """Refuse a loss without gradients: the model itself then computes without them.

    Raises:
        ValueError: if it has none.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the model's forward must let gradients pass where rounding is learned or weights are fine-tuned, got none; take "
            "torch.no_grad and torch.inference_mode out of it, or choose a recipe that does not learn, such as rtn"
        )


def _accelerators() -> list[str]:
    found = torch.accelerator.current_accelerator()
    return [] if found is None else [found.type]

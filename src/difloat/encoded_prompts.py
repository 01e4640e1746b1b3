"""Text encoders that run first and leave the memory, with the embeddings of all prompts kept.

A text encoder can be larger than the denoiser, and after the prompts it is needed no more. So every batch runs up to its first
call of the denoiser, what `encode_prompt` gave is noted, and the encoders' weights are let go. A caller that needs an encoder
all the same, such as a batch that was not planned, gets it back from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difloat.calibration.collect import sampling_of
from difloat.calibration.rows import content_hash
from difloat.calibration.sampler_runs import WEIGHTS, Sampling, weights_of
from difloat.checkpoint.remote_code import INDEX
from difloat.checkpoint.save_load import dtype_argument
from difloat.job import Job
from difloat.methods import malloc_trim
from difloat.pipelines import quiet
from difloat.sources import Source, located

_ENCODE = "encode_prompt"


@contextmanager
def freed(
    fitted: Job, source: Source, prompts: Sequence[str] | None, call: Mapping[str, Any]
) -> Iterator[None]:
    """`encoded_first` for a pipeline that was loaded for this run alone, from a directory or the hub, and is calibrated.

    Args:
        fitted: The request and the pipeline.
        source: Where the pipeline came from.
        prompts: The same that `difloat.plan` takes.
        call: Further arguments of the pipeline's call.
    """
    pipeline, calibration = fitted.model, fitted.request.calibration
    needed = any(fitted.needs_data(bits) for bits in fitted.denoisers.values())
    kept = (
        source.embedded
        or source.base is not None
        or not text_encoders(pipeline).keys() - fitted.others.keys()
    )
    if kept or not needed or calibration.timesteps != "sampler" or not (located(source) / INDEX).is_file():
        yield
        return

    def load(name: str) -> Mapping[str, Tensor]:
        part = getattr(pipeline, name)
        place, dtype = located(source) / name, next(part.parameters()).dtype
        again = type(part).from_pretrained(place, variant=source.variant, **{dtype_argument(): dtype})
        return dict(again.named_parameters(remove_duplicate=False))  # shared ones may have been parted here

    with encoded_first(pipeline, sampling_of(pipeline, prompts, calibration, call), load):
        yield


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders that a pipeline calls in `encode_prompt` alone, as far as can be told from names.

    >>> text_encoders(object())
    {}
    """
    if not hasattr(pipeline, _ENCODE):
        return {}
    parts = getattr(pipeline, "components", {})
    return {
        name: part
        for name, part in parts.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


@contextmanager
def encoded_first(
    pipeline: Any, sampling: Sampling, load: Callable[[str], Mapping[str, Tensor]]
) -> Iterator[None]:
    """Inside, the text encoders of a pipeline are empty and its prompts encoded; afterwards both are as they were.

    Nothing happens to a pipeline without `encode_prompt`.

    Args:
        pipeline: The pipeline, which nobody else uses meanwhile.
        sampling: The batches that will be sampled.
        load: Gives the weights of the text encoder of a name by their names, as they are now.
    """
    encoders = text_encoders(pipeline)
    if not encoders:
        yield
        return
    noted: dict[str, Any] = {}
    summary, encode = weights_of(pipeline), getattr(pipeline, _ENCODE)
    empty: dict[str, Any] = {}

    def give_back(name: str) -> None:
        if name in empty:
            empty.pop(name).remove()
            fill(encoders[name], load(name))

    def encoded(*args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs)
        if key not in noted:
            for name in encoders:
                give_back(name)
            noted[key] = encode(*args, **kwargs)
        return noted[key]

    vars(pipeline).update({_ENCODE: encoded, WEIGHTS: summary})
    try:
        with quiet(pipeline), torch.no_grad():
            for batch in range(sampling.batches):
                sampling.run_to_denoiser(batch)
        for name, encoder in encoders.items():
            empty[name] = encoder.register_forward_pre_hook(partial(_asked_for, give_back, name))
            let_go(encoder)
        malloc_trim.release()
        yield
    finally:
        for name in (_ENCODE, WEIGHTS):
            vars(pipeline).pop(name, None)
        for name in encoders:
            give_back(name)


def _asked_for(give_back: Callable[[str], None], name: str, *_: Any) -> None:
    give_back(name)


def let_go(module: nn.Module) -> None:
    """Leave every parameter its shape, dtype and device, with the memory of one number."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters their values again."""
    for name, parameter in module.named_parameters():
        parameter.data = weights[name].to(parameter.device, parameter.dtype)


def _key(args: Any, kwargs: Any) -> str:
    """What a call is told apart by."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    told = [content_hash(leaf.cpu()) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return repr((told, str(structure)))

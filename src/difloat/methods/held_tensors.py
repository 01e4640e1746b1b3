"""How much a forward pass holds at every layer, by which it is decided where passes wait for each other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary


def watch(model: nn.Module, names: Iterable[str], held: dict[str, int]) -> list[RemovableHandle]:
    """Note what a pass that runs next holds right after its first call of each named layer.

    Counted are tensors that some module was given or gave and that are still in use, weights aside. They include skip
    connections and the residuals around blocks, since a later module is given them.

    >>> import torch
    >>> from difloat.methods.trace import removed
    >>> model, held = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)), {}
    >>> with torch.no_grad(), removed(watch(model, ["0", "1"], held)):
    ...     _ = model(torch.zeros(1, 4))
    >>> held
    {'0': 272, '1': 288}

    Args:
        model: The model.
        names: The layers.
        held: Where the bytes are noted, by layer.

    Returns:
        The hooks, which are removed after the pass.
    """
    known = WeakTensorKeyDictionary()

    def given(module: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                known[leaf] = None

    def gave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        given(module, output, None)
        if name in wanted and name not in held:
            held[name] = sum(
                {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in known)}.values()
            )

    wanted = frozenset(names)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(given, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(gave, name)))
    return handles

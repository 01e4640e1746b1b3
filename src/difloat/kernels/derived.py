"""What a backend derives from packed weights and keeps: once per weight, forgotten with it.

Entries are tied to the memory of the packed tensor (views of one parameter share it) and to its version counter, so a weight
that is loaded again in place is derived again. What is written through ``tensor.data`` is not seen; autograd does not see it
either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Derived = TypeVar("Derived")
_entries: dict[Hashable, tuple[tuple[StorageWeakRef, ...], tuple[int, ...], Any]] = {}


def derived(what: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Derived]) -> Derived:
    """The result of `make`, kept as long as the memory of all `sources` lives and is not written to.

    Args:
        what: Names the derivation, with all settings it depends on besides the sources.
        sources: Tensors it is made from.
        make: Makes it.
    """
    # A weak reference keeps the storage's header, so its address names no other storage while the entry is there.
    key = (
        what,
        *((s.untyped_storage()._cdata, s.storage_offset(), s.shape, s.stride(), s.dtype) for s in sources),
    )
    versions = tuple(0 if source.is_inference() else source._version for source in sources)
    found = _entries.get(key)
    if found is not None and found[1] == versions and not any(ref.expired() for ref in found[0]):
        return found[2]
    _forget()
    value = make()
    _entries[key] = (tuple(StorageWeakRef(s.untyped_storage()) for s in sources), versions, value)
    return value


def _forget() -> None:
    dead = [key for key, (refs, _, _) in _entries.items() if any(ref.expired() for ref in refs)]
    for key in dead:
        del _entries[key]


def resident_bytes() -> int:
    """Bytes of all tensors that are kept now."""
    _forget()
    kept = [value if isinstance(value, tuple) else (value,) for _, _, value in _entries.values()]
    return sum(item.nbytes for items in kept for item in items if isinstance(item, Tensor))

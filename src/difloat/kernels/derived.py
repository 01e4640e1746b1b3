"""A cache of what backends derive from packed weights: made once per weight, and forgotten with it.

Entries are tied to the memory of the packed tensor, which views of one parameter share, and to its version counter. So a weight
that is loaded again in place is derived again. A write through ``tensor.data`` is not noticed, as autograd does not notice it.
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
        what: A name of the derivation, with all settings that it depends on besides the sources.
        sources: The tensors that the result is made from.
        make: A function that makes the result.
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
    """The bytes of all tensors that the cache holds now."""
    _forget()
    kept = [value if isinstance(value, tuple) else (value,) for _, _, value in _entries.values()]
    return sum(item.nbytes for items in kept for item in items if isinstance(item, Tensor))

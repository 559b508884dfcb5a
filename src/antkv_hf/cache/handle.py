"""Storage-less stand-ins for K and V, so that an unmodified model meets a quantized cache.

`AnTKVCache.update` returns two `KVHandle`s: tensors with the right shape, dtype and device, and no data.
``F.scaled_dot_product_attention`` on them runs attention over the codes; the three calls of transformers' `repeat_kv`
stay lazy; any other operation materialises dense keys and values (correct, slow, one warning).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..attention.attend import attend
from ..attention.backends import Backend
from ..snapshot import Snapshot
from ..storage import LayerStorage
from .compiled_step import ELSEWHERE

SDPA = torch.nn.functional.scaled_dot_product_attention
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_EVERYTHING = slice(None)


class SharedSnapshot:
    """The snapshot behind a pair of handles, with what they share: backend, observing storage, dense copy."""

    def __init__(
        self, snapshot: Snapshot, backend: Backend, observer: LayerStorage | None, commit: bool,
        fixed_columns: int | None = None,
    ):  # fmt: skip
        self.fixed_columns = fixed_columns  # of a single token's mask that reaches beyond the tokens there are
        self.snapshot, self.backend, self.observer, self.commit = snapshot, backend, observer, commit
        self._dense: dict[str, torch.Tensor] | None = None

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None = None, **options) -> torch.Tensor:
        length = self.snapshot.length
        if mask is not None and mask.shape[-1] == (self.fixed_columns or length) > length:
            if query.shape[2] > 1:  # newer transformers pack a token's query heads as rows in the sdpa lane
                raise ValueError(
                    f"the attention mask covers {mask.shape[-1]} keys, but the cache holds {length}: {ELSEWHERE}"
                )
            mask = mask[..., :length]
        wiring: dict[str, Any] = dict(backend=self.backend, observer=self.observer, commit=self.commit)
        return attend(self.snapshot, query, mask, **wiring, **options)

    def dense(self, role: str, operation: str) -> torch.Tensor:
        if self._dense is None:
            if self.snapshot.key_codes is not None:
                warnings.warn(
                    f"{operation} made AnTKVCache decode all keys and values of a layer: correct, but slow and large, "
                    'and anchors are then chosen without queries. Use attn_implementation="sdpa", or '
                    'model.set_attn_implementation("antkv").',
                    stacklevel=2,
                )
            self._dense = dict(zip("kv", self.snapshot.dense()))
        return self._dense[role]


class KVHandle(torch.Tensor):
    """Keys (role "k") or values (role "v") of one layer; see the module's docstring.

    `stage` counts the steps of ``repeat_kv`` (0 plain, 1 after ``[:, :, None]``, 2 after ``expand``); `repeats` is how
    many query heads share a kv head once it is through.
    """

    shared: SharedSnapshot
    role: str
    repeats: int
    stage: int
    size_: tuple[int, ...]  # plain Python copy: reading `.shape` would come back through __torch_function__

    @staticmethod
    def __new__(cls, shared: SharedSnapshot, role: str, size, repeats: int = 1, stage: int = 0):
        tail = shared.snapshot.tail_keys
        handle = torch.Tensor._make_wrapper_subclass(cls, size, dtype=tail.dtype, device=tail.device)
        handle.shared, handle.role, handle.repeats, handle.stage = shared, role, repeats, stage
        handle.size_ = tuple(size)
        return handle

    def __init__(self, *args, **kwargs):
        pass

    @classmethod
    def pair(cls, shared: SharedSnapshot) -> tuple[KVHandle, KVHandle]:
        """Handles of the keys and values of a snapshot, ``(batch, kv_heads, length, dim)``."""
        past = shared.snapshot
        keys = (*past.tail_keys.shape[:2], past.length, past.tail_keys.shape[3])
        values = (*past.tail_values.shape[:2], past.length, past.tail_values.shape[3])
        return cls(shared, "k", keys), cls(shared, "v", values)

    def dense(self, operation: str = "an operation") -> torch.Tensor:
        """The plain tensor that this handle stands for."""
        plain = self.shared.dense(self.role, operation)
        if self.stage == 0 and self.repeats == 1:
            return plain
        batch, heads, length, dim = plain.shape
        plain = plain.unsqueeze(2)
        if self.stage == 1:
            return plain
        plain = plain.expand(batch, heads, self.repeats, length, dim)
        return plain if self.stage == 2 else plain.reshape(batch, heads * self.repeats, length, dim)

    def data_ptr(self) -> int:
        raise RuntimeError(
            "a KVHandle of AnTKVCache has no memory, so no kernel can take it; call .dense() for a plain tensor"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KVHandle(role={self.role!r}, shape={self.size_})"

    def _like(self, size, repeats: int, stage: int) -> KVHandle:
        return KVHandle(self.shared, self.role, size, repeats, stage)

    def _repeat_kv_step(self, func, args) -> KVHandle | None:
        """The next handle if `func` is the next call of transformers' ``repeat_kv`` (or changes nothing)."""
        size = self.size_
        if func is torch.Tensor.__getitem__ and self.stage == 0 and self.repeats == 1:
            if args[1] == (_EVERYTHING, _EVERYTHING, None, _EVERYTHING, _EVERYTHING):
                return self._like((*size[:2], 1, *size[2:]), 1, 1)
        elif func is torch.Tensor.expand and self.stage == 1 and len(args) == 6:
            if (*args[1:3], *args[4:]) == (*size[:2], *size[3:]):
                return self._like(args[1:], args[3], 2)
        elif func is torch.Tensor.reshape and self.stage == 2:
            if tuple(args[1:]) == (size[0], size[1] * size[2], *size[3:]):
                return self._like(args[1:], self.repeats, 0)
        elif func is torch.Tensor.contiguous and self.stage == 0:
            return self
        return None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is SDPA:
            call = {**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs}
            key, value = call["key"], call["value"]
            if _is_pair(key, value) and not isinstance(call["query"], KVHandle) and not call.get("dropout_p"):
                return key.shared.attend(
                    call["query"],
                    call.get("attn_mask"),
                    scale=call.get("scale"),
                    is_causal=call.get("is_causal", False),
                )
        if args and isinstance(args[0], KVHandle) and not kwargs:
            step = args[0]._repeat_kv_step(func, args)
            if step is not None:
                return step
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        def plain(x):
            return x.dense(str(func)) if isinstance(x, KVHandle) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _is_pair(key, value) -> bool:
    return (
        isinstance(key, KVHandle)
        and isinstance(value, KVHandle)
        and key.shared is value.shared
        and (key.role, value.role) == ("k", "v")
        and key.stage == value.stage == 0
    )

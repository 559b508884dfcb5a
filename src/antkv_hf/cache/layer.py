"""One layer of `AnTKVCache` behind transformers' cache-layer interface."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from ..anchors import AnchorScore
from ..attention.backends import make_backend
from ..codecs import LayerCodec
from ..config import AnTKVConfig
from ..static_storage import StaticStorage
from ..storage import LayerStorage
from ..storage_check import check_tail, check_tensors
from .compiled_step import NewToken, Ticket
from .handle import KVHandle, SharedSnapshot

_FOREIGN = "this cache belongs to another model; make a new one"


def quantizable_layers(layers: list, config: AnTKVConfig) -> list[int]:
    """Indices of transformers' cache `layers` that hold plain full attention and are not skipped."""
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in config.skip_layers]


def check_layer_numbers(config: AnTKVConfig, count: int) -> None:
    """Raises ValueError if `config` names a layer beyond the `count` layers of a model."""
    for name in ("skip_layers", "layer_specs"):
        if beyond := [i for i in getattr(config, name) if i >= count]:
            raise ValueError(f"{name} names layer {beyond[0]}, but the model has {count} layers (0 to {count - 1})")


_KINDS = {  # transformers' cache layers that are not quantized, in words
    "DynamicSlidingWindowLayer": "sliding window",
    "LinearAttentionLayer": "linear attention",
    "DynamicIndexedLayer": "indexed sparse attention",
    "DummyLayer": "without keys of their own",
}


def layers_kept_as_they_are(layers: list, config: AnTKVConfig) -> str:
    """Which of transformers' cache `layers` are not quantized: ``"5 sliding window, 1 skipped"``; empty for none."""
    quantized = set(quantizable_layers(layers, config))
    kinds = Counter(
        "skipped" if i in config.skip_layers else _KINDS.get(type(layer).__name__, type(layer).__name__)
        for i, layer in enumerate(layers)
        if i not in quantized
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def drop_states(layer: Any) -> None:
    """Empties a growing layer of transformers before its own ``reset``, which only zeroes tensors before 5.23.

    New tokens would be concatenated to the zeros, and attention would see those.
    """
    if not isinstance(layer, DynamicLayer):
        return
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "is_indexer_initialized"):
        vars(layer).update(indexer_keys=None, is_indexer_initialized=False)


def check_crop(index: int, layer: Any) -> None:
    """Raises ValueError, before any layer has changed, for one that transformers keeps and cannot take back tokens of.

    Args:
        index: its number, for the message.
    """
    if isinstance(layer, AnTKVLayer) or getattr(layer, "record_past", False):
        return
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        what = "linear attention"
    elif getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window:
        what = f"{layer.get_seq_length()} tokens in a sliding window of {layer.sliding_window}"
    else:
        return
    raise ValueError(
        f"layer {index} ({what}) has let go of what cropping needs: call cache.activate_past_recording() before the "
        "tokens that may be cropped are read, or cache.reset()"
    )


def checked_rows(method: str, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """`rows` (numbers, or a mask) of a `batch` (-1: of an empty cache) on the CPU, for the `method` that they change.

    Raises:
        ValueError: they are no whole numbers, or the batch has no such row; naming the first.
    """
    picked = rows.cpu()
    if picked.dtype.is_floating_point:
        raise ValueError(f"{method} got rows of {picked.dtype}: give whole numbers, e.g. torch.tensor([0, 0, 1])")
    if batch < 0:
        return picked
    if picked.dtype == torch.bool:
        if tuple(picked.shape) != (batch,):
            raise ValueError(
                f"{method} got a mask {tuple(picked.shape)} for a batch of {batch}: give one of ({batch},)"
            )
        return picked
    lowest = -batch if method == "batch_select_indices" else 0  # which indexes, as one does from the end
    if wrong := [row for row in picked.tolist() if not lowest <= row < batch]:
        raise ValueError(f"{method} names row {wrong[0]} of a batch of {batch}: rows run from {lowest} to {batch - 1}")
    return picked


class LayerPlan:
    """What a layer needs to start: built once for a model, shared by its caches (`codec` makes tables on a device)."""

    def __init__(
        self, layer_idx: int, config: AnTKVConfig, score: AnchorScore | None, codec_for_device,
        max_length: int | None = None, compileable: bool = False,
    ):  # fmt: skip
        self.compileable = compileable
        self.layer_idx, self.config, self.score, self.max_length = layer_idx, config, score, max_length
        self._codec_for_device = codec_for_device

    def __deepcopy__(self, memo: dict) -> LayerPlan:
        return self

    def codec(self, device: torch.device, kv_heads: int, key_dim: int, value_dim: int) -> LayerCodec:
        return self._codec_for_device(self.layer_idx, device, kv_heads, key_dim, value_dim)


class AnTKVLayer(CacheLayerMixin):
    """Keys and values of one attention layer: codes of the past, anchors, and an exact recent window.

    Tokens that leave the window are encoded right after the attention call that follows `update` (its queries score
    them), so a long prefill holds the exact keys of one layer at a time; where attention did not come through a handle
    (eager), and single tokens with `max_length`, at the next `update`. After `activate_past_recording` (assisted and
    prompt-lookup decoding) they are encoded in `crop` instead, which generate then calls at every step.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.plan = plan
        self.storage: LayerStorage | None = None
        self.record_past = False
        self.is_compileable = plan.compileable
        self._ticket: Ticket | None = None

    @property
    def _stored(self) -> LayerStorage:
        if self.storage is None:
            raise RuntimeError(f"layer {self.plan.layer_idx} of AnTKVCache is empty: call update first")
        return self.storage

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        codec = self.plan.codec(key_states.device, key_states.shape[1], key_states.shape[3], value_states.shape[3])
        backend = make_backend(self.plan.config.backend, codec, key_states.device, key_states.dtype)
        start = codec, self.plan.config, self.plan.score, key_states, value_states, backend
        limit = self.plan.max_length
        self.storage = LayerStorage(*start) if limit is None else StaticStorage(*start, max_length=limit)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Adds new keys (after RoPE) and values ``(batch, kv_heads, n, dim)``.

        Returns:
            Two `KVHandle`s that stand for all keys and values, ``(batch, kv_heads, length, dim)``.

        Raises:
            ValueError: if grad is enabled, no token is given, or batch, heads, dtype or device differ from what is
                cached. Nothing has changed then.
        """
        if self._ticket is not None and torch.compiler.is_compiling() and key_states.shape[2] == 1:
            return NewToken(self._ticket, key_states), NewToken(self._ticket, value_states)  # the operator comes back
        self.check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ticketed = self._ticket is not None and self._ticket.order.device == key_states.device
        if self.is_compileable and not ticketed and not torch.compiler.is_compiling():
            self._ticket = Ticket(self, key_states.device)
        storage = self._stored
        with torch.no_grad():
            if not self.record_past:
                storage.commit()
            storage.append(key_states, value_states)
        commit = storage.commits_at_once and not self.record_past
        columns = self.plan.max_length if self.is_compileable else None
        return KVHandle.pair(SharedSnapshot(storage.snapshot(), storage.backend, storage, commit, columns))

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raises ValueError, naming numbers, if new keys and values ``(batch, kv_heads, n, dim)`` cannot be taken."""
        storage = self.storage
        self.check_beside(keys, values, None if storage is None else (storage.tail_keys, storage.tail_values))

    def check_beside(
        self, keys: torch.Tensor, values: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """As `check`, for a layer before this one that transformers keeps: it would take what this layer refuses.

        Args:
            held: keys and values of the layer that the new ones are of; None: it is empty, and takes any size, dtype
                and device.
        """
        name = f"layer {self.plan.layer_idx} of AnTKVCache"
        if keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"{name}: keys {tuple(keys.shape)} and values {tuple(values.shape)} do not belong together: both are "
                "(batch, kv heads, new tokens, size)"
            )
        self.check_batch(keys, values)
        self.require_room(keys.shape[2])
        if held is None:
            return
        heads, size, value_size = held[0].shape[1], held[0].shape[3], held[1].shape[3]
        if keys.shape[1] != heads or keys.shape[3] != size:
            raise ValueError(
                f"{name}: kv heads and head size changed from {heads} x {size} to {keys.shape[1]} x {keys.shape[3]}: "
                f"{_FOREIGN}"
            )
        if values.shape[3] != value_size:
            raise ValueError(f"{name}: value size changed from {value_size} to {values.shape[3]}: {_FOREIGN}")
        for kind, new, old in zip(("keys", "values"), (keys, values), held):
            if new.device != old.device or new.dtype != old.dtype:
                raise ValueError(
                    f"{name}: {kind} moved from {old.dtype} on {old.device} to {new.dtype} on {new.device}; "
                    "a cache stays where it was first filled: make a new one"
                )

    def check_batch(self, *states: torch.Tensor) -> None:
        """Raises ValueError if new `states` ``(batch, ...)`` want gradients, or are of another batch than is held."""
        name = f"layer {self.plan.layer_idx} of AnTKVCache"
        if torch.is_grad_enabled() and any(state.requires_grad for state in states):
            raise ValueError(
                f"{name}: keys require grad, and gradients cannot flow through codes. "
                "Run the model under torch.no_grad() or model.generate(), or train with DynamicCache."
            )
        if self.storage is not None and states[0].shape[0] != self.batch_size:
            raise ValueError(
                f"{name}: batch size changed from {self.batch_size} to {states[0].shape[0]}; call cache.reset() for a "
                "new prompt, or cache.batch_repeat_interleave / batch_select_indices to change the batch"
            )

    def require_room(self, new_tokens: int) -> None:
        """Raises ValueError if there is no new token, or if so many more are beyond the cache's `max_length`."""
        limit, length = self.plan.max_length, self.get_seq_length()
        if new_tokens == 0:
            raise ValueError(
                f"layer {self.plan.layer_idx} of AnTKVCache: got 0 new tokens with {length} cached; the prompt is "
                "empty, or all of it is cached already: give at least one new token, or call cache.reset()"
            )
        if limit is not None and length + new_tokens > limit:
            need = length + new_tokens
            raise ValueError(
                f"layer {self.plan.layer_idx} of AnTKVCache: it was made for max_length={limit} tokens, but {length} "
                f"cached and {new_tokens} new ones are {need}: make it with max_length={need} or more (a whole text "
                "takes its prompt and new tokens, less one), or leave max_length out"
            )

    def restore(self, tensors: dict[str, torch.Tensor], record_past: bool) -> None:
        """Takes the buffers that `LayerStorage.tensors` gave (none: an empty layer), on the device they are to stay on.

        Raises:
            ValueError: naming the first that does not fit this layer's codec and config.
        """
        if tensors:
            check_tail(tensors)
            self.lazy_initialization(tensors["tail_keys"], tensors["tail_values"])
            check_tensors(tensors, self._stored)
            empty = self._stored
            self.storage = LayerStorage.from_tensors(empty.codec, empty.config, empty.score, tensors, empty.backend)
        self.record_past = record_past

    def get_seq_length(self) -> int:
        return 0 if self.storage is None else self.storage.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_compileable and query_length == 1:
            return self.get_max_length(), 0  # a mask whose shape stays
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.plan.max_length is None else self.plan.max_length

    @property
    def batch_size(self) -> int:
        return -1 if self.storage is None else self.storage.tail_keys.shape[0]

    def reset(self) -> None:
        self.storage, self.is_initialized, self.record_past = None, False, False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, coded ones included; 0 removes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) must not be positive: give minus the number of tokens to remove from the end"
            )
        if self.storage is None:
            return
        if tokens_to_remove:
            self.storage.crop(max(self.storage.length + tokens_to_remove, 0))
        if self.record_past:
            self.storage.commit()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.storage is not None:
            self.storage.map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.storage is not None:
            self.storage.map_batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.storage is not None:
            self.storage.map_batch(lambda t: t[indices.to(t.device), ...])

    def offload(self) -> None:
        raise NotImplementedError(
            f"layer {self.plan.layer_idx} of AnTKVCache cannot be offloaded: its codes are small, and attention reads "
            "them where they are; for a smaller cache choose fewer bits, to set one aside call cache.save(path)"
        )

    def prefetch(self) -> None:
        pass

"""Honest accounting of what a cache takes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .layer import AnTKVLayer


@dataclass(frozen=True)
class MemoryFootprint:
    """Bytes of a cache by kind, as allocated; what is shared is named apart. Only token ids are left out: 8 bytes each.

    Args:
        codes: packed codes of all coded tokens, the anchors' own slots included.
        anchors: anchor keys, values, scales and positions. sinks: the first tokens, likewise.
        window: exact recent tokens. scores: running statistics for the anchor score.
        other_layers: layers that are not quantized (sliding windows, skipped layers).
        reserved: set aside for tokens to come by a cache with `max_length`; the other kinds are what is in use.
        tables: codebooks on the device, shared by every cache of the model.
        tokens: tokens held by the first quantized layer, all sequences together; coded_tokens: those that are codes.
        coded_elements, elements: elements (keys and values, all quantized layers) of those tokens.
        dense_bytes: what `DynamicCache` takes for the same tokens in the same dtype.
    """

    codes: int
    anchors: int
    sinks: int
    window: int
    scores: int
    other_layers: int
    reserved: int
    tables: int
    tokens: int
    coded_tokens: int
    coded_elements: int
    elements: int
    dense_bytes: int

    @property
    def total(self) -> int:
        """All bytes but the shared tables."""
        used = self.codes + self.anchors + self.sinks + self.window + self.scores
        return used + self.other_layers + self.reserved

    @property
    def bits_per_element(self) -> float:
        """Bits a coded element costs: codes, anchors, positions, scales and sinks; window and tables not counted."""
        return 8 * (self.codes + self.anchors + self.sinks) / self.coded_elements if self.coded_elements else 0.0

    @property
    def bits_per_element_with_window(self) -> float:
        """Bits an element of the quantized layers costs on average, window and scores included."""
        used = self.total - self.other_layers - self.reserved
        return 8 * used / self.elements if self.elements else 0.0

    @property
    def compression(self) -> float:
        """How many times smaller than `DynamicCache` (tables not counted)."""
        return self.dense_bytes / self.total if self.total else 1.0

    def to_dict(self) -> dict[str, int | float]:
        derived = ("total", "bits_per_element", "bits_per_element_with_window", "compression")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        kinds = ("codes", "anchors", "sinks", "window", "scores", "other_layers", "reserved")
        parts = ", ".join(f"{name} {getattr(self, name):,}" for name in kinds if getattr(self, name))
        bits = f"{self.bits_per_element:.2f} bits per coded element" if self.coded_elements else "no token coded yet"
        used = self.total - self.reserved
        size = f"{self.dense_bytes / used:.1f}x smaller" if used < self.dense_bytes else "no smaller"
        beside = ", the reserve left out" if self.reserved else ""
        return (
            f"{self.total:,} bytes for {self.tokens:,} tokens ({parts}); {bits}, "
            f"{self.bits_per_element_with_window:.2f} with the window; {size} than DynamicCache ({self.dense_bytes:,})"
            f"{beside}; tables, shared by all caches of the model: {self.tables:,}"
        )


def measure(layers: Iterable[Any], first: AnTKVLayer) -> MemoryFootprint:
    """What the layers of a cache take, of which `first` is the first quantized one."""
    sizes: Counter[str] = Counter(codes=0, anchors=0, sinks=0, window=0, scores=0, other_layers=0, reserved=0)
    coded_elements = elements = dense = tables = 0
    for layer in layers:
        if not isinstance(layer, AnTKVLayer):
            held = [t for t in tree_leaves(vars(layer)) if isinstance(t, torch.Tensor)]  # linear attention has dicts
            size = sum(t.numel() * t.element_size() for t in held)
            sizes["other_layers"] += size
            dense += size
        elif layer.storage is not None:
            storage = layer.storage
            sizes.update(storage.memory_bytes())
            keys, values = storage.tail_keys, storage.tail_values
            width = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])  # elements of a token
            coded_elements += storage.coded_length * width
            elements += storage.length * width
            dense += storage.length * width * keys.element_size()
            tables += storage.codec.memory_bytes()
    batch = max(first.batch_size, 0)
    coded = 0 if first.storage is None else first.storage.coded_length
    return MemoryFootprint(
        **sizes,
        tables=tables,
        tokens=batch * first.get_seq_length(),
        coded_tokens=batch * coded,
        coded_elements=coded_elements,
        elements=elements,
        dense_bytes=dense,
    )

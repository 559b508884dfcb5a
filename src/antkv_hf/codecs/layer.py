"""The codecs of one layer together with its RoPE: keys are coded as they were before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..rotary import Rotary
from .base import Codec


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """Key and value codec of one layer; `rotary` is None where keys are coded as they come (no RoPE, identity)."""

    key: Codec
    value: Codec
    rotary: Rotary | None = None
    kernel_tables: dict[torch.dtype, Any] = field(default_factory=dict, repr=False)  # filled by `attention.tables`

    def __deepcopy__(self, memo: dict) -> LayerCodec:
        return self  # immutable: a copied cache shares the tables

    def plain_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE ``(batch, kv_heads, n, head_dim)`` at `positions` ``(batch, n)`` -> before RoPE, float32."""
        if self.rotary is None:
            return keys
        return self.rotary.unrotate(keys.float(), positions.unsqueeze(1))

    def rotated_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `plain_keys`; `positions` is ``(batch, n)`` or ``(batch, kv_heads, n)``."""
        if self.rotary is None:
            return keys
        return self.rotary.rotate(keys, positions if positions.ndim == 3 else positions.unsqueeze(1))

    def decode_keys(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE that the codes at `positions` ``(batch, n)`` stand for."""
        return self.rotated_keys(self.key.decode(codes), positions)

    def memory_bytes(self) -> int:
        """Bytes of all tables, kernels' copies included."""
        kernel = {
            id(t): t.numel() * t.element_size()
            for tables in self.kernel_tables.values()
            for table in tables
            for t in table
            if isinstance(t, torch.Tensor)
        }
        return self.key.memory_bytes() + self.value.memory_bytes() + sum(kernel.values())

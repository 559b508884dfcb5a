"""What a rival is: it stores one layer's keys and values in tensors, reads them back, and counts what it stored."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from antkv_hf.evaluation import AttentionCall

Stored = dict[str, torch.Tensor]


class Rival(ABC):
    """A quantizer as `ProtocolEvaluator` takes it (``read_back=rival``).

    Nothing passes from `encode` to `decode` but the tensors of `Stored`, so their bytes are what a token costs.
    """

    table_bytes = 0  # of tables that all sequences share, float16 where they are numbers

    def __init__(self) -> None:
        self.stored_bytes = self.elements = 0

    def __call__(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self.encode(call.layer, call.keys, call.values)
        self.stored_bytes += sum(t.numel() * t.element_size() for t in stored.values())
        self.elements += call.keys.numel() + call.values.numel()
        keys, values = self.decode(call.layer, stored, (call.keys.shape[-1], call.values.shape[-1]))
        return keys.float(), values.float()

    @property
    def bits(self) -> float:
        """Bits an element of all that has been read back so far, everything stored counted."""
        return 8 * self.stored_bytes / self.elements

    @abstractmethod
    def encode(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        """Keys after RoPE and values ``(batch, kv_heads, n, dim)`` as they would lie in memory."""

    @abstractmethod
    def decode(self, layer: int, stored: Stored, dims: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values that `stored` stands for; `dims`: sizes of a key and of a value."""

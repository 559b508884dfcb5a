"""The identity codec: codes are the vectors themselves. With it a cache must equal `DynamicCache` (used by tests)."""

from __future__ import annotations

import torch


class IdentityCodec:
    """Keeps vectors unchanged; saves no memory."""

    bits_per_element = float("nan")  # that of the model's dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes

    def weighted_sum(self, weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return weights @ codes.to(weights.dtype)

    def memory_bytes(self) -> int:
        return 0

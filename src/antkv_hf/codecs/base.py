"""What a codec is: how the vectors of one layer become packed codes, and back."""

from __future__ import annotations

from typing import Protocol

import torch


class Codec(Protocol):
    """Codes of one layer's keys or values. Immutable: one object serves every cache of the model.

    Vectors are ``(batch, kv_heads, n, head_dim)``; codes are ``(batch, kv_heads, n, width)`` of any dtype that packs
    well (uint8 for vector quantization). A position is an index into dimension 2 of the codes.
    """

    bits_per_element: float

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of `x`."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors that the codes stand for, in the tables' compute dtype."""
        ...

    def weighted_sum(self, weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """``weights @ decode(codes)``; weights ``(batch, kv_heads, rows, n)`` -> ``(batch, kv_heads, rows, head_dim)``.

        A codec may apply what is linear (a basis, a mean) once after the sum instead of once a token.
        """
        ...

    def memory_bytes(self) -> int:
        """Bytes of the tables on their device."""
        ...

"""The quantized past of one attention layer as the kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .tables import KeyTables, ValueTables


class ExactTokens(NamedTuple):
    """Tokens among the coded ones that are kept exactly and stand in for their codes.

    Args:
        positions: int32 ``(batch, kv_heads, m)``, index into the sequence, -1 for an empty slot.
        keys, values: ``(batch, kv_heads, m, dim)``, plain channels. 16- or 32-bit keys are as after RoPE; int8 ones are
            before RoPE with the tables' mean taken off.
        key_scale, value_scale: float16 ``(batch, kv_heads, m, 1)`` for int8, else None.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


class QuantizedPast(NamedTuple):
    """Codes of the tokens at indices 0, 1, ... and the exact tokens among them.

    Buffers may be larger than what they hold (`coded`): n is then their capacity, and unused slots of `exact` are -1.

    Args:
        key_codes, value_codes: uint8 ``(batch, kv_heads, n, width)``, contiguous.
        exact: sets of exact tokens; no token is in two of them.
        exact_bits: uint8 ``(batch, kv_heads, ceil(n / 8))``: bit ``t % 8`` of byte ``t // 8`` says that token t is
            among the exact ones, so that its code must not count.
        offset: int64 ``(batch,)``: a token's RoPE position is its index minus this (left padding).
        coded: coded tokens, as the host knows them; None: n.
        lengths: int32 ``(3,)``: coded tokens, tail tokens, slots in use of the large set of `exact`, on the device. If
            given, decode attention reads them there and not from any shape, so that a CUDA graph of it stays right as
            they grow; `coded` is then only what its programs are planned for, and a token at an index below `offset` is
            not visible.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_tables: KeyTables
    value_tables: ValueTables
    exact: tuple[ExactTokens, ...]
    exact_bits: torch.Tensor
    offset: torch.Tensor
    coded: int | None = None
    lengths: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Coded tokens that the buffers have room for."""
        return self.key_codes.shape[2]

    @property
    def length(self) -> int:
        """Coded tokens."""
        return self.capacity if self.coded is None else self.coded

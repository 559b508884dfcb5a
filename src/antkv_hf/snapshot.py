"""One layer as attention sees it, whoever owns its buffers (`storage`, `static_storage`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codecs import LayerCodec, ScalarScales
from .exact_tokens import ExactTokens


@dataclass(frozen=True)
class StaticBuffers:
    """The buffers of a `StaticStorage`, used and unused parts.

    Args:
        key_codes, value_codes: ``(batch, kv_heads, capacity, width)``.
        sinks, anchors: slots that are not in use have position -1; None if there never are any.
        exact_bits: as in `Snapshot`, of the whole capacity.
        tail_keys, tail_values, statistic: ``(batch, kv_heads, rows, dim)`` and ``(batch, kv_heads, rows)``; the
            statistic is 0 beyond the tail.
        lengths: int32 ``(3,)``: coded tokens, tail tokens, slots in use of the anchors (without any, of the sinks).
        holds_tail: False while a prompt's tail is held beside `tail_keys`.
        padded: whether any sequence has padding.
        planned: coded tokens that a captured step is to be planned for; None outside of one.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    sinks: ExactTokens | None
    anchors: ExactTokens | None
    exact_bits: torch.Tensor
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    statistic: torch.Tensor
    lengths: torch.Tensor
    holds_tail: bool = True
    padded: bool = False
    planned: int | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every buffer but `lengths`."""
        exact = [t for tokens in (self.sinks, self.anchors) if tokens is not None for t in tokens.tensors()]
        rest = [self.key_codes, self.value_codes, self.exact_bits, self.tail_keys, self.tail_values, self.statistic]
        return [t for t in (*rest, *exact) if t is not None]


@dataclass(frozen=True)
class Snapshot:
    """One layer as attention sees it: coded past, exact tokens, and the exact tail with the current chunk.

    Args:
        key_codes, value_codes: ``(batch, kv_heads, coded, width)`` or None while nothing is coded.
        exact_tokens: sinks and anchors among the coded tokens; `exact_bits` is uint8
            ``(batch, kv_heads, ceil(coded / 8))`` with bit ``t % 8`` of byte ``t // 8`` set for each of them.
        scales: what scalar codes need beside themselves; None for other codecs.
        tail_keys, tail_values: ``(batch, kv_heads, tail, dim)`` after RoPE, model dtype.
        offset: int64 ``(batch,)``: a token's RoPE position is its index minus this (left padding).
        static: the whole buffers of a `StaticStorage`, of which codes, exact tokens and tail are views; else None.
    """

    codec: LayerCodec
    key_codes: torch.Tensor | None
    value_codes: torch.Tensor | None
    exact_tokens: tuple[ExactTokens, ...]
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    offset: torch.Tensor
    exact_bits: torch.Tensor | None = None
    scales: ScalarScales | None = None
    static: StaticBuffers | None = None

    @property
    def coded_length(self) -> int:
        return 0 if self.key_codes is None else self.key_codes.shape[2]

    @property
    def length(self) -> int:
        return self.coded_length + self.tail_keys.shape[2]

    @property
    def key_center(self) -> torch.Tensor | None:
        """What `ExactTokens` needs to read int8 keys."""
        return self.codec.key_center(self.scales)

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """RoPE positions ``(batch, stop - start)`` of the tokens at indices ``start..stop-1``."""
        return torch.arange(start, stop, device=self.offset.device) - self.offset.unsqueeze(1)

    def unpadded(self) -> torch.Tensor:
        """bool ``(batch, 1, 1, length)``: True from each sequence's first real token on."""
        return (self.positions(0, self.length) >= 0)[:, None, None]

    def decode_keys(self, start: int, stop: int) -> torch.Tensor:
        """Keys after RoPE that the codes of tokens ``start..stop-1`` stand for."""
        assert self.key_codes is not None
        codes = self.key_codes[:, :, start:stop]
        return self.codec.decode_keys(codes, self.positions(start, stop), self.scales, start)

    def block_keys(self, start: int, stop: int) -> torch.Tensor:
        """The same keys seen from the block's first token; `block_query` turns queries to match."""
        assert self.key_codes is not None
        keys = self.codec.decode_plain(self.key_codes[:, :, start:stop], self.scales, start)
        return keys if self.codec.rotary is None else self.codec.rotary.rotate_block(keys)

    def block_query(self, query: torch.Tensor, start: int) -> torch.Tensor:
        """Queries ``(batch, kv_heads, group, q_len, head_dim)`` after RoPE seen from the block at `start`."""
        if self.codec.rotary is None:
            return query
        return self.codec.rotary.turn_back(query, (start - self.offset).view(-1, 1, 1, 1))

    def exact_mask(self) -> torch.Tensor | None:
        """bool ``(batch, kv_heads, coded)``: True where an exact token stands in for the code; None if nowhere."""
        if not self.exact_tokens or self.exact_bits is None:
            return None
        bits = (self.exact_bits.unsqueeze(-1) >> torch.arange(8, device=self.exact_bits.device)) & 1
        return bits.flatten(-2)[..., : self.coded_length].bool()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as plain tensors ``(batch, kv_heads, length, dim)``: correct everywhere, and large."""
        if self.key_codes is None:
            return self.tail_keys, self.tail_values
        keys, values = self.dense_coded(0, self.coded_length)
        return torch.cat([keys, self.tail_keys], 2), torch.cat([values, self.tail_values], 2)

    def dense_coded(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values of the coded tokens ``start..stop-1``, exact tokens in their places."""
        assert self.value_codes is not None
        dtype = self.tail_keys.dtype
        keys = self.decode_keys(start, stop).to(dtype, copy=True)
        values = self.codec.decode_values(self.value_codes[:, :, start:stop], self.scales).to(dtype, copy=True)
        for tokens in self.exact_tokens:
            inside = (tokens.positions >= start) & (tokens.positions < stop)
            batch, head, slot = inside.nonzero(as_tuple=True)
            index = tokens.positions[batch, head, slot].long() - start
            exact_keys, exact_values = tokens.read(self.codec, self.offset, self.key_center)
            keys[batch, head, index] = exact_keys[batch, head, slot].to(dtype)
            values[batch, head, index] = exact_values[batch, head, slot].to(dtype)
        return keys, values

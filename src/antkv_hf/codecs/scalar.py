"""Scalar quantization without a codebook: keys by channel, values by token (KIVI, arXiv 2402.02750; OTT, 2505.10938).

Channels of keys have ranges of their own, which tokens share but for a few outliers: a channel's scale serves a group
of consecutive tokens, and tokens that stay exact do not widen it. Keys are coded before RoPE, where a constant bias is
a constant: the channel means of a sequence's first chunk are taken off, so that float16 zeros stay precise. Values are
brought to mean 0 and variance 1 in each channel by the same chunk, so that no channel decides a token's range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..config import ScalarSpec
from ..reference import scalar as reference
from .packing import pack_codes, unpack_codes


@dataclass(frozen=True)
class ScalarScales:
    """What scalar codes need to be read. Group i of the keys holds the tokens from ``starts[i]`` to the next.

    Args:
        starts: int32 ``(groups,)``, ascending from 0.
        scale, zero: float16 ``(batch, kv_heads, groups, head_dim)``, of keys.
        key_mean: float32 ``(batch, kv_heads, head_dim)``, taken off every key of the sequence before RoPE.
        value_mean, value_std: float32 ``(batch, kv_heads, value_dim)``: values are coded as ``(v - mean) / std``.
    """

    starts: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    value_std: torch.Tensor

    @classmethod
    def none(cls, keys: torch.Tensor, values: torch.Tensor) -> ScalarScales:
        """No group yet, for keys and values ``(batch, kv_heads, n, dim)``."""
        empty = keys[:, :, :0].to(torch.float16)
        key, value = (torch.zeros(*x.shape[:2], x.shape[3], device=keys.device) for x in (keys, values))
        starts = torch.zeros(0, dtype=torch.int32, device=keys.device)
        return cls(starts, empty, empty, key, value, torch.ones_like(value))

    def learn(self, keys: torch.Tensor, values: torch.Tensor, counted: torch.Tensor, known: torch.Tensor):
        """With means and deviations of the tokens `counted`, bool ``(batch, n)``, of the sequences not `known` yet.

        Args:
            keys: before RoPE, float32 ``(batch, kv_heads, n, head_dim)``; values likewise.
            known: bool ``(batch,)``: sequences whose codes rest on what they have.
        """
        weight = counted[:, None, :, None].float()
        count, known = weight.sum(2).clamp_min(1), known.view(-1, 1, 1)
        key_mean, value_mean = ((x.float() * weight).sum(2) / count for x in (keys, values))
        spread = (((values.float() - value_mean.unsqueeze(2)) * weight).square().sum(2) / count).sqrt()
        # A channel that happens to rest in this chunk may move later.
        typical = spread.square().mean(-1, keepdim=True).sqrt()
        spread = torch.where(typical > 0, spread.maximum(0.1 * typical), 1.0)
        return replace(
            self,
            key_mean=torch.where(known, self.key_mean, key_mean),
            value_mean=torch.where(known, self.value_mean, value_mean),
            value_std=torch.where(known, self.value_std, spread),
        )

    @property
    def center(self) -> torch.Tensor:
        """`key_mean` as it is added to keys: ``(batch, kv_heads, 1, head_dim)``."""
        return self.key_mean.unsqueeze(2)

    def of_tokens(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of the tokens ``start..stop-1``, each ``(batch, kv_heads, stop - start, head_dim)``."""
        token = torch.arange(start, stop, dtype=torch.int32, device=self.starts.device)
        group = torch.searchsorted(self.starts, token, right=True) - 1
        return self.scale.index_select(2, group), self.zero.index_select(2, group)

    def append(self, other: ScalarScales, first_token: int) -> ScalarScales:
        """With the groups of `other`, whose tokens begin at index `first_token` here."""
        return replace(
            self,
            starts=torch.cat([self.starts, other.starts + first_token]),
            scale=torch.cat([self.scale, other.scale], 2),
            zero=torch.cat([self.zero, other.zero], 2),
        )

    def crop(self, length: int) -> ScalarScales:
        """Without the groups that begin at token `length` or later."""
        left = int((self.starts < length).sum())
        scale, zero = (t[:, :, :left].clone() for t in (self.scale, self.zero))
        return replace(self, starts=self.starts[:left].clone(), scale=scale, zero=zero)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ScalarScales:
        """With `change` (a selection or repetition along the batch) applied."""
        return replace(self, **{name: change(t) for name, t in self.tensors().items() if name != "starts"})

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(vars(self))

    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class ChannelQuantizer:
    """Codes of one layer's keys: each channel's scale and zero are shared by a group of consecutive tokens.

    Args:
        spec: bits and tokens of a group.
        head_dim: channels of a key.
    """

    def __init__(self, spec: ScalarSpec, head_dim: int):
        self.spec, self.head_dim = spec, head_dim
        self.bits_per_element = spec.bits_per_element

    def encode(
        self, x: torch.Tensor, scales: ScalarScales, excluded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ScalarScales]:
        """Packed codes of keys before RoPE, and `scales` with their groups alone; the first begins with the first key.

        Args:
            x: float32 ``(batch, kv_heads, n, head_dim)``; the last group is smaller if `n` is no multiple.
            scales: whose means are used.
            excluded: bool ``(batch, kv_heads, n)``: tokens that are read from elsewhere; theirs are nearest codes.

        Returns:
            uint8 ``(batch, kv_heads, n, bytes)``, and scales.
        """
        batch, heads, n, _ = x.shape
        group = self.spec.group
        if excluded is None:
            excluded = torch.zeros(batch, heads, n, dtype=torch.bool, device=x.device)
        pad = -n % group
        padded = torch.nn.functional.pad(x.float() - scales.center, (0, 0, 0, pad)).unflatten(2, (-1, group))
        excluded = torch.nn.functional.pad(excluded, (0, pad), value=True).unflatten(2, (-1, group))
        scale, zero = reference.scale_and_zero(padded, self.spec.bits, 3, excluded.unsqueeze(-1))
        codes = reference.quantize(padded, scale, zero, self.spec.bits).flatten(2, 3)[:, :, :n]
        starts = torch.arange(0, n, group, dtype=torch.int32, device=x.device)
        found = replace(scales, starts=starts, scale=scale.squeeze(3), zero=zero.squeeze(3))
        return pack_codes(codes, self.spec.bits), found

    def decode(self, codes: torch.Tensor, scales: ScalarScales, start: int = 0) -> torch.Tensor:
        """Keys before RoPE, float32, of `codes` ``(batch, kv_heads, n, bytes)``, the tokens from index `start` on."""
        scale, zero = scales.of_tokens(start, start + codes.shape[2])
        plain = reference.dequantize(unpack_codes(codes, self.spec.bits, self.head_dim), scale, zero)
        return plain + scales.center

    def memory_bytes(self) -> int:
        return 0


class TokenQuantizer:
    """Codes of one layer's values: a group of a token's channels shares a scale and a zero.

    A row is the packed codes, then the float16 scales of the groups, then their zeros.

    Args:
        spec: bits and channels of a group.
        head_dim: channels of a value.
    """

    def __init__(self, spec: ScalarSpec, head_dim: int):
        self.spec, self.head_dim = spec, head_dim
        self.groups, self.code_bytes = spec.channel_groups(head_dim), spec.code_bytes(head_dim)
        self.bits_per_element = 8 * (self.code_bytes + 4 * self.groups) / head_dim

    def encode(self, x: torch.Tensor, scales: ScalarScales) -> torch.Tensor:
        """``(batch, kv_heads, n, head_dim)`` -> uint8 rows ``(batch, kv_heads, n, bytes)``."""
        grouped = self._grouped((x.float() - scales.value_mean.unsqueeze(2)) / scales.value_std.unsqueeze(2))
        scale, zero = reference.scale_and_zero(grouped, self.spec.bits, -1)
        codes = reference.quantize(grouped, scale, zero, self.spec.bits).flatten(-2)[..., : self.head_dim]
        shared = torch.cat([scale, zero], -2).squeeze(-1).view(torch.uint8)
        return torch.cat([pack_codes(codes, self.spec.bits), shared], -1)

    def decode(self, codes: torch.Tensor, scales: ScalarScales) -> torch.Tensor:
        """Rows -> values, float32."""
        return self._normalized(codes) * scales.value_std.unsqueeze(2) + scales.value_mean.unsqueeze(2)

    def weighted_sum(self, weights: torch.Tensor, codes: torch.Tensor, scales: ScalarScales) -> torch.Tensor:
        """``weights @ decode(codes)``, with means and deviations applied once after the sum."""
        total = (weights @ self._normalized(codes)) * scales.value_std.unsqueeze(2)
        return total + weights.sum(-1, keepdim=True) * scales.value_mean.unsqueeze(2)

    def memory_bytes(self) -> int:
        return 0

    def _normalized(self, codes: torch.Tensor) -> torch.Tensor:
        packed, shared = codes[..., : self.code_bytes], codes[..., self.code_bytes :].contiguous()
        scale, zero = shared.view(torch.float16).unsqueeze(-1).split(self.groups, -2)
        values = self._grouped(unpack_codes(packed, self.spec.bits, self.head_dim))
        return reference.dequantize(values, scale, zero).flatten(-2)[..., : self.head_dim]

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Channels in groups ``(..., groups, size)``; the last one is filled up with the last channel."""
        size = min(self.spec.group, self.head_dim)
        missing = self.groups * size - self.head_dim
        if missing:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
        return x.unflatten(-1, (self.groups, size))

"""Rotary position embedding in one canonical form, so that keys can be coded before it (no transformers in here)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Rotary:
    """RoPE of one layer: channel pair i turns by ``position * inv_freq[i]``, everything scaled by `scaling`.

    Args:
        inv_freq: angular frequency of each pair, float32 ``(pairs,)``.
        interleaved: pairs are channels (2i, 2i+1) if True (Cohere, GLM, GPT-J), else (i, i + pairs) (Llama and most).
        scaling: factor on the rotated channels (YaRN's attention scaling), 1.0 for most models.

    The first ``2 * pairs`` channels are rotated; the rest pass unchanged (partial RoPE: Phi, StableLM, GPT-NeoX).
    """

    inv_freq: torch.Tensor
    interleaved: bool = False
    scaling: float = 1.0
    _table: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)  # cos, sin of `rotate_block`

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def channel_pairs(self, head_dim: int) -> torch.Tensor:
        """Pairs of channels ``(head_dim // 2, 2)`` int64: the rotated ones first, then the rest in order."""
        n, first = self.inv_freq.shape[0], torch.arange(self.inv_freq.shape[0])
        rotated = torch.stack([2 * first, 2 * first + 1], 1) if self.interleaved else torch.stack([first, first + n], 1)
        return torch.cat([rotated, torch.arange(self.rotary_dim, head_dim).view(-1, 2)])

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Applies RoPE to `x` ``(..., n, head_dim)`` at integer `positions` broadcastable to ``(..., n)``."""
        return self._turn(x, positions, 1.0, self.scaling)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `rotate`: keys as they were before RoPE."""
        return self._turn(x, positions, -1.0, 1.0 / self.scaling)

    def rotate_block(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE at positions 0, 1, ... n-1 of a block, from a constant table; `x` is ``(..., n, head_dim)``.

        With `turn_back` on the queries this equals `rotate` at the true positions, for one table of any block.
        """
        n = x.shape[-2]
        table = self._table.copy()  # another thread may exchange it for one of another length at any time
        if not table or table[0].shape[0] < n:
            angle = torch.arange(n, device=x.device, dtype=torch.float32).unsqueeze(-1) * self.inv_freq
            self._table[:] = table = [angle.cos() * self.scaling, angle.sin() * self.scaling]
        cos, sin = (t[:n].to(x.dtype) for t in table)
        return self._apply(x, cos, sin)

    def turn_back(self, query: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Queries seen from a block that begins at position `start` (broadcastable to ``query.shape[:-1]``)."""
        return self._turn(query, start, -1.0, 1.0)

    def to(self, device: torch.device) -> Rotary:
        return Rotary(self.inv_freq.to(device), self.interleaved, self.scaling)

    def _turn(self, x: torch.Tensor, positions: torch.Tensor, sign: float, scale: float) -> torch.Tensor:
        angle = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq
        return self._apply(x, (angle.cos() * scale).to(x.dtype), (angle.sin() * (sign * scale)).to(x.dtype))

    def _apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n = self.inv_freq.shape[0]
        if self.interleaved:
            a, b = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = x[..., :n], x[..., n : 2 * n]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return turned if x.shape[-1] == 2 * n else torch.cat([turned, x[..., 2 * n :]], -1)

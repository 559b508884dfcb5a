"""How many anchors a chunk gets, and which tokens they are."""

from __future__ import annotations

import torch


def anchors_per_chunk(fraction: float, chunk: int) -> int:
    """Anchors of one chunk and kv head: at least one; 2% of 128 rounds to 3 (2.34%)."""
    return min(chunk, max(1, round(fraction * chunk)))


def select_anchors(scores: torch.Tensor, fraction: float, chunk: int) -> torch.Tensor:
    """Indices of the best-scored tokens of each chunk, per sequence and kv head.

    Args:
        scores: ``(batch, kv_heads, n)`` with n a multiple of `chunk`; -inf never wins over a finite score.
        fraction: share of a chunk that is kept.

    Returns:
        int64 ``(batch, kv_heads, n // chunk * anchors_per_chunk)``, ascending.
    """
    if scores.shape[-1] % chunk:
        raise ValueError(f"{scores.shape[-1]} tokens are not a multiple of the chunk of {chunk}")
    best = scores.unflatten(-1, (-1, chunk)).topk(anchors_per_chunk(fraction, chunk), -1).indices
    first = torch.arange(0, scores.shape[-1], chunk, device=scores.device)
    return (best + first.unsqueeze(1)).flatten(-2).sort(-1).values

"""How many anchors a chunk and a kv head get, and which tokens they are."""

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


def within_budget(held: torch.Tensor, scores: torch.Tensor, chunks: int, max_tokens: int) -> torch.Tensor:
    """Scores of candidates, -inf for those that find no place when their chunk comes: `max_tokens` are better already.

    Candidates compete with the anchors held and with those of chunks up to their own, so a prompt in one piece gives
    what it gives chunk by chunk. Of equal scores the earlier one is better.

    Args:
        held: ``(batch, kv_heads, m)``, scores of the anchors held; -inf for an empty slot.
        scores: ``(batch, kv_heads, chunks * k)``, k candidates of each chunk in order; -inf for none.
        max_tokens: places in all.
    """
    rivals = torch.cat([held, scores], -1)
    count, m = scores.shape[-1], held.shape[-1]
    place, mine = torch.arange(m + count, device=scores.device), torch.arange(m, m + count, device=scores.device)
    chunk_of = (place - m).div(max(count // chunks, 1), rounding_mode="floor")  # negative for those held
    better = rivals.unsqueeze(2) > scores.unsqueeze(3)
    better |= (rivals.unsqueeze(2) == scores.unsqueeze(3)) & (place < mine.unsqueeze(1))
    better &= chunk_of <= chunk_of[m:].unsqueeze(1)
    return scores.masked_fill(better.sum(-1) >= max_tokens, float("-inf"))


def best_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` best of `scores` ``(batch, kv_heads, m)``, ascending; of equal ones the earlier."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values

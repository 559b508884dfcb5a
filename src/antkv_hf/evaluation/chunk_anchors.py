"""The best tokens of every chunk of a whole text, in a few large steps."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..anchors import AnchorScore, TokenContext, best_tokens, select_anchors
from ..config import AnTKVConfig


def last_queries(n: int, chunk: int, window: int, device: torch.device) -> torch.Tensor:
    """The last query that scores each of `n` tokens, int64 ``(n,)``: the one at which a streaming cache, whose last
    `window` keys are exact, encodes its chunk."""
    return ((torch.arange(n, device=device) // chunk + 1) * chunk + window - 1).clamp_max(n - 1)


def best_of_chunks(
    score: AnchorScore, config: AnTKVConfig, chunk: int, query, keys, values, errors, statistic, last, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors of each chunk; sinks are never among them.

    Args:
        query: grouped float32 ``(batch, kv_heads, group, n, head_dim)``. keys, values: ``(batch, kv_heads, n, dim)``.
        errors: squared errors of keys (after RoPE) and values ``(batch, kv_heads, n)``.
        statistic: of the score's term ``(batch, kv_heads, n)``, or None. last: of `last_queries`.

    Returns:
        positions ``(batch, kv_heads, m)`` int64, and their scores, -inf where there is nothing to choose.
    """
    batch, _, n = keys.shape[:3]
    index = torch.arange(n, device=keys.device)
    moment = (query.square().sum(-1) * (scale**2 / query.shape[-1])).mean(2).cumsum(-1)
    variance = moment[..., last] / (last + 1)  # mean over the queries seen
    scores, full = [], n - n % chunk
    for part, size in ((slice(0, full), chunk), (slice(full, n), n - full)):
        if part.start == part.stop:
            continue

        def by_chunk(x: torch.Tensor, part=part, size=size) -> torch.Tensor:  # (batch * chunks, kv_heads, size, ...)
            return x[:, :, part].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

        context = TokenContext(
            statistic=None if statistic is None else by_chunk(statistic),
            keys=by_chunk(keys),
            values=by_chunk(values),
            key_error=by_chunk(errors[0]),
            value_error=by_chunk(errors[1]),
            logit_variance=by_chunk(variance)[..., :1],
            positions=index[part].view(-1, size).repeat(batch, 1),
        )
        scores.append(score.score(context).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2))
    padded = pad(torch.cat(scores, 2), (0, -n % chunk), value=float("-inf"))
    padded[:, :, : config.anchors.sinks] = float("-inf")
    chosen = select_anchors(padded, config.anchors.fraction, chunk)
    best = padded.gather(2, chosen)
    if config.anchors.max_tokens:  # those that a cache holds in the end: the others are read as codes throughout
        kept = best_tokens(best, config.anchors.max_tokens)
        chosen, best = chosen.gather(2, kept), best.gather(2, kept)
    return chosen, best

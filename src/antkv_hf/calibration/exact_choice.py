"""Which tokens of a text a cache keeps exact, found in a few large steps: a training step asks it of every layer."""

from __future__ import annotations

import torch

from ..anchors import get_score
from ..config import AnTKVConfig
from ..evaluation.chunk_anchors import best_of_chunks, last_queries
from ..reference.attention import grouped, logits_of
from ..reference.scores import ColumnTerm

_MAX_LOGITS = {"cpu": 1 << 20, "other": 1 << 26}  # of the attention map held at once


@torch.no_grad()
def exact_mask(
    config: AnTKVConfig, window: int, query, keys, values, errors, scale: float, softcap=None, sink_logit=None
) -> torch.Tensor:
    """Sinks and the anchors that `evaluation.protocols.choose_anchors` chooses, of whole texts without padding.

    Args:
        window: recent keys that stay exact, which decides the queries that score a token; 0: all do (W0).
        query: ``(batch, q_heads, n, head_dim)`` after RoPE. keys, values: ``(batch, kv_heads, n, dim)``.
        errors: squared errors of keys (after RoPE) and values ``(batch, kv_heads, n)``.

    Returns:
        bool ``(batch, kv_heads, n)``, True where a token stays exact.
    """
    anchors, (batch, kv_heads, n) = config.anchors, keys.shape[:3]
    index = torch.arange(n, device=keys.device)
    sinks = (index < anchors.sinks).expand(batch, kv_heads, n)
    score = get_score(anchors.score)
    if score is None or not anchors.enabled:
        return sinks
    chunk = config.chunk if window else n
    last, q, statistic = last_queries(n, chunk, window, keys.device), grouped(query, kv_heads), None
    if score.term is not None:
        statistic = _statistic(score.term, q, keys, values, last, scale, softcap, sink_logit)
    chosen, best = best_of_chunks(score, config, chunk, q, keys, values, errors, statistic, last, scale)
    mask = torch.zeros(batch, kv_heads, n + -n % chunk, dtype=torch.bool, device=keys.device)  # of whole chunks
    mask.scatter_(2, chosen, best > float("-inf"))
    return sinks | mask[..., :n]


def _statistic(term: ColumnTerm, q, keys, values, last, scale: float, softcap, sink_logit) -> torch.Tensor:
    """`reference.scores.column_statistic` of exact causal attention ``(batch, kv_heads, n)``, whole rows at a time.

    Args:
        q: grouped ``(batch, kv_heads, group, n, head_dim)``. last: last query that counts for each key ``(n,)``.
    """
    n = keys.shape[2]
    index = torch.arange(n, device=keys.device)
    limit = _MAX_LOGITS["cpu" if keys.device.type == "cpu" else "other"]
    step = max(1, limit // (q.shape[:3].numel() * n))
    out = torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows, row, column = q[:, :, :, start:stop], index[start:stop].unsqueeze(1), index[:stop]
        seen = values[:, :, :stop].float()
        logits = logits_of(rows, keys[:, :, :stop], scale, softcap).masked_fill_(column > row, float("-inf"))
        if sink_logit is not None:  # takes part in the denominator only
            sink = sink_logit.float().view(1, keys.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], -1)
        probs = logits.softmax(-1)[..., :stop].flatten(2, 3)
        output = probs @ seen
        counted = (row <= last[:stop]).repeat(q.shape[2], 1)
        out[:, :, :stop] += term(probs * counted, rows.flatten(2, 3), seen, output)
    return out

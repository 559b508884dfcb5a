"""Which tokens of a text a cache keeps exact, found in a few large steps: a training step asks it of every layer."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..anchors import TokenContext, best_tokens, get_score, select_anchors
from ..config import AnTKVConfig
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
    last = ((index // chunk + 1) * chunk + window - 1).clamp_max(n - 1)  # query that scores a token, (n,)
    q = grouped(query, kv_heads)
    statistic = None
    if score.term is not None:
        statistic = _statistic(score.term, q, keys, values, last, scale, softcap, sink_logit)
    moment = (q.square().sum(-1) * (scale**2 / q.shape[-1])).mean(2).cumsum(-1)
    variance = moment[..., last] / (last + 1)
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
    padded = pad(torch.cat(scores, 2).masked_fill(sinks, float("-inf")), (0, -n % chunk), value=float("-inf"))
    chosen = select_anchors(padded, anchors.fraction, chunk)
    best = padded.gather(2, chosen)
    if anchors.max_tokens:
        kept = best_tokens(best, anchors.max_tokens)
        chosen, best = chosen.gather(2, kept), best.gather(2, kept)
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, chosen, best > float("-inf"))
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

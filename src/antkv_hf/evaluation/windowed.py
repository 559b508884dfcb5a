"""Causal attention over a whole text at once: recent keys exact, older ones as they are read back."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..attention.exact import exact_attention
from ..codecs import IdentityCodec, LayerCodec
from ..reference.attention import Visibility, grouped, logits_of
from ..reference.attention import attention as reference_attention
from ..reference.code_bias import with_bias_channel
from ..snapshot import Snapshot

ROWS = 512  # queries whose logits are held at a time


def exact_with_lse(
    query, keys, values, scale, softcap=None, sink_logit=None, mask=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal attention ``(batch, kv_heads, group, n, value_dim)`` and its log-sum-exp ``(..., n)``; an additive
    `mask` stands in for causality, and then there may be fewer queries than keys."""
    q_len, n = query.shape[2], keys.shape[2]
    offset = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
    past = Snapshot(LayerCodec(IdentityCodec(), IdentityCodec()), None, None, (), keys, values, offset)
    view = Visibility(mask, q_len > 1 and mask is None, q_len, n)
    # the LSE of the fused kernel has no gradient
    fused = softcap is None and sink_logit is None and mask is None and not torch.is_grad_enabled()
    answer = exact_attention(past, query, view, scale) if fused else None
    return reference_attention(past, query, view, scale, softcap, sink_logit) if answer is None else answer


def windowed_attention(
    query, keys, values, read_keys, read_values, window: int, scale: float, softcap=None, sink_logit=None, bias=None,
    coded=None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention with exact keys for ``i - j < window`` and read-back ones for older tokens.

    Args:
        bias, coded: see `protocols.Read`.

    Returns:
        float32 ``(batch, q_heads, n, value_dim)``.
    """
    query, keys, values = query.float(), keys.float(), values.float()
    read_keys, read_values = read_keys.float(), read_values.float()
    if not window:
        return _old_attention(query, read_keys, read_values, scale, softcap, sink_logit, bias, coded)[0].flatten(1, 2)
    if window >= keys.shape[2]:
        return exact_with_lse(query, keys, values, scale, softcap, sink_logit)[0].flatten(1, 2)
    out, lse = _recent_attention(query, keys, values, window, scale, softcap, sink_logit)
    # Old tokens of query i are 0..i - window: a causal square, seen from the first query that has any.
    if bias is not None:
        bias, coded = bias[:, :, window:], coded[:, :, :-window]
    old, old_lse = _old_attention(
        query[:, :, window:], read_keys[:, :, :-window], read_values[:, :, :-window], scale, softcap, None, bias, coded
    )
    total = torch.logaddexp(lse[..., window:], old_lse)
    share, old_share = (lse[..., window:] - total).exp(), (old_lse - total).exp()
    merged = out[:, :, :, window:] * share.unsqueeze(-1) + old * old_share.unsqueeze(-1)
    return torch.cat([out[:, :, :, :window], merged], 3).flatten(1, 2)


def _old_attention(query, keys, values, scale: float, softcap, sink_logit, bias, coded):
    """Causal attention over what is read back, with the bias of coded tokens: output and LSE as `exact_with_lse`."""
    if bias is None:
        return exact_with_lse(query, keys, values, scale, softcap, sink_logit)
    if softcap is None:
        query, keys = with_bias_channel(query, keys, bias, coded, scale)
        # values as wide as the keys, for the fused kernel
        out, lse = exact_with_lse(query, keys, pad(values, (0, 1)), scale, None, sink_logit)
        return out[..., :-1], lse
    # A bias comes after the cap, so it cannot be part of the product: it joins as a mask, of some rows at a time.
    n, coded = keys.shape[2], coded.repeat_interleave(query.shape[1] // keys.shape[1], 1).unsqueeze(2)
    parts = []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        hidden = torch.arange(stop, device=keys.device) > torch.arange(start, stop, device=keys.device).unsqueeze(1)
        mask = (bias[:, :, start:stop, None] * coded[..., :stop]).masked_fill(hidden, float("-inf"))
        seen = keys[:, :, :stop], values[:, :, :stop]
        parts.append(exact_with_lse(query[:, :, start:stop], *seen, scale, softcap, sink_logit, mask))
    outs, lses = zip(*parts)
    return torch.cat(outs, 3), torch.cat(lses, 3)


def _recent_attention(query, keys, values, window: int, scale: float, softcap, sink_logit):
    """Attention of each query over its last `window` keys: output and LSE as `exact_with_lse`."""
    kv_heads, n = keys.shape[1:3]
    q_all, parts = grouped(query, kv_heads), []
    # At a time: as many as make half of what is computed count, or as memory allows; a GPU waits for launches instead.
    rows = min(window, ROWS) if keys.device.type == "cpu" else ROWS
    for start in range(0, n, rows):
        stop, first = min(start + rows, n), max(start - window + 1, 0)
        row = torch.arange(start, stop, device=keys.device).unsqueeze(1)
        column = torch.arange(first, stop, device=keys.device)
        logits = logits_of(q_all[:, :, :, start:stop], keys[:, :, first:stop], scale, softcap)
        logits = logits.masked_fill((column > row) | (column <= row - window), float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        if sink_logit is not None:  # takes part in the denominator only
            lse = torch.logaddexp(lse, sink_logit.float().view(1, kv_heads, -1, 1, 1))
        weights = (logits - lse).exp().flatten(2, 3)
        out = (weights @ values[:, :, first:stop]).view(*lse.shape[:-1], -1)
        parts.append((out, lse.squeeze(-1)))
    outs, lses = zip(*parts)
    return torch.cat(outs, 3), torch.cat(lses, 3)

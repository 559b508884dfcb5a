"""Attention over a quantized past, exact tokens and a recent window, in blocks: the readable truth and the CPU path.

With codes C, exact tokens E and tail T, the output of query i is

    o_i = sum_{j in C \\ E} p_ij v^_j + sum_{j in E} p_ij v_j + sum_{j in T} p_ij v_j,    p_ij = exp(s_ij - lse_i)

where ``v^`` (and ``k^`` inside s) are decoded block by block; the parts are merged by their running maximum, so the
dense keys and values never exist. The logits s of coded tokens include the bias of `code_bias`, if the codec has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 1024  # tokens decoded at a time
MAX_LOGITS = 1 << 24  # logits held at once, 64 MB in float32: a long prefill goes in blocks of queries


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may see: transformers' 4-D mask, or causality counted from the end of the keys.

    Args:
        mask: bool (True = visible) or additive float, ``(batch or 1, 1 or q_heads, 1 or q_len, kv_len)``, or None.
        is_causal: without a mask, query r of `q_len` sees keys up to ``kv_len - q_len + r``.
    """

    mask: torch.Tensor | None
    is_causal: bool
    q_len: int
    kv_len: int

    def apply(self, logits: torch.Tensor, columns: torch.Tensor | slice) -> torch.Tensor:
        """Masks `logits` ``(batch, kv_heads, group, q_len, n)``; `columns` is a slice, or ``(batch, kv_heads, n)``."""
        if self.mask is not None:
            mask = self._columns(logits, columns)
            return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        if not self.is_causal or self.q_len == 1:
            return logits
        last = torch.arange(self.kv_len - self.q_len, self.kv_len, device=logits.device)
        if isinstance(columns, slice):
            hidden = torch.arange(columns.start, columns.stop, device=logits.device) > last.unsqueeze(1)
            return logits.masked_fill(hidden, float("-inf"))
        return logits.masked_fill((columns.unsqueeze(2) > last.view(-1, 1)).unsqueeze(2), float("-inf"))

    def rows(self, rows: slice) -> Visibility:
        """The visibility of a slice of the queries alone; without a mask, of the keys up to its last query."""
        if self.mask is not None and self.mask.shape[2] > 1:
            return Visibility(self.mask[:, :, rows], self.is_causal, rows.stop - rows.start, self.kv_len)
        kv_len = self.kv_len - self.q_len + rows.stop if self.is_causal else self.kv_len
        return Visibility(self.mask, self.is_causal, rows.stop - rows.start, kv_len)

    def _columns(self, logits: torch.Tensor, columns: torch.Tensor | slice) -> torch.Tensor:
        batch, kv_heads, group = logits.shape[:3]
        mask = self.mask
        assert mask is not None
        if mask.shape[1] != 1:  # one mask a query head
            mask = mask.expand(batch, kv_heads * group, -1, -1).unflatten(1, (kv_heads, group))
        else:
            mask = mask.unsqueeze(2)
        if isinstance(columns, slice):
            return mask[..., columns]
        mask = mask.expand(batch, kv_heads, mask.shape[2], mask.shape[3], -1)
        index = columns.clamp_min(0).view(batch, kv_heads, 1, 1, -1)
        return mask.gather(-1, index.expand(*mask.shape[:-1], -1))


class OnlineSoftmax:
    """Running softmax-weighted sum over segments of keys; rows are ``(batch, kv_heads, group, q_len)``."""

    def __init__(self, rows: torch.Size, value_dim: int, device: torch.device, first_logit=None):
        self.maximum = torch.full(rows, float("-inf"), device=device)
        self.total = torch.zeros(rows, device=device)
        self.out = torch.zeros(*rows, value_dim, device=device)
        if first_logit is not None:  # an attention sink of the model: takes part in the denominator only
            self.maximum, self.total = first_logit.float().expand(rows).clone(), torch.ones_like(self.total)

    def add(self, logits: torch.Tensor, weighted_sum: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds a segment: `logits` ``rows + (n,)``; `weighted_sum` takes ``(batch, kv_heads, group * q_len, n)``."""
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        safe = maximum.masked_fill(maximum == float("-inf"), 0.0)  # a row that has seen no key yet
        weights = (logits - safe.unsqueeze(-1)).exp_()
        decay = (self.maximum - safe).exp_()
        self.total = self.total * decay + weights.sum(-1)
        part = weighted_sum(weights.flatten(2, 3)).view_as(self.out)
        self.out = self.out * decay.unsqueeze(-1) + part
        self.maximum = maximum

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``rows + (value_dim,)`` and log-sum-exp ``rows``: 0 and -inf for a row that sees nothing."""
        out = self.out / self.total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return out, self.maximum + self.total.log()


def grouped(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``(batch, q_heads, q_len, head_dim)`` -> float32 ``(batch, kv_heads, group, q_len, head_dim)``."""
    return query.float().unflatten(1, (kv_heads, -1))


def logits_of(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """``softcap(scale * q . k)``: grouped query and keys ``(batch, kv_heads, n, head_dim)`` -> ``(..., q_len, n)``."""
    batch, heads, group, q_len, dim = query.shape
    logits = (query.reshape(batch, heads, group * q_len, dim) * scale) @ keys.float().mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.view(batch, heads, group, q_len, -1)


def attention(past, query, visibility: Visibility, scale: float, softcap=None, sink_logit=None):
    """Attention of `query` over everything in `past`.

    Args:
        past: a `snapshot.Snapshot`: codes, exact tokens and tail of one layer.
        query: ``(batch, q_heads, q_len, head_dim)`` after RoPE.
        visibility: see `Visibility`; its ``kv_len`` is ``past.length``.
        scale: factor on q.k. softcap: Gemma 2's logit cap. sink_logit: GPT-OSS's ``(q_heads,)`` sink logits.

    Returns:
        float32 output ``(batch, kv_heads, group, q_len, value_dim)`` and LSE ``(batch, kv_heads, group, q_len)``.
    """
    q = grouped(query, past.tail_keys.shape[1])
    step = max(1, MAX_LOGITS // (query.shape[0] * query.shape[1] * BLOCK))
    if query.shape[2] <= step:
        return _attention_of_rows(past, q, visibility, scale, softcap, sink_logit)
    parts = [
        _attention_of_rows(past, q[:, :, :, rows], visibility.rows(rows), scale, softcap, sink_logit)
        for rows in (slice(i, min(i + step, query.shape[2])) for i in range(0, query.shape[2], step))
    ]
    out, lse = zip(*parts)
    return torch.cat(out, 3), torch.cat(lse, 3)


def _attention_of_rows(past, q: torch.Tensor, visibility: Visibility, scale: float, softcap, sink_logit):
    """`attention` of few grouped queries, those that `visibility` speaks of."""
    kv_heads = q.shape[1]
    first = None if sink_logit is None else sink_logit.view(1, kv_heads, -1, 1)
    softmax = OnlineSoftmax(q.shape[:-1], past.tail_values.shape[-1], q.device, first)
    coded = past.coded_length
    if coded:
        exact, bias = past.exact_mask(), past.codec.code_bias(q, scale)
        for start in range(0, coded, BLOCK):
            stop = min(start + BLOCK, coded)
            # (R_s+r k) . q = (R_r k) . (R_-s q): the angles r of a block are a constant table
            logits = logits_of(past.block_query(q, start), past.block_keys(start, stop), scale, softcap)
            if bias is not None:
                logits = logits + bias.unsqueeze(-1)
            logits = visibility.apply(logits, slice(start, stop))
            if exact is not None:
                logits = logits.masked_fill(exact[:, :, None, None, start:stop], float("-inf"))
            codes = past.value_codes[:, :, start:stop]
            softmax.add(logits, lambda weights, codes=codes: past.codec.weighted_values(weights, codes, past.scales))
        for tokens in past.exact_tokens:
            keys, values = tokens.read(past.codec, past.offset, past.key_center)
            logits = visibility.apply(logits_of(q, keys, scale, softcap), tokens.positions.long())
            logits = logits.masked_fill((tokens.positions < 0)[:, :, None, None], float("-inf"))
            softmax.add(logits, lambda weights, values=values: weights @ values.float())
    for start in range(coded, visibility.kv_len, BLOCK):  # later keys are hidden from these queries
        stop = min(start + BLOCK, visibility.kv_len)
        keys, values = (
            past.tail_keys[:, :, start - coded : stop - coded],
            past.tail_values[:, :, start - coded : stop - coded],
        )
        logits = visibility.apply(logits_of(q, keys, scale, softcap), slice(start, stop))
        softmax.add(logits, lambda weights, values=values: weights @ values.float())
    return softmax.result()

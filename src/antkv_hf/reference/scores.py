"""Column statistics of the attention map, blockwise: what each cached token received from the queries seen so far.

All anchor scores that look at queries are sums over queries i of a term of p_ij = exp(s_ij - lse_i); they need q, k,
v, o and the LSE, never the n x n map.
"""

from __future__ import annotations

from typing import Protocol

import torch

from .attention import Visibility, logits_of

# Queries and keys at a time. Small blocks stay in a CPU's cache and leave out most of what causality hides.
ROWS, COLUMNS = 256, 256


class ColumnTerm(Protocol):
    def __call__(
        self, probs: torch.Tensor, query: torch.Tensor, values: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Sum over queries of a score's term.

        probs ``(batch, kv_heads, rows, n)``, query and output ``(batch, kv_heads, rows, dim)``,
        values ``(batch, kv_heads, n, dim)`` -> ``(batch, kv_heads, n)``.
        """
        ...


def squared_attention_term(probs, query, values, output):
    """sum_i p_ij^2"""
    return probs.square().sum(2)


def accumulated_attention_term(probs, query, values, output):
    """sum_i p_ij"""
    return probs.sum(2)


def anchor_score_term(probs, query, values, output):
    """AnTKV's Anchor Score: sum_i p_ij |v_j - o_i| |q_i| (first-order error bound for keys, arXiv 2506.19505 eq. 8)."""
    distance = torch.cdist(output, values, compute_mode="use_mm_for_euclid_dist")
    return (probs * distance * query.norm(dim=-1, keepdim=True)).sum(2)


def column_statistic(
    term: ColumnTerm,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    visibility: Visibility,
    first_column: int,
    scale: float,
    softcap: float | None = None,
    first_query: torch.Tensor | None = None,
    last_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums `term` over queries for the keys at columns ``first_column, first_column + 1, ...``.

    Args:
        query: grouped float32 ``(batch, kv_heads, group, q_len, head_dim)``; output and lse of the same attention,
            ``(batch, kv_heads, group, q_len, value_dim)`` and ``(batch, kv_heads, group, q_len)``.
        keys, values: exact ``(batch, kv_heads, n, dim)``.
        first_query: index of each sequence's first real query ``(batch,)``; padded ones before it do not count.
        last_query: index of the last query that counts for each key ``(n,)``, in key columns (streaming protocols).

    Returns:
        float32 ``(batch, kv_heads, n)``.
    """
    batch, kv_heads, _, q_len, _ = query.shape
    past, causal = visibility.kv_len - visibility.q_len, visibility.is_causal and visibility.mask is None
    out = torch.zeros(batch, kv_heads, keys.shape[2], device=keys.device)
    for row in range(0, q_len, ROWS):
        rows = slice(row, min(row + ROWS, q_len))
        q, o, row_lse = query[:, :, :, rows], output[:, :, :, rows], lse[:, :, :, rows]
        view = visibility.rows(rows)
        index = torch.arange(past + row, past + rows.stop, device=keys.device)  # key columns of these queries
        unseen = row_lse == float("-inf")
        if first_query is not None:
            unseen = unseen | (index < first_query.unsqueeze(1))[:, None, None]
        if unseen.any():
            row_lse = row_lse.masked_fill(unseen, float("inf"))  # so that their probabilities are 0
        for start in range(0, keys.shape[2], COLUMNS):
            stop = min(start + COLUMNS, keys.shape[2])
            if causal and first_column + start >= past + rows.stop:
                break  # these keys come after every query of the block
            logits = logits_of(q, keys[:, :, start:stop], scale, softcap)
            if not causal or first_column + stop > past + row + 1:  # else every query sees every key of the block
                logits = view.apply(logits, slice(first_column + start, first_column + stop))
            probs = logits.sub_(row_lse.unsqueeze(-1)).exp_()
            if last_query is not None:
                probs = probs * (index.unsqueeze(1) <= last_query[start:stop])
            out[:, :, start:stop] += term(
                probs.flatten(2, 3), q.flatten(2, 3), values[:, :, start:stop].float(), o.flatten(2, 3)
            )
    return out

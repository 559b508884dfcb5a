"""Column statistics of the attention map, blockwise: what each cached token received from the queries seen so far.

All anchor scores that look at queries are sums over queries i of a term of p_ij = exp(s_ij - lse_i); they need q, k,
v, o and the LSE, never the n x n map.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import torch

from .attention import Visibility, logits_of

# Queries and keys at a time. Small blocks stay in a CPU's cache and leave out most of what causality hides; on a GPU
# each costs a dozen launches.
SIDE = {"cpu": 256, "other": 1024}
# With a query stride > 1 every query of a key's own BLOCK and of the NEAR_BLOCKS after it still counts: a token's own
# neighbourhood decides most.
BLOCK, NEAR_BLOCKS = 128, 2


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
    stride: int = 1,
) -> torch.Tensor:
    """Sums `term` over queries for the keys at columns ``first_column, first_column + 1, ...``.

    A query at key column i weighs for the key at column j: 1 if ``i // BLOCK - j // BLOCK <= NEAR_BLOCKS``; otherwise
    `stride` if ``i % stride == stride - 1``, and 0 if not. Only absolute indices count, so that a prompt in chunks
    gives the sums of one pass.

    Args:
        query: grouped float32 ``(batch, kv_heads, group, q_len, head_dim)``; output and lse of the same attention,
            ``(batch, kv_heads, group, q_len, value_dim)`` and ``(batch, kv_heads, group, q_len)``.
        keys, values: exact ``(batch, kv_heads, n, dim)``.
        first_query: index of each sequence's first real query ``(batch,)``; padded ones before it do not count.
        last_query: index of the last query that counts for each key ``(n,)``, in key columns (streaming protocols).
        stride: of the queries that count for keys far before them, >= 1; 1 counts every query.

    Returns:
        float32 ``(batch, kv_heads, n)``.

    Raises:
        ValueError: if `stride` is below 1.
    """
    if stride < 1:
        raise ValueError(f"stride={stride} must be at least 1: every stride-th query counts, 1 counts all")
    batch, kv_heads, _, q_len, _ = query.shape
    past, causal = visibility.kv_len - visibility.q_len, visibility.is_causal and visibility.mask is None
    index = torch.arange(past, visibility.kv_len, device=keys.device)  # key columns of the queries
    unseen = lse == float("-inf")
    if first_query is not None:
        unseen = unseen | (index < first_query.unsqueeze(1))[:, None, None]
    lse = lse.masked_fill(unseen, float("inf"))  # so that their probabilities are 0
    out = torch.zeros(batch, kv_heads, keys.shape[2], device=keys.device)
    side = SIDE["cpu" if keys.device.type == "cpu" else "other"]
    for columns in _column_blocks(keys.shape[2], first_column, stride, side):
        first, stop = first_column + columns.start, first_column + columns.stop
        near_end = (first // BLOCK + NEAR_BLOCKS + 1) * BLOCK  # of every column of the block, where stride > 1
        for rows, weight in _row_blocks(near_end, past, q_len, stride, side):
            if causal and first >= past + rows.stop:
                continue  # these keys come after every query of the block
            q = query[:, :, :, rows]
            logits = logits_of(q, keys[:, :, columns], scale, softcap)
            if not causal or stop > past + rows.start + 1:  # else every query sees every key of the block
                logits = _rows_of(visibility, rows).apply(logits, slice(first, stop))
            probs = logits.sub_(lse[:, :, :, rows].unsqueeze(-1)).exp_()
            if last_query is not None:
                probs = probs * (index[rows].unsqueeze(1) <= last_query[columns])
            part = term(
                probs.flatten(2, 3), q.flatten(2, 3), values[:, :, columns].float(),
                output[:, :, :, rows].flatten(2, 3),
            )  # fmt: skip
            out[:, :, columns] += part if weight == 1 else weight * part
    return out


def _column_blocks(n: int, first_column: int, stride: int, side: int) -> Iterator[slice]:
    """Slices of the `n` keys, at most `side` long; with a stride each lies in one BLOCK (the same near queries)."""
    if stride == 1:
        cuts = [*range(0, n, side), n]
    else:
        cuts = [0, *range(BLOCK - first_column % BLOCK, n, BLOCK), n]
    return (slice(start, stop) for start, stop in pairwise(cuts) if start < stop)


def _row_blocks(near_end: int, past: int, q_len: int, stride: int, side: int) -> Iterator[tuple[slice, int]]:
    """Slices of at most `side` queries, and their weight: all before column `near_end`, then every `stride`-th."""
    near = q_len if stride == 1 else min(max(near_end - past, 0), q_len)
    for row in range(0, near, side):
        yield slice(row, min(row + side, near)), 1
    first = near + (stride - 1 - past - near) % stride
    for row in range(first, q_len, side * stride):
        yield slice(row, min(row + side * stride, q_len), stride), stride


def _rows_of(visibility: Visibility, rows: slice) -> Visibility:
    """As `Visibility.rows`, also for a slice with a step; such queries are far, so that only a mask can hide keys."""
    if rows.step is None:
        return visibility.rows(rows)
    mask = visibility.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    return Visibility(mask, False, len(range(rows.start, rows.stop, rows.step)), visibility.kv_len)


def query_moment(
    query: torch.Tensor, scale: float, first_query: torch.Tensor | None = None, kv_len: int = 0
) -> torch.Tensor:
    """Sum over the group and queries of ``scale^2 |q|^2 / D``, and how many there were: the variance of a logit.

    Args:
        query: grouped float32 ``(batch, kv_heads, group, q_len, head_dim)``; the last one has key index ``kv_len - 1``.
        first_query: index of each sequence's first real query ``(batch,)``; padded ones before it do not count.

    Returns:
        float32 ``(batch, kv_heads, 2)``.
    """
    moment = query.square().sum(-1) * (scale**2 / query.shape[-1])
    counted = torch.ones_like(moment)
    if first_query is not None:
        index = torch.arange(kv_len - query.shape[3], kv_len, device=query.device)
        counted = (index >= first_query.unsqueeze(1))[:, None, None].expand_as(moment).float()
    return torch.stack([(moment * counted).sum((2, 3)), counted.sum((2, 3))], -1)

"""What a step of a cache with `max_length` launches, to be compiled ahead of time (`ahead_of_time`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from antkv.decode_attention import decode_attention
from antkv.static_step import add_column_statistic, add_query_moment, add_tail_statistic, append_token
from builders import quantized_past, random_codec, random_snapshot

HEADS, GROUP, ROWS = 2, 4, 256


def _append(dtype: torch.dtype, dim: int, batch: int = 1) -> None:
    tail, new = (torch.empty(batch, HEADS, rows, dim, dtype=dtype) for rows in (ROWS, 1))
    append_token(new, new, tail, tail, torch.zeros(3, dtype=torch.int32))


def _statistic(term: str, dtype: torch.dtype, dim: int, stride: int) -> None:
    tail, query = torch.empty(1, HEADS, ROWS, dim, dtype=dtype), torch.empty(1, HEADS * GROUP, 1, dim, dtype=dtype)
    add_column_statistic(
        term, query, tail, tail, query.float(), torch.empty(1, HEADS * GROUP, 1), torch.empty(1, HEADS, ROWS),
        torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), scale=0.1, stride=stride,
        moment=torch.empty(1, HEADS, 2),
    )  # fmt: skip


def _tail_statistic(dtype: torch.dtype, dim: int, stride: int) -> None:
    logits, query = torch.empty(1, HEADS, ROWS, GROUP), torch.empty(1, HEADS * GROUP, 1, dim, dtype=dtype)
    add_tail_statistic(
        "squared_attention", logits, query, torch.empty(1, HEADS * GROUP, 1), torch.empty(1, HEADS, ROWS),
        torch.empty(1, HEADS, 2), torch.zeros(3, dtype=torch.int32), scale=0.1, stride=stride,
    )  # fmt: skip


def _moment(dtype: torch.dtype, dim: int) -> None:
    add_query_moment(torch.empty(1, HEADS * GROUP, 1, dim, dtype=dtype), 0.1, torch.empty(1, HEADS, 2))


def _decode(dtype: torch.dtype, dim: int) -> None:
    snapshot = random_snapshot(random_codec("d8b8", "d8b8", HEADS, dim), 1, 96, 40, dtype)
    past = quantized_past(snapshot)
    assert past is not None
    query = torch.zeros(1, 1, HEADS * GROUP, dim, dtype=dtype).transpose(1, 2)
    past = past._replace(lengths=torch.zeros(3, dtype=torch.int32))
    decode_attention(query, past, snapshot.tail_keys, snapshot.tail_values, scale=dim**-0.5)


CALLS: list[Callable[[], None]] = [
    partial(_append, torch.bfloat16, 128),
    partial(_statistic, "squared_attention", torch.bfloat16, 128, 16),
    partial(_tail_statistic, torch.bfloat16, 128, 16),
]
MORE_CALLS: list[Callable[[], None]] = [
    partial(_moment, torch.bfloat16, 128),
    partial(_append, torch.float32, 80),
    partial(_append, torch.bfloat16, 128, 32),
    partial(_append, torch.bfloat16, 128, 33),
    partial(_statistic, "squared_attention", torch.bfloat16, 128, 1),
    partial(_statistic, "squared_attention", torch.float32, 64, 4),
    partial(_statistic, "anchor_score", torch.float16, 128, 1),
    partial(_decode, torch.bfloat16, 128),
    partial(_decode, torch.float32, 64),
]

"""Calls whose launches are compiled ahead of time (`ahead_of_time`): prompts and decode steps of common head sizes."""

from __future__ import annotations

from functools import partial

import torch
from antkv.anchor_score import column_statistic, query_moment


def _statistic(term, dtype, dim, q_len, stride=1, mask=None, softcap=None, output_dtype=None, splits=1) -> None:
    n = max(q_len, 16)
    query = torch.empty(1, 8, q_len, dim, dtype=dtype)
    keys = torch.empty(1, 2, n, dim, dtype=dtype)
    column_statistic(
        term, query, keys, keys, query.to(output_dtype or dtype), torch.empty(1, 8, q_len), scale=dim**-0.5,
        first_column=0, kv_len=n, stride=stride, mask=mask, softcap=softcap,
        first_query=None if mask is None else torch.zeros(1, dtype=torch.int64), splits=splits,
    )  # fmt: skip


def _moment(dtype, dim, q_len) -> None:
    query = torch.empty(1, 8, q_len, dim, dtype=dtype)
    query_moment(query, 0.1, 2, None, q_len, torch.empty(1, 2, 2))


CALLS = [
    partial(_statistic, "squared_attention", torch.bfloat16, 128, 256, 8),
    partial(_moment, torch.bfloat16, 128, 256),
]
LARGEST_CALLS = [partial(_statistic, "anchor_score", torch.bfloat16, 128, 256, 8, output_dtype=torch.float32)]
MORE_CALLS = [
    *(
        partial(_statistic, term, dtype, dim, q_len, stride)
        for term, dtype, dim, q_len, stride in (
            ("squared_attention", torch.float16, 64, 256, 1), ("squared_attention", torch.bfloat16, 256, 256, 8),
            ("squared_attention", torch.bfloat16, 128, 1, 1), ("squared_attention", torch.float32, 128, 256, 8),
            ("accumulated_attention", torch.float16, 80, 256, 8), ("anchor_score", torch.float16, 64, 256, 8),
            ("anchor_score", torch.bfloat16, 128, 256, 8), ("anchor_score", torch.bfloat16, 256, 1, 1),
            ("anchor_score", torch.float32, 256, 256, 1),
        )
    ),
    partial(_statistic, "anchor_score", torch.bfloat16, 256, 256, 8, output_dtype=torch.float32),
    partial(_statistic, "squared_attention", torch.bfloat16, 128, 256, 1, torch.ones(1, 1, 256, 256) > 0, 50.0),
    partial(_statistic, "squared_attention", torch.bfloat16, 128, 256, 8, torch.zeros(1, 1, 256, 256).bfloat16()),
    partial(_moment, torch.float32, 80, 1),
]  # fmt: skip

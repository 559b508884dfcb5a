"""Launches of attention over dense keys and of merging, for `ahead_of_time`: head sizes, dtypes and masks."""

import torch
from antkv.flash_attention import flash_attention
from antkv.prefill import merge_


def call(dim: int, value_dim: int | None = None, dtype=torch.float16, q_len=2048, n=4096, mask=None, **options):
    def run():
        # (batch, tokens, heads, channels) in memory, as a model's projections are
        query = torch.zeros(1, q_len, 32, dim, dtype=dtype).transpose(1, 2)
        keys = torch.zeros(1, 8, n, dim, dtype=dtype)
        values = torch.zeros(1, 8, n, value_dim or dim, dtype=dtype)
        flash_attention(query, keys, values, scale=0.1, mask=None if mask is None else mask(q_len, n), **options)

    return run


def merge(dim: int, dtype: torch.dtype):
    def run():
        out, lse = torch.zeros(1, 32, 64, dim), torch.zeros(1, 32, 64)
        merge_(out, lse, torch.zeros(1, 64, 32, dim, dtype=dtype).transpose(1, 2), lse)

    return run


def hidden(q_len: int, n: int) -> torch.Tensor:
    return torch.zeros(1, 1, q_len, n, dtype=torch.bool)


def additive(q_len: int, n: int) -> torch.Tensor:
    return torch.zeros(1, 1, q_len, n, dtype=torch.bfloat16)


CALLS = [call(128, dtype=torch.bfloat16, causal_offset=2048), merge(128, torch.bfloat16)]
LARGEST_CALLS = [call(256, dtype=torch.bfloat16, causal_offset=2048)]
MORE_CALLS = [
    *(call(dim, dtype=dtype, causal_offset=2048) for dim in (64, 80, 128, 256) for dtype in
      (torch.float16, torch.bfloat16, torch.float32) if dim in (64, 80) or dtype != torch.bfloat16),
    call(128),
    call(192, 128, dtype=torch.bfloat16),
    call(128, q_len=1, mask=hidden),
    call(128, mask=hidden, softcap=30.0),
    call(256, dtype=torch.bfloat16, mask=additive, softcap=30.0),
    call(64, dtype=torch.float32, mask=hidden),
    merge(64, torch.float16),
    merge(256, torch.float32),
]  # fmt: skip

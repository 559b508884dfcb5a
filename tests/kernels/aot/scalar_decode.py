"""Decode steps over scalar codes whose launches are compiled ahead of time (`ahead_of_time`)."""

from __future__ import annotations

from functools import partial

import torch
from antkv.scalar_decode import scalar_decode_attention
from test_scalar_decode import scalar_codec, scalar_snapshot

from antkv_hf.attention.scalar_backend import scalar_past


def _decode(dim: int, dtype: torch.dtype, key="int2g32", value="int2g64", q_len=1, masked=False, **filled) -> None:
    kv_heads, group = 2, 4
    snapshot = scalar_snapshot(scalar_codec(key, value, dim), 1, kv_heads, 128, 40, dtype, **filled)
    query = torch.zeros(1, q_len, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    mask = torch.ones(1, 1, q_len, snapshot.length, dtype=torch.bool) if masked else None
    scalar_decode_attention(
        query, scalar_past(snapshot), snapshot.tail_keys, snapshot.tail_values, scale=dim**-0.5, mask=mask
    )


# Its parts but one are those of `decode_attention`, which every code generator meets; here one is enough.
LARGEST_CALLS = [partial(_decode, 128, torch.bfloat16)]
MORE_CALLS = [
    partial(_decode, 64, torch.float32),
    partial(_decode, 256, torch.float16, "int4g64", "int4g64"),
    partial(_decode, 80, torch.bfloat16, "int4g128", "int2g32"),
    partial(_decode, 128, torch.bfloat16, q_len=8, masked=True, anchor_dtype="float16"),
]

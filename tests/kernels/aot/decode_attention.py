"""Decode steps whose launches are compiled ahead of time (`ahead_of_time`): dtypes, head sizes, masks and codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from antkv.decode_attention import decode_attention
from antkv.merge_splits import TILES_FROM, merge_splits
from builders import quantized_past, random_codec, random_snapshot

from antkv_hf.attention.tables import layer_tables


def _decode(
    dim: int, dtype: torch.dtype, q_len: int = 1, spec: str = "d8b8", masked: bool = False,
    softcap: float | None = None, **filled,
) -> None:  # fmt: skip
    kv_heads, group = 2, 4
    snapshot = random_snapshot(random_codec(spec, spec, kv_heads, dim), 1, 96, 40, dtype, **filled)
    past = quantized_past(snapshot)
    assert past is not None
    query = torch.zeros(1, q_len, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    mask = torch.ones(1, 1, q_len, snapshot.length, dtype=torch.bool) if masked else None
    decode_attention(
        query, past, snapshot.tail_keys, snapshot.tail_values, scale=dim**-0.5, mask=mask, softcap=softcap
    )  # fmt: skip


def _merge_by_tiles(dim: int, spec: str) -> None:
    batch, kv_heads, group = TILES_FROM // 4, 2, 4
    keys, values = layer_tables(random_codec(spec, spec, kv_heads, dim), torch.bfloat16)
    parts = torch.empty(batch, kv_heads, 4, group, dim)
    query = torch.empty(batch, kv_heads * group, 1, dim, dtype=torch.bfloat16)
    lse = torch.empty(query.shape[:3])
    merge_splits(parts, torch.empty(2, *parts.shape[:4]), values, None, torch.empty_like(query), lse, query, keys)


CALLS: list[Callable[[], None]] = [
    partial(_decode, 128, torch.bfloat16),  # int8 anchors and sinks
    partial(_merge_by_tiles, 128, "d8b8"),
]
LARGEST_CALLS: list[Callable[[], None]] = [partial(_merge_by_tiles, 256, "d32b8")]
MORE_CALLS: list[Callable[[], None]] = [
    partial(_decode, 64, torch.float32),
    partial(_decode, 256, torch.float16),
    partial(_decode, 128, torch.bfloat16, q_len=8, masked=True),
    partial(_decode, 128, torch.bfloat16, softcap=30.0),
    partial(_decode, 128, torch.float16, spec="d16b8s2", anchor_dtype="float16"),
]

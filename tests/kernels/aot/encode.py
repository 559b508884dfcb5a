"""Calls whose launches are compiled ahead of time (`ahead_of_time`): presets, large tables and residual stages."""

from __future__ import annotations

from functools import partial

import torch
from antkv.encode import encode_keys, encode_values
from antkv.tables import TURNS, Codes, KeyTables, ValueTables


def _encode(dtype: torch.dtype, dim: int, sub_dim: int, code_bits: int, stages: int = 1, n: int = 32768) -> None:
    codes = Codes(dim // sub_dim, stages, code_bits, sub_dim)
    x = torch.empty(1, 1, 1, dim, dtype=dtype).expand(1, 1, n, dim)
    encode = torch.empty(1, codes.groups, stages, 1 << code_bits, sub_dim)
    centroids = encode if dtype == torch.float32 else encode.half()
    mean, pairs, square = torch.empty(1, dim), torch.empty(1, dim // 2), torch.empty(1, dim, dim)
    channels, turns = torch.empty(1, dim, dtype=torch.int32), torch.empty(1, TURNS, dim // 2, 2, dtype=centroids.dtype)
    keys = KeyTables(codes, centroids, mean, channels, pairs, pairs, True, turns, encode, encode[..., 0].contiguous())
    encode_keys(x, keys, 5, torch.zeros(1, dtype=torch.int64))
    encode_values(x, ValueTables(codes, centroids, mean, square, square, encode, encode[..., 0].contiguous()))


CALLS = [partial(_encode, torch.bfloat16, 128, 8, 8)]
MORE_CALLS = [
    partial(_encode, dtype, dim, sub_dim, code_bits, stages, n)
    for dtype, dim, sub_dim, code_bits, stages, n in (
        (torch.float16, 64, 2, 8, 1, 32768), (torch.bfloat16, 128, 8, 8, 1, 128),
        (torch.bfloat16, 256, 8, 8, 1, 32768), (torch.bfloat16, 80, 4, 10, 1, 32768),
        (torch.bfloat16, 256, 32, 12, 1, 128), (torch.bfloat16, 128, 8, 6, 4, 32768),
        (torch.float32, 256, 16, 4, 3, 32768),
    )
]  # fmt: skip

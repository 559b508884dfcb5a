"""Launches of the kernels that make dense keys and values, for `ahead_of_time`: tables and sizes of real models."""

import torch
from antkv.dequantize import dequantize
from antkv.past import ExactTokens, QuantizedPast
from antkv.tables import TURNS, Codes, KeyTables, ValueTables

HEADS, LENGTH = 8, 4096


def past(sub_dim: int, bits: int, stages: int, dim: int, dtype: torch.dtype, int8: bool, rotates: bool = True):
    """A past of zeros; what the tables hold does not matter."""
    table_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    codes = Codes(dim // sub_dim, stages, bits, sub_dim)
    centroids = torch.zeros(HEADS, codes.groups, stages, 1 << bits, sub_dim, dtype=table_dtype)
    encode = torch.zeros(1), torch.zeros(1)  # not read here
    mean, pairs = torch.zeros(HEADS, dim), torch.zeros(HEADS, dim // 2)
    basis = torch.zeros(HEADS, dim, dim)
    rows = torch.zeros(1, HEADS, LENGTH, codes.width, dtype=torch.uint8)
    tokens = torch.zeros(1, HEADS, 64, dim, dtype=torch.int8 if int8 else torch.float16)
    scale = torch.zeros(1, HEADS, 64, 1, dtype=torch.float16) if int8 else None
    exact = ExactTokens(torch.zeros(1, HEADS, 64, dtype=torch.int32), tokens, tokens, scale, scale)
    # Only the tables' shapes are checked, so one pair of encode tables stands for all.
    turns = torch.zeros(HEADS, TURNS, dim // 2, 2, dtype=table_dtype)
    key_tables = KeyTables(codes, centroids, mean, torch.zeros(HEADS, dim, dtype=torch.int32), pairs, pairs, rotates,
                           turns, *encode)  # fmt: skip
    value_tables = ValueTables(codes, centroids, mean, basis, basis, *encode)
    bits_of_exact = torch.zeros(1, HEADS, LENGTH // 8, dtype=torch.uint8)
    offset = torch.zeros(1, dtype=torch.int64)
    return QuantizedPast(rows, rows, key_tables, value_tables, (exact,), bits_of_exact, offset)


def call(*form, dtype=torch.float16, int8=True, rotates=True):
    return lambda: dequantize(past(*form, dtype, int8, rotates), 0, LENGTH, dtype)


CALLS = [call(8, 8, 1, 128, dtype=torch.bfloat16)]
LARGEST_CALLS = [call(8, 8, 1, 256)]
MORE_CALLS = [
    call(8, 8, 1, 64),
    call(8, 8, 1, 128, dtype=torch.bfloat16, int8=False),
    call(8, 8, 1, 128, dtype=torch.float32),
    call(8, 8, 1, 256, dtype=torch.float32),
    call(8, 8, 1, 80),
    call(4, 8, 1, 128),
    call(2, 8, 1, 128),
    call(8, 10, 1, 128),
    call(16, 8, 2, 128, dtype=torch.bfloat16),
    call(32, 12, 1, 128),
    call(32, 8, 3, 256, rotates=False),
]

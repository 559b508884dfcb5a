"""How a call of decode attention is cut into programs and tiles, and what it hands to the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import require
from .past import ExactTokens

MIN_SHARE = 256  # coded tokens a program has at least
# Programs an SM; two run at a time (registers). With few heads whole waves of them, with many heads so many that the
# last wave matters little.
FEW_PROGRAMS, LONG_PROGRAMS, MANY_PROGRAMS = 2, 4, 16
LONG = 65536  # coded tokens from which two waves are better than one
MIN_ROWS = 8  # of a tile: the least N of a tensor-core dot
MAX_SPLITS = 128  # that one program of the merge holds at once


class Plan(NamedTuple):
    """Programs a (sequence, kv head), and their order (see the kernel): alternating heads, or pairs `pitch` apart."""

    splits: int
    lanes: int = 1
    pitch: int = 0


def plan_splits(n_codes: int, batch: int, heads: int, device: torch.device) -> Plan:
    """The plan for `n_codes` coded tokens of each of `batch` sequences and `heads` kv heads."""
    most = min(triton.cdiv(n_codes, MIN_SHARE), MAX_SPLITS)
    if device.type != "cuda":
        return Plan(min(3, most))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if batch * heads >= processors // 2:  # many short programs, a head after the other
        return Plan(min(triton.cdiv(processors * MANY_PROGRAMS, batch * heads), most))
    wanted = max(1, processors * (LONG_PROGRAMS if n_codes > LONG else FEW_PROGRAMS) // (batch * heads))
    programs = wanted * batch * heads
    if n_codes <= LONG and wanted <= most and programs % 2 == 0:  # one wave of pairs
        return Plan(wanted, pitch=programs // 2)
    return Plan(min(wanted, most), lanes=next(n for n in (4, 2, 1) if heads % n == 0 and processors % n == 0))


def tile_options(block: int, rows: int, float32: bool) -> dict[str, int]:
    """Tokens of a tile of codes (BN) and of exact ones (BM), and the launch options."""
    # One stage: with more, Triton makes gathers asynchronous copies that bypass the L1 cache.
    tokens = 32 if block > 128 or float32 else 64
    return dict(BN=tokens, BM=16, num_warps=4 if rows == MIN_ROWS and block <= 128 else 2, num_stages=1)


def sort_exact(sets: tuple[ExactTokens, ...]) -> tuple[ExactTokens | None, ExactTokens | None]:
    """The large set (anchors) and the small one (sinks, 16 or 32 bits)."""
    for tokens in sets:
        parts = (tokens.positions, tokens.keys, tokens.values, tokens.key_scale, tokens.value_scale)
        require(all(t is None or t.is_contiguous() for t in parts), "exact tokens must be contiguous")
        require(
            (tokens.keys.dtype == torch.int8) == (tokens.key_scale is not None), "int8 keys need scales, others none"
        )
    plain = [tokens for tokens in sets if tokens.key_scale is None]
    scaled = [tokens for tokens in sets if tokens.key_scale is not None]
    require(len(plain) <= 2 and len(scaled) <= 1 and len(sets) <= 2, f"{len(sets)} sets of exact tokens; 2 at most")
    if scaled:
        return scaled[0], plain[0] if plain else None
    plain.sort(key=lambda tokens: -tokens.positions.shape[2])
    return (plain[0] if plain else None), (plain[1] if len(plain) > 1 else None)


def pointers(tokens: ExactTokens | None, dummy: torch.Tensor) -> list[torch.Tensor]:
    """What the kernel takes for a set of exact tokens; `dummy` for what is not there."""
    if tokens is None:
        return [dummy] * 5
    scales = [dummy, dummy] if tokens.key_scale is None else [tokens.key_scale, tokens.value_scale]
    return [tokens.positions, tokens.keys, tokens.values, *scales]


def dot_dtype(tokens: ExactTokens | None, dtype: tl.dtype) -> tl.dtype:
    """In what a set takes part in dots: as it is stored, or as the codes are if it must be converted anyhow."""
    if tokens is None or tokens.key_scale is not None or dtype == tl.float32:
        return dtype
    return triton_dtype(tokens.keys.dtype)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]

"""How a call of decode attention is cut into programs and tiles, and what it hands to the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from .checks import ceil_div, require
from .dequantize import check_past
from .past import ExactTokens, QuantizedPast

MIN_SHARE = 256  # coded tokens a program has at least
# Programs an SM; two run at a time (registers). With few heads whole waves of them, with many heads so many that the
# last wave matters little.
FEW_PROGRAMS, LONG_PROGRAMS, MANY_PROGRAMS = 2, 4, 16
LONG = 65536  # coded tokens from which two waves are better than one
MIN_ROWS = 8  # of a tile: the least N of a tensor-core dot
MAX_ROWS = 64  # query heads of a group x query tokens: more rows are a prefill
MAX_SPLITS = 128  # that one program of the merge holds at once


class Plan(NamedTuple):
    """Programs a (sequence, kv head), and their order (see the kernel): alternating heads, or pairs `pitch` apart."""

    splits: int
    lanes: int = 1
    pitch: int = 0


def plan_splits(n_codes: int, batch: int, heads: int, device: torch.device) -> Plan:
    """The plan for `n_codes` coded tokens of each of `batch` sequences and `heads` kv heads."""
    most = min(ceil_div(n_codes, MIN_SHARE), MAX_SPLITS)
    if device.type != "cuda":
        return Plan(min(3, most))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if batch * heads >= processors // 2:  # many short programs, a head after the other
        return Plan(min(ceil_div(processors * MANY_PROGRAMS, batch * heads), most))
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


def check_tail(
    query: torch.Tensor, tail_keys: torch.Tensor, tail_values: torch.Tensor, sink_logit: torch.Tensor | None
) -> None:
    """Raises ValueError unless query, exact tail and sink logits fit together; arguments are those of the launchers."""
    batch, q_heads, _, dim = query.shape
    heads, tail, value_dim = tail_keys.shape[1], tail_keys.shape[2], tail_values.shape[3]
    if q_heads % heads:
        raise ValueError(f"{q_heads} query heads do not share {heads} kv heads evenly")
    if query.stride(3) != 1:
        raise ValueError(f"query has stride {query.stride(3)} in its last dimension; it must be 1")
    for name, part, size in (("keys", tail_keys, dim), ("values", tail_values, value_dim)):
        if part.shape != (want := (batch, heads, tail, size)):
            raise ValueError(f"tail {name} have shape {tuple(part.shape)}; {want} is needed")
        if not part.is_contiguous():
            raise ValueError(f"tail {name} must be contiguous, not of strides {part.stride()}")
    if tail_keys.dtype != tail_values.dtype:
        raise ValueError(f"tail keys are {tail_keys.dtype}, values {tail_values.dtype}")
    fits = sink_logit is None or (sink_logit.shape == (q_heads,) and sink_logit.is_contiguous())
    require(fits, f"sink_logit must be contiguous and of shape ({q_heads},)")


def check_rows(query: torch.Tensor, rows: int, dim: int) -> None:
    """Raises ValueError for more query rows a kv head than Triton's kernels take; `dim` is the larger head size."""
    require(1 <= rows <= MAX_ROWS, f"{rows} query rows a kv head; decode attention takes 1 to {MAX_ROWS}")
    # Larger tiles of float32 can end in an error of the device.
    fits = not query.is_cuda or query.dtype != torch.float32 or (rows <= MIN_ROWS and dim <= 128)
    require(
        fits, f"{rows} float32 rows of head size {dim}: on a GPU up to {MIN_ROWS} of up to 128; use prefill_attention"
    )


def check_decode(
    query: torch.Tensor, past: QuantizedPast, tail_keys: torch.Tensor, tail_values: torch.Tensor,
    sink_logit: torch.Tensor | None, out: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError unless all that decode attention takes fits together; arguments are those of the launchers."""
    batch, q_heads, q_len, dim = query.shape
    heads, value_dim = tail_keys.shape[1], tail_values.shape[3]
    keys, values = past.key_tables, past.value_tables
    check_past(past)
    check_tail(query, tail_keys, tail_values, sink_logit)
    tables_of = keys.mean.shape, values.mean.shape
    if tables_of != ((heads, dim), (heads, value_dim)):
        raise ValueError(f"tables of {tuple(map(tuple, tables_of))}, query and tail of {heads} x {dim}")
    require(keys.centroids.dtype == values.centroids.dtype, "key and value tables have different dtypes")
    bits = (batch, heads, ceil_div(past.capacity, 8))
    if past.exact_bits.shape != bits or not past.exact_bits.is_contiguous():
        raise ValueError(f"exact_bits have shape {tuple(past.exact_bits.shape)}; {bits}, contiguous, is needed")
    if out is not None and (out.shape != (batch, q_heads, q_len, value_dim) or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous and of shape {(batch, q_heads, q_len, value_dim)}")
    lengths = past.lengths
    fits = lengths is None or (lengths.shape == (3,) and lengths.dtype == torch.int32 and lengths.is_contiguous())
    require(fits, "lengths must be contiguous, int32 and of shape (3,)")

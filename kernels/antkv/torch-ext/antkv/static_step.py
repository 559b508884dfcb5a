"""What a decode step does to preallocated buffers whose lengths are on the device: nothing here waits for the host.

Arguments stay the same from step to step, so a CUDA graph that captured a step can be replayed for the next ones.
`decode_attention` takes the same lengths through `QuantizedPast`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .anchor_score import BLOCK, NEAR_BLOCKS, TERMS, column_statistic_kernel, query_moment_kernel, tile_sizes
from .checks import ceil_div, head_block, mask_arguments, power_of_2, require
from .decode_plan import MAX_ROWS
from .softmax import LOG2E
from .tiles import add_moment_of_step

LOGITS_TERMS = ("squared_attention", "accumulated_attention")  # of probabilities alone
LOGITS_TILE = 128  # tail tokens that a program of `tail_statistic_kernel` takes
ONE_PROGRAM = 64  # (sequence, kv head) pairs that one program of `append_token` takes together


@triton.jit
def append_token_kernel(
    p_new_keys, p_new_values, p_keys, p_values, p_lengths, stride_kb, stride_kh, stride_vb, stride_vh, heads, rows,
    total, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr,
    ADVANCE: tl.constexpr,
):  # fmt: skip
    """keys[bh, lengths[1]] = new_keys[bh], values alike: BH of `total` (sequence, kv head) pairs a program.

    If ADVANCE, lengths[1] += 1: only where one program has all pairs, so that no other reads it.
    """
    bh = tl.program_id(0).to(tl.int64) * BH + tl.arange(0, BH)
    m_bh = (bh < total)[:, None]
    b, h = bh // heads, bh % heads
    d = tl.arange(0, BD)[None, :]
    key = tl.load(p_new_keys + (b * stride_kb + h * stride_kh)[:, None] + d, mask=m_bh & (d < D), other=0.0)  # [BH, BD]
    dv = tl.arange(0, BDV)[None, :]
    value = tl.load(p_new_values + (b * stride_vb + h * stride_vh)[:, None] + dv, mask=m_bh & (dv < DV), other=0.0)
    if ADVANCE:  # what was there: one thread adds, and all get the same
        tail = tl.atomic_add(p_lengths + 1, 1, sem="relaxed")
    else:
        tail = tl.load(p_lengths + 1)
    row = (bh * rows + tail)[:, None]
    tl.store(p_keys + row * D + d, key, mask=m_bh & (d < D))
    tl.store(p_values + row * DV + dv, value, mask=m_bh & (dv < DV))


def append_token(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Writes one token of each sequence behind the tail, which is then one longer: ``lengths[1] += 1``.

    Args:
        new_keys, new_values: ``(batch, kv_heads, 1, dim)``, any strides but a last one of 1.
        keys, values: the tail's buffers ``(batch, kv_heads, rows, dim)``, contiguous; ``lengths[1] < rows``.
        lengths: int32 ``(3,)``, see `QuantizedPast`.

    Raises:
        ValueError: for shapes, dtypes or layouts that do not fit.
    """
    for name, new, buffer in (("keys", new_keys, keys), ("values", new_values, values)):
        want = (*buffer.shape[:2], 1, buffer.shape[3])
        require(tuple(new.shape) == want, f"new {name} have shape {tuple(new.shape)}; {want} is needed")
        require(new.dtype == buffer.dtype, f"new {name} are {new.dtype}, but the tail is {buffer.dtype}")
        require(new.stride(3) == 1 and buffer.is_contiguous(), f"{name} must have stride 1, the tail be contiguous")
    _check_lengths(lengths)
    batch, heads, rows, dim = keys.shape
    value_dim = values.shape[3]
    pairs = batch * heads
    together = pairs <= ONE_PROGRAM
    block = power_of_2(pairs) if together else 1
    append_token_kernel[(ceil_div(pairs, block),)](
        new_keys, new_values, keys, values, lengths, *new_keys.stride()[:2], *new_values.stride()[:2], heads, rows,
        pairs, D=dim, DV=value_dim, BD=head_block(dim), BDV=head_block(value_dim), BH=block, ADVANCE=together,
        num_warps=8 if block > 16 else 4 if block > 1 else 1,
    )  # fmt: skip
    if not together:
        lengths[1:2].add_(1)


def add_column_statistic(
    term: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    statistic: torch.Tensor,
    lengths: torch.Tensor,
    offset: torch.Tensor,
    *,
    scale: float,
    stride: int = 1,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    moment: torch.Tensor | None = None,
) -> None:
    """`anchor_score.column_statistic` of one query token a sequence, added to `statistic` in place.

    Args:
        query, output: ``(batch, q_heads, 1, dim)``; lse ``(batch, q_heads, 1)``: the newest token's.
        keys, values: the tail's buffers ``(batch, kv_heads, rows, dim)``; those in use are at columns ``lengths[0]``,
            ``lengths[0] + 1``, ...
        statistic: float32 ``(batch, kv_heads, rows)``, contiguous.
        lengths: int32 ``(3,)``, see `QuantizedPast`. offset: int64 ``(batch,)``: keys at columns before it get nothing.
        scale, stride, mask, softcap: as in `column_statistic`.
        moment: float32 ``(batch, kv_heads, 2)``, contiguous, to which `anchor_score.query_moment` is added in place.

    Raises:
        ValueError: for a term, size, dtype or stride that the kernel was not written for.
    """
    require(term in TERMS, f"term {term!r} is unknown; choose one of {', '.join(TERMS)}")
    batch, kv_heads, rows, dim = keys.shape
    q_heads, value_dim = query.shape[1], values.shape[3]
    group = q_heads // kv_heads
    require(query.shape == (batch, q_heads, 1, dim), f"query has shape {tuple(query.shape)}; one token is needed")
    require(group <= MAX_ROWS, f"{group} query heads a kv head; up to {MAX_ROWS} have a kernel")
    require(keys.dtype == values.dtype == query.dtype, f"query is {query.dtype}, keys {keys.dtype}: cast one of them")
    require(lse.shape == (batch, q_heads, 1) and lse.dtype == torch.float32, "lse must be float32, one a query head")
    _check_statistic(statistic, (batch, kv_heads, rows))
    require(offset.shape == (batch,) and offset.dtype == torch.int64, f"offset must be int64 ({batch},)")
    require(query.stride(3) == keys.stride(3) == values.stride(3) == 1, "channels must have stride 1")
    _check_lengths(lengths)
    columns = rows if mask is None else mask.shape[-1]
    mask, kind, mask_strides = mask_arguments(mask, batch, q_heads, 1, columns)
    tile, queries, warps, stages = tile_sizes(term, head_block(max(dim, value_dim)), query.dtype, group)
    blocks = ceil_div(rows, tile) + 1  # they are cut at absolute columns
    if moment is not None:
        _check_moment(moment, batch, kv_heads)
        if queries < group:  # a tile of float32 does not hold so many heads
            add_query_moment(query, scale, moment)
            moment = None
    column_statistic_kernel[(blocks * batch * kv_heads, 1)](
        query, keys, values, output, lse, query if mask is None else mask, offset, statistic, statistic, lengths,
        moment,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *output.stride()[:3], *lse.stride(),
        *mask_strides, batch * kv_heads, kv_heads, 1, rows, 0, rows, 1, stride, scale,
        1.0 if softcap is None else softcap,
        G=group, D=dim, DV=value_dim, BD=head_block(dim), BDV=head_block(value_dim), BN=tile, BM=queries, TERM=term,
        CAUSAL=False, MASK=kind, SOFTCAP=softcap is not None, FAR=stride > 1, HAS_FIRST=False, HAS_STATISTIC=True,
        STATIC=True, MOMENT=moment is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def tail_statistic_kernel(
    p_logits, p_lse, p_query, p_statistic, p_moment, p_lengths, stride_qb, stride_qh, kv_heads, capacity, factor,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    POWER: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """statistic[bh, j] += w_j sum over the group's heads of p_j^POWER, from logits in units of log 2; the moment too.

    `column_statistic_kernel` for a step whose attention kept the tail's logits: no key is read again.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // kv_heads, bh % kv_heads
    first, tail = tl.load(p_lengths), tl.load(p_lengths + 1)
    row = tl.arange(0, BG)
    lse = tl.load(p_lse + bh * G + row, mask=row < G, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a head that sees nothing
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    m = token < tail
    at = bh * capacity + token
    p_tile = p_logits + at[:, None] * ROWS + row[None, :]
    logits = tl.load(p_tile, mask=m[:, None] & (row < G)[None, :], other=float("-inf"))
    found = tl.sum(tl.exp2(POWER * (logits - lse[None, :])), 1)
    if STRIDE > 1:
        newest = first + tail - 1  # the query's own column
        far = newest // BLOCK - (first + token) // BLOCK > NEAR_BLOCKS
        found *= tl.where(far, tl.where(newest % STRIDE == STRIDE - 1, STRIDE, 0), 1)
    found += tl.load(p_statistic + at, mask=m, other=0.0)
    tl.debug_barrier()  # in place: every warp has loaded before one stores
    tl.store(p_statistic + at, found, mask=m)
    if tl.program_id(1) == 0:
        p_query += b * stride_qb + h * G * stride_qh
        add_moment_of_step(p_query, p_moment + bh * 2, stride_qh, factor, G, D, BD, BG)


def add_tail_statistic(
    term: str,
    logits: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    statistic: torch.Tensor,
    moment: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    stride: int = 1,
) -> None:
    """`add_column_statistic` with a moment, from the logits that `cuda_decode.decode_attention` kept.

    Args:
        term: "squared_attention" or "accumulated_attention".
        logits: float32 ``(batch, kv_heads, rows, heads)``, contiguous, in units of log 2, of which the first
            ``q_heads // kv_heads`` heads count; -inf for what is not seen.
        query, lse, statistic, moment, lengths, scale, stride: as there.

    Raises:
        ValueError: for a term, size or dtype that the kernel was not written for.
    """
    require(term in LOGITS_TERMS, f"term {term!r} needs more than logits; {' and '.join(LOGITS_TERMS)} do not")
    batch, q_heads, q_len, dim = query.shape
    kv_heads, rows, width = logits.shape[1:]
    group = q_heads // kv_heads
    fits = logits.shape[0] == batch and q_heads % kv_heads == 0
    require(fits, f"logits of shape {tuple(logits.shape)} do not belong to {batch} queries of {q_heads} heads")
    require(q_len == 1 and group <= width, f"{q_len} query tokens of {group} heads; one of up to {width} is taken")
    require(query.stride(3) == 1, "channels must have stride 1")
    require(logits.dtype == torch.float32 and logits.is_contiguous(), "logits must be contiguous float32")
    fits = lse.shape == (batch, q_heads, 1) and lse.dtype == torch.float32 and lse.is_contiguous()
    require(fits, "lse must be contiguous float32, one a query head")
    _check_statistic(statistic, (batch, kv_heads, rows))
    _check_moment(moment, batch, kv_heads)
    _check_lengths(lengths)
    tail_statistic_kernel[(batch * kv_heads, ceil_div(rows, LOGITS_TILE))](
        logits, lse, query, statistic, moment, lengths, *query.stride()[:2], kv_heads, rows, scale * scale / dim,
        G=group, D=dim, BD=head_block(dim), BG=power_of_2(group), ROWS=width, BN=LOGITS_TILE,
        POWER=2 if term == "squared_attention" else 1, STRIDE=stride, num_warps=4,
    )  # fmt: skip


def add_query_moment(query: torch.Tensor, scale: float, moment: torch.Tensor) -> None:
    """`anchor_score.query_moment` of one query token a sequence, added to `moment` in place.

    Args:
        query: ``(batch, q_heads, 1, dim)``, any strides but a last one of 1.
        moment: float32 ``(batch, kv_heads, 2)``, contiguous.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    batch, q_heads, q_len, dim = query.shape
    kv_heads = moment.shape[1]
    group = q_heads // kv_heads
    require(
        q_len == 1 and group <= MAX_ROWS, f"{q_len} query tokens of {group} heads; one of up to {MAX_ROWS} is taken"
    )
    _check_moment(moment, batch, kv_heads)
    query_moment_kernel[(1, batch * kv_heads)](
        query, None, moment, moment, *query.stride()[:3], kv_heads, 1, 0, scale * scale / dim,
        G=group, D=dim, BD=head_block(dim), BM=min(32, power_of_2(group)), ROWS=MAX_ROWS,
        HAS_FIRST=False, HAS_MOMENT=True, IN_PLACE=True, num_warps=4,
    )  # fmt: skip


def _check_statistic(statistic: torch.Tensor, shape: tuple[int, int, int]) -> None:
    fits = statistic.shape == shape and statistic.dtype == torch.float32 and statistic.is_contiguous()
    require(fits, f"statistic must be contiguous float32 {shape}")


def _check_moment(moment: torch.Tensor, batch: int, kv_heads: int) -> None:
    fits = moment.shape == (batch, kv_heads, 2) and moment.dtype == torch.float32 and moment.is_contiguous()
    require(fits, f"moment must be contiguous float32 ({batch}, {kv_heads}, 2)")


def _check_lengths(lengths: torch.Tensor) -> None:
    fits = lengths.shape == (3,) and lengths.dtype == torch.int32 and lengths.is_contiguous()
    require(fits, f"lengths are {lengths.dtype} {tuple(lengths.shape)}; contiguous int32 (3,) is needed")

"""Column statistics of the attention map: what each exact token received from the queries just answered.

    statistic_j += sum_i w_ij term_ij,    p_ij = exp(softcap(scale q_i . k_j) + mask_ij - lse_i)

with the terms p_ij^2, p_ij, and AnTKV's Anchor Score p_ij |v_j - o_i| |q_i| (arXiv 2506.19505, eq. 8). One pass in
which a program owns a block of keys and walks over the queries that see it: no atomics, so the sums are reproducible.
The weight w_ij is 1 for queries near the key and thins out the far ones by a stride (`column_statistic`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, mask_arguments, power_of_2, register_limit, require
from .softmax import LOG2E
from .tiles import add_moment_of_step

TERMS = ("squared_attention", "accumulated_attention", "anchor_score")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = tl.constexpr(128)  # every query of a key's own block ...
NEAR_BLOCKS = tl.constexpr(2)  # ... and of that many blocks after it counts
MAX_DIM = 256
MAX_SPLITS = 32
TILES_PER_SPLIT = 4  # tiles of queries that a program has at least, where the queries are split over programs
MOMENT_ROWS = 512  # query rows of a program of `query_moment`


@triton.jit
def _add_queries(
    acc, key, value, value_norm, column, m_column, p_query, p_output, p_lse, p_mask,
    stride_qh, stride_qt, stride_oh, stride_ot, stride_lh, stride_lt, stride_mh, stride_mt, stride_mn,
    first_row, count, row_step, first_index, split, splits, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    TERM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds the terms of `count` query rows, every `row_step`-th from `first_row` on, to `acc` [BN, BM].

    A tile holds BM (row, head of the group) pairs, so that a decode step fills it as a prompt does.
    """
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    pair = tl.arange(0, BM)
    head = (pair % G).to(tl.int64)
    if BM % G == 0:  # a tile begins with a row's first head: addresses differ from the first tile's by one number
        row = (first_row + pair // G * row_step).to(tl.int64)
        p_query += (head * stride_qh + row * stride_qt)[:, None]
        p_lse += head * stride_lh + row * stride_lt
        p_output += (head * stride_oh + row * stride_ot)[:, None]
    for start in range(split * BM, count * G, splits * BM):
        m_pair = start + pair < count * G
        if BM % G == 0:
            moved = tl.cast(start // G * row_step, tl.int64)
            o_query, o_lse, o_output = moved * stride_qt, moved * stride_lt, moved * stride_ot
            o_row = moved + row
        else:
            head = ((start + pair) % G).to(tl.int64)
            o_row = (first_row + (start + pair) // G * row_step).to(tl.int64)
            o_query, o_lse = (head * stride_qh + o_row * stride_qt)[:, None], head * stride_lh + o_row * stride_lt
            o_output = (head * stride_oh + o_row * stride_ot)[:, None]
        query = tl.load(p_query + o_query + d[None, :], mask=m_pair[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
        lse = tl.load(p_lse + o_lse, mask=m_pair, other=float("inf"))
        # A row that sees nothing has the log-sum-exp -inf; +inf makes its probabilities 0, as those beyond the end.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        logits = tl.dot(key, tl.trans(query), input_precision="ieee")  # [BN, BM]
        factor = scale
        if SOFTCAP or MASK == "additive":
            logits *= scale
            factor = 1.0
        if SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # softcap * tanh(logits / softcap)
        if MASK != "none":
            seen = tl.load(
                p_mask + (head * stride_mh + o_row * stride_mt)[None, :] + (column.to(tl.int64) * stride_mn)[:, None],
                mask=m_column[:, None] & m_pair[None, :], other=0,
            )  # [BN, BM]  # fmt: skip
            if MASK == "bool":
                logits = tl.where(seen != 0, logits, float("-inf"))
            else:
                logits += seen.to(tl.float32)
        if CAUSAL:
            logits = tl.where(column[:, None] <= (first_index + o_row)[None, :], logits, float("-inf"))
        power: tl.constexpr = 2 * LOG2E if TERM == "squared_attention" else LOG2E
        if MASK == "additive":
            exponent = (logits - lse[None, :]) * power  # the difference first: both may be near float32's lowest
        else:  # one fused multiply-add
            exponent = logits * (factor * power) - (lse * power)[None, :]
        if TERM != "anchor_score":
            acc += tl.exp2(exponent)
        else:
            probs = tl.exp2(exponent)
            output = tl.load(
                p_output + o_output + dv[None, :],
                mask=m_pair[:, None] & (dv < DV)[None, :], other=0.0,
            ).to(value.dtype)  # [BM, BDV]  # fmt: skip
            # |v - o|^2 = |v|^2 + |o|^2 - 2 v.o, all of the rounded o, so that it cancels where v and o agree.
            wide = output.to(tl.float32)
            output_norm = tl.sum(wide * wide, 1)
            cross = tl.dot(value, tl.trans(output), input_precision="ieee")  # [BN, BM]
            distance = tl.sqrt(tl.maximum(value_norm[:, None] + output_norm[None, :] - 2 * cross, 0.0))
            wide = query.to(tl.float32)
            query_norm = tl.sqrt(tl.sum(wide * wide, 1))
            acc += probs * distance * query_norm[None, :]
    return acc


@triton.jit
def column_statistic_kernel(
    p_query, p_keys, p_values, p_output, p_lse, p_mask, p_first_query, p_statistic, p_out, p_lengths, p_moment,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_mb, stride_mh, stride_mt, stride_mn,
    heads, kv_heads, q_len, kv_len, first_column, rows, splits, stride: tl.constexpr, scale,
    softcap, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, TERM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, FAR: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STATISTIC: tl.constexpr,
    STATIC: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """out[split, bh, j] = statistic[bh, j] + sum over this split's queries i and heads of w_ij term_ij.

    Statistics have `rows` places a kv head. If STATIC, `p_lengths` holds first_column and how many keys there are, and
    `p_first_query` the first key of each sequence that is no padding. If MOMENT (of one query token, G <= BM), a head's
    first program does what `query_moment_kernel` does, in place, which saves a step a launch.

    A program has BN keys of one kv head. BN divides BLOCK and blocks are cut at absolute columns, so that all keys of a
    program have the same near queries. Rows count from the first query, whose key column is `first_index`.
    """
    bh = tl.program_id(0) % heads  # the first columns have most queries: they start first in every head
    split = tl.program_id(1)
    b = (bh // kv_heads).to(tl.int64)
    h = (bh % kv_heads).to(tl.int64)
    if STATIC:
        first_column = tl.load(p_lengths)
        kv_len = first_column + tl.load(p_lengths + 1)
    first_of_block = (first_column // BN + tl.program_id(0) // heads) * BN
    column = first_of_block + tl.arange(0, BN)
    m_column = (column >= first_column) & (column < kv_len)
    if STATIC:
        m_column = m_column & (column >= tl.load(p_first_query + b))
    token = (column - first_column).to(tl.int64)
    d = tl.arange(0, BD)
    key = tl.load(
        p_keys + b * stride_kb + h * stride_kh + token[:, None] * stride_kt + d[None, :],
        mask=m_column[:, None] & (d < D)[None, :], other=0.0,
    )  # [BN, BD]  # fmt: skip
    value = key
    value_norm = tl.zeros([BN], tl.float32)
    if TERM == "anchor_score":
        dv = tl.arange(0, BDV)
        value = tl.load(
            p_values + b * stride_vb + h * stride_vh + token[:, None] * stride_vt + dv[None, :],
            mask=m_column[:, None] & (dv < DV)[None, :], other=0.0,
        )  # [BN, BDV]  # fmt: skip
        wide = value.to(tl.float32)
        value_norm = tl.sum(wide * wide, 1)
    p_query += b * stride_qb + h * G * stride_qh
    p_output += b * stride_ob + h * G * stride_oh
    p_lse += b * stride_lb + h * G * stride_lh
    p_mask += b * stride_mb + h * G * stride_mh

    first_index = kv_len - q_len
    first_row = 0
    if HAS_FIRST:
        first_row = tl.minimum(tl.maximum(tl.load(p_first_query + b) - first_index, 0), q_len).to(tl.int32)
    near_end = q_len
    acc = tl.zeros([BN, BM], tl.float32)
    if FAR:
        near_end = (first_of_block // BLOCK + NEAR_BLOCKS + 1) * BLOCK - first_index
        near_end = tl.maximum(tl.minimum(near_end, q_len), first_row)
        # The first row from near_end on whose index is stride - 1 modulo stride; under causality it sees all keys.
        far = near_end + stride - 1 - (first_index + near_end) % stride
        acc = _add_queries(
            acc, key, value, value_norm, column, m_column, p_query, p_output, p_lse, p_mask,
            stride_qh, stride_qt, stride_oh, stride_ot, stride_lh, stride_lt, stride_mh, stride_mt, stride_mn,
            far, (q_len - far + stride - 1) // stride, stride, first_index, split, splits, scale, softcap,
            G, D, DV, BD, BDV, BM, TERM, False, MASK, SOFTCAP,
        )  # fmt: skip
        acc *= stride
    if CAUSAL:  # rows up to the block's last column see some of its keys, those from there on all of them
        first_row = tl.maximum(first_row, first_of_block - first_index)
        full = tl.minimum(tl.maximum(first_row, first_of_block + BN - 1 - first_index), near_end)
        acc = _add_queries(
            acc, key, value, value_norm, column, m_column, p_query, p_output, p_lse, p_mask,
            stride_qh, stride_qt, stride_oh, stride_ot, stride_lh, stride_lt, stride_mh, stride_mt, stride_mn,
            first_row, full - first_row, 1, first_index, split, splits, scale, softcap,
            G, D, DV, BD, BDV, BM, TERM, True, MASK, SOFTCAP,
        )  # fmt: skip
        first_row = tl.maximum(first_row, full)
    acc = _add_queries(
        acc, key, value, value_norm, column, m_column, p_query, p_output, p_lse, p_mask,
        stride_qh, stride_qt, stride_oh, stride_ot, stride_lh, stride_lt, stride_mh, stride_mt, stride_mn,
        first_row, near_end - first_row, 1, first_index, split, splits, scale, softcap,
        G, D, DV, BD, BDV, BM, TERM, False, MASK, SOFTCAP,
    )  # fmt: skip

    total = tl.sum(acc, 1)
    o_row = bh.to(tl.int64) * rows
    if HAS_STATISTIC:
        total += tl.load(p_statistic + o_row + token, mask=m_column, other=0.0)
    if STATIC:
        tl.debug_barrier()  # in place: every warp has loaded before one stores
    tl.store(p_out + split.to(tl.int64) * heads * rows + o_row + token, total, mask=m_column)
    if MOMENT and tl.program_id(0) < heads:
        add_moment_of_step(p_query, p_moment + bh.to(tl.int64) * 2, stride_qh, scale * scale / D, G, D, BD, BM)


@triton.jit
def query_moment_kernel(
    p_query, p_first_query, p_moment, p_out, stride_qb, stride_qh, stride_qt,
    kv_heads, q_len, first_index, factor,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_MOMENT: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """out[part, bh] = moment[bh] + (factor sum |q|^2, number of queries), over ROWS (row, head of the group) pairs."""
    part = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first_row = 0
    if HAS_FIRST:
        first_row = tl.minimum(tl.maximum(tl.load(p_first_query + bh // kv_heads) - first_index, 0), q_len)
        first_row = first_row.to(tl.int32)
    p_query += bh // kv_heads * stride_qb + bh % kv_heads * G * stride_qh
    d = tl.arange(0, BD)
    acc = tl.zeros([BM, BD], tl.float32)
    first = part * ROWS
    last = tl.minimum(first + ROWS, q_len * G)
    for start in range(first, last, BM):
        pair = start + tl.arange(0, BM)
        head = (pair % G).to(tl.int64)
        row = (pair // G).to(tl.int64)
        m_pair = (pair < last) & (row >= first_row)
        query = tl.load(
            p_query + (head * stride_qh + row * stride_qt)[:, None] + d[None, :],
            mask=m_pair[:, None] & (d < D)[None, :], other=0.0,
        ).to(tl.float32)  # [BM, BD]  # fmt: skip
        acc += query * query
    total = tl.sum(tl.sum(acc, 1), 0) * factor
    counted = (tl.maximum(last, first_row * G) - tl.maximum(first, first_row * G)).to(tl.float32)
    if HAS_MOMENT:
        total += tl.load(p_moment + bh * 2)
        counted += tl.load(p_moment + bh * 2 + 1)
    p_out += (part.to(tl.int64) * tl.num_programs(1) + bh) * 2
    if IN_PLACE:
        tl.debug_barrier()
    tl.store(p_out, total)
    tl.store(p_out + 1, counted)


def column_statistic(
    term: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    first_column: int,
    kv_len: int,
    stride: int = 1,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    first_query: torch.Tensor | None = None,
    statistic: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """What the keys at columns ``first_column .. kv_len - 1`` received from the queries at the last `q_len` columns.

    The query at column i weighs for the key at column j: 1 if ``i // 128 - j // 128 <= 2``; otherwise `stride` if
    ``i % stride == stride - 1``, and 0 if not.

    Args:
        term: "squared_attention" (sum p^2), "accumulated_attention" (sum p) or "anchor_score" (sum p |v - o| |q|).
        query: ``(batch, q_heads, q_len, dim)`` after RoPE, any strides but a last one of 1; float16, bfloat16, float32.
        keys, values: ``(batch, kv_heads, n, dim)`` in the query's dtype; sizes may differ, up to 256.
        output: ``(batch, q_heads, q_len, value_dim)``, any float dtype; only "anchor_score" reads it.
        lse: float32 ``(batch, q_heads, q_len)``, natural logarithm, -inf for a row that sees nothing.
        scale, softcap: logits are ``softcap * tanh(scale * q.k / softcap)``, or ``scale * q.k``.
        first_column, kv_len: ``kv_len == first_column + n``; query r is at column ``kv_len - q_len + r``.
        mask: bool or additive ``(batch or 1, 1 or q_heads, 1 or q_len, kv_len)``; it replaces causality.
        is_causal: without a mask, a query sees the keys up to its own column.
        first_query: int64 ``(batch,)``: column of the first query that counts.
        statistic: float32 ``(batch, kv_heads, n)`` to add to. out: where to write, contiguous, not `statistic`.
        splits: programs that share the queries of a block of keys; chosen by the device's size if None.

    Returns:
        float32 ``(batch, kv_heads, n)``, the same for the same inputs whatever ran before.

    Raises:
        ValueError: for a term, size, dtype or stride that the kernel was not written for.
    """
    require(term in TERMS, f"term {term!r} is unknown; choose one of {', '.join(TERMS)}")
    batch, kv_heads, n, dim = keys.shape
    q_heads, q_len, value_dim = query.shape[1], query.shape[2], values.shape[3]
    _check_query(query, kv_heads, kv_len, first_query)
    shape = (batch, q_heads, q_len)
    require(query.shape == (*shape, dim), f"query of shape {tuple(query.shape)} does not fit keys {tuple(keys.shape)}")
    require(values.shape[:3] == keys.shape[:3], f"values {tuple(values.shape)} do not fit keys {tuple(keys.shape)}")
    require(value_dim <= MAX_DIM, f"value size {value_dim} has no kernel; up to {MAX_DIM} have")
    for name, x in (("keys", keys), ("values", values)):
        require(x.dtype == query.dtype, f"{name} are {x.dtype}, but the query is {query.dtype}: cast one of them")
        _check_last_stride(name, x)
    require(lse.dtype == torch.float32, f"lse is {lse.dtype}; it must be float32")
    require(lse.shape == shape, f"lse of shape {tuple(lse.shape)} does not fit {shape}")
    require(kv_len == first_column + n, f"kv_len={kv_len} is not first_column + n = {first_column} + {n}")
    require(stride >= 1, f"stride={stride} must be at least 1: every stride-th query counts, 1 counts all")
    require(softcap is None or softcap > 0, f"softcap={softcap} must be positive, or None")
    if term == "anchor_score":
        require(output is not None, "the term 'anchor_score' needs the attention's output")
        assert output is not None
        require(output.shape == (*shape, value_dim), f"output {tuple(output.shape)} is not {(*shape, value_dim)}")
        require(output.is_floating_point(), f"output is {output.dtype}; it must be a float dtype")
        _check_last_stride("output", output)
    else:
        output = query  # not read
    mask, kind, mask_strides = mask_arguments(mask, batch, q_heads, q_len, kv_len)
    statistic = _checked_sum("statistic", statistic, (batch, kv_heads, n))
    if out is None:
        out = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=keys.device)
    require(out.is_contiguous(), "out must be contiguous")
    _checked_sum("out", out, (batch, kv_heads, n))
    if n == 0:
        return out

    group = q_heads // kv_heads
    rows = q_len * group
    columns, queries, warps, stages = tile_sizes(term, head_block(max(dim, value_dim)), query.dtype, rows)
    blocks = ceil_div(kv_len, columns) - first_column // columns
    if splits is None:
        splits = _splits(blocks * batch * kv_heads, ceil_div(rows, queries), keys.device)
    limit = {} if term == "anchor_score" else register_limit(warps, keys)
    parts = out if splits == 1 else out.new_empty(splits, batch, kv_heads, n)
    column_statistic_kernel[(blocks * batch * kv_heads, splits)](
        query, keys, values, output, lse, query if mask is None else mask, first_query, statistic, parts, None, None,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *output.stride()[:3], *lse.stride(),
        *mask_strides, batch * kv_heads, kv_heads, q_len, kv_len, first_column, n, splits, stride,
        scale, 1.0 if softcap is None else softcap,
        G=group, D=dim, DV=value_dim, BD=head_block(dim), BDV=head_block(value_dim), BN=columns, BM=queries, TERM=term,
        CAUSAL=is_causal and kind == "none", MASK=kind, SOFTCAP=softcap is not None, FAR=stride > 1,
        HAS_FIRST=first_query is not None, HAS_STATISTIC=splits == 1 and statistic is not None, STATIC=False,
        MOMENT=False, num_warps=warps, num_stages=stages, **limit,
    )  # fmt: skip
    return out if splits == 1 else _sum_of_parts(parts, statistic, out)


def query_moment(
    query: torch.Tensor,
    scale: float,
    kv_heads: int,
    first_query: torch.Tensor | None,
    kv_len: int,
    moment: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over a group's queries of ``scale^2 |q|^2 / dim`` and their number: the mean is the variance of logits.

    Args:
        query: ``(batch, q_heads, q_len, dim)``, any strides but a last one of 1; float16, bfloat16 or float32.
        first_query: int64 ``(batch,)``: column of the first query that counts; None if all do.
        kv_len: the queries are at key columns ``kv_len - q_len .. kv_len - 1``.
        moment: float32 ``(batch, kv_heads, 2)`` to add to.

    Returns:
        float32 ``(batch, kv_heads, 2)``.

    Raises:
        ValueError: for a size, dtype or stride that the kernel was not written for.
    """
    _check_query(query, kv_heads, kv_len, first_query)
    batch, q_heads, q_len, dim = query.shape
    moment = _checked_sum("moment", moment, (batch, kv_heads, 2))
    group = q_heads // kv_heads
    parts = max(1, ceil_div(q_len * group, MOMENT_ROWS))
    out = torch.empty(parts, batch, kv_heads, 2, dtype=torch.float32, device=query.device)
    block = head_block(dim)
    query_moment_kernel[(parts, batch * kv_heads)](
        query, first_query, moment, out, *query.stride()[:3], kv_heads, q_len, kv_len - q_len, scale * scale / dim,
        G=group, D=dim, BD=block, BM=min(32, power_of_2(max(1, q_len * group))), ROWS=MOMENT_ROWS,
        HAS_FIRST=first_query is not None, HAS_MOMENT=parts == 1 and moment is not None, IN_PLACE=False, num_warps=4,
    )  # fmt: skip
    return out[0] if parts == 1 else _sum_of_parts(out, moment, torch.empty_like(out[0]))


def tile_sizes(term: str, block: int, dtype: torch.dtype, rows: int) -> tuple[int, int, int, int]:
    """Keys and query rows of a tile, warps, stages, for padded head size `block`: they fit 99 KB of shared memory."""
    wide = block > 128
    if dtype == torch.float32:  # exact products run on the ordinary cores: small tiles keep them in registers
        return (32, 16, 4, 1) if block > 64 else (32, 32, 4, 1)
    if rows <= 64:  # decode steps: many small programs, one tile of queries each
        return 32, max(16, power_of_2(rows)), 4, 1
    if term == "anchor_score":
        return (64, 32, 8, 1) if wide else (64, 64, 8, 2) if block > 64 else (128, 64, 8, 2)
    return (64, 64, 4, 2) if wide else (128, 64, 8, 3)


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Programs that share the queries of a block of keys: enough for two a processor, where the queries suffice."""
    if device.type != "cuda":
        return 1
    wanted = ceil_div(2 * torch.cuda.get_device_properties(device).multi_processor_count, programs)
    return max(1, min(wanted, tiles // TILES_PER_SPLIT, MAX_SPLITS))


def _sum_of_parts(parts: torch.Tensor, start: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.sum(parts, 0, out=out) if start is None else torch.add(start, parts.sum(0), out=out)


def _check_query(query: torch.Tensor, kv_heads: int, kv_len: int, first_query: torch.Tensor | None) -> None:
    batch, q_heads, q_len, dim = query.shape
    require(query.dtype in DTYPES, f"query is {query.dtype}; it must be float16, bfloat16 or float32")
    require(dim <= MAX_DIM, f"head size {dim} has no kernel; up to {MAX_DIM} have")
    require(q_heads % kv_heads == 0, f"{q_heads} query heads are not a multiple of {kv_heads} kv heads")
    _check_last_stride("query", query)
    require(q_len * q_heads < 2**31, f"{q_len} queries of {q_heads} heads are too many for one call: split the prompt")
    require(q_len <= kv_len, f"{q_len} queries are more than the {kv_len} keys they belong to")
    if first_query is not None:
        require(first_query.dtype == torch.int64, f"first_query is {first_query.dtype}; it must be int64")
        require(first_query.shape == (batch,), f"first_query has shape {tuple(first_query.shape)}, not ({batch},)")
        require(first_query.is_contiguous(), "first_query must be contiguous")


def _check_last_stride(name: str, x: torch.Tensor) -> None:
    require(x.stride(3) == 1, f"the last stride of {name} is {x.stride(3)}; it must be 1")


def _checked_sum(name: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    if x is None:
        return None
    require(x.dtype == torch.float32, f"{name} is {x.dtype}; it must be float32")
    require(x.shape == shape, f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    return x.contiguous()

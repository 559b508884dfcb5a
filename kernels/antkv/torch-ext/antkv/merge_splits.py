"""Merges the partial results of split attention by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, power_of_2, require
from .softmax import LOG2E
from .tables import KeyTables, ValueTables

LARGEST_BIAS = tl.constexpr(3.0)  # nats: a prompt's chunk subtracts what exact tokens would get, see prefill.py
ROWS_OF_A_TILE, CHANNELS_OF_A_STEP = 16, 32  # whole sub-vectors: they have up to 32 channels
TILES_FROM = 96  # rows of a kv head in all sequences: so many are merged by tiles that read its basis once, ...
TILE_SPLITS = 4  # ... if there are no more splits, which a tile takes one after the other


@triton.jit
def _load_part(
    p_partial, p_max, p_total, first, splits, channel,
    ROWS: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Maxima, totals [BS] and partial outputs [BS, BC] at some channels of `splits` parts from `first` on."""
    s = tl.arange(0, BS)
    m_split = s < splits
    o_row = (first + s) * ROWS
    maximum = tl.load(p_max + o_row, mask=m_split, other=float("-inf"))
    total = tl.load(p_total + o_row, mask=m_split, other=0.0)
    p = p_partial + o_row[:, None] * DV + channel[None, :]
    return maximum, total, tl.load(p, mask=m_split[:, None] & (channel < DV)[None, :], other=0.0)


@triton.jit
def _code_bias(p_row, p_channels, p_noise, scale, D: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr):
    """b(q) = scale^2 / 2 sum_g q_g . noise_g q_g of the query at `p_row`, at most LARGEST_BIAS."""
    g = tl.arange(0, BD // SUB)[:, None]
    i = tl.arange(0, SUB)[None, :]
    m = g < D // SUB
    q = tl.load(p_row + tl.load(p_channels + g * SUB + i, mask=m, other=0), mask=m, other=0.0).to(tl.float32) * scale
    p = p_noise + (g[:, :, None] * SUB + i[:, :, None]) * SUB + tl.arange(0, SUB)[None, None, :]
    noise = tl.load(p, mask=m[:, :, None], other=0.0)  # [groups, SUB, SUB]
    bias = 0.5 * tl.sum(tl.sum(tl.sum(noise * q[:, :, None] * q[:, None, :], 2), 1), 0)
    return tl.minimum(tl.maximum(bias, 0.0), LARGEST_BIAS)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    p_partial, p_max, p_total, p_synthesis, p_mean, p_sink_logit, p_query, stride_q_b, stride_q_h, stride_q_n,
    p_channels, p_noise, scale, p_out, p_lse, splits,
    H: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, SINK_LOGIT: tl.constexpr, BASIS: tl.constexpr,
    SUB: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Merges the parts of one row: `splits` of codes through the values' basis (if there is one), then as many plain
    ones. If NOISE, the logits of coded tokens get b(q), the same for all of a row.

    All splits of a row fit one tile, so that nothing waits for anything but the loads.
    """
    bh = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    h = (bh % H).to(tl.int32)
    plain = splits if BASIS else 0 * splits  # where the plain parts begin
    first_row = bh * (plain + splits) * ROWS + row
    p_partial += first_row * DV
    p_max += first_row
    p_total += first_row

    # Everything is asked for before anything is waited for.
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    maximum, total, part = _load_part(p_partial, p_max, p_total, plain, splits, c, ROWS, DV, BS)
    top = tl.max(maximum, 0)
    if BASIS:  # every program of a row sums all latent channels and projects them to BC plain ones
        dv = tl.arange(0, BDV)
        code_maximum, code_total, code_part = _load_part(p_partial, p_max, p_total, 0, splits, dv, ROWS, DV, BS)
        p_basis = p_synthesis + h * DV * DV + dv[:, None] * DV + c[None, :]
        basis = tl.load(p_basis, mask=(dv < DV)[:, None] & (c < DV)[None, :], other=0.0)
        mean = tl.load(p_mean + h * DV + c, mask=c < DV, other=0.0)
        if NOISE:
            code_maximum += LOG2E * _code_bias(
                p_query + bh // H * stride_q_b + (h * (ROWS // Q_LEN) + row // Q_LEN) * stride_q_h
                + row % Q_LEN * stride_q_n,
                p_channels + h * D, p_noise + h * D * SUB, scale, D, BD, SUB,
            )  # fmt: skip
        top = tl.maximum(top, tl.max(code_maximum, 0))
    if SINK_LOGIT:
        sink = tl.load(p_sink_logit + h * (ROWS // Q_LEN) + row // Q_LEN).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing

    weight = tl.exp2(maximum - safe)
    total = tl.sum(weight * total, 0)
    out = tl.sum(part * weight[:, None], 0)
    if BASIS:
        weight = tl.exp2(code_maximum - safe)
        code_total = tl.sum(weight * code_total, 0)
        total += code_total
        latent = tl.sum(code_part * weight[:, None], 0)
        out += tl.sum(latent[:, None] * basis, 0) + code_total * mean
    if SINK_LOGIT:
        total += tl.exp2(sink - safe)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + (bh * ROWS + row) * DV + c, out.to(p_out.dtype.element_ty), mask=c < DV)
    tl.store(p_lse + bh * ROWS + row, (top + tl.log2(total)) / LOG2E)


@triton.jit
def _tile_top(p_max, m_row, splits, ROWS: tl.constexpr, BM: tl.constexpr):
    """Largest of `splits` maxima of each row of a tile [BM]; -inf for rows outside."""
    top = tl.full([BM], float("-inf"), tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(p_max + s * ROWS, mask=m_row, other=float("-inf")))
    return top


@triton.jit
def _tile_sum(
    p_partial, p_max, m_row, channel, safe, splits,
    ROWS: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum of `splits` parts of each row of a tile at some channels [BM, BC], each times 2^(its maximum - safe)."""
    out = tl.zeros([BM, BC], tl.float32)
    m = m_row[:, None] & (channel < DV)[None, :]
    for s in range(splits):
        weight = tl.exp2(tl.load(p_max + s * ROWS, mask=m_row, other=float("-inf")) - safe)
        out += weight[:, None] * tl.load(p_partial[:, None] + s * ROWS * DV + channel[None, :], mask=m, other=0.0)
    return out


@triton.jit
def _tile_total(p_total, p_max, m_row, safe, splits, ROWS: tl.constexpr, BM: tl.constexpr):
    """`_tile_sum` of the sums of weights [BM]."""
    total = tl.zeros([BM], tl.float32)
    for s in range(splits):
        weight = tl.exp2(tl.load(p_max + s * ROWS, mask=m_row, other=float("-inf")) - safe)
        total += weight * tl.load(p_total + s * ROWS, mask=m_row, other=0.0)
    return total


@triton.jit(do_not_specialize=["splits", "count"])
def merge_tiles_kernel(
    p_partial, p_max, p_total, p_synthesis, p_mean, p_sink_logit, p_query, stride_q_b, stride_q_h, stride_q_n,
    p_channels, p_noise, scale, p_out, p_lse, splits, count,
    H: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SINK_LOGIT: tl.constexpr, SUB: tl.constexpr, NOISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What `merge_splits_kernel` does with a basis, for BM of the `count` rows that a kv head has in all sequences.

    For large batches: there the basis is read once a tile and its products go to the matrix units. BK latent channels
    at a time, so that shared memory is no limit.
    """
    h = tl.program_id(1)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = r < count
    row = r % ROWS
    bh = (r // ROWS).to(tl.int64) * H + h
    q_head = h * (ROWS // Q_LEN) + row // Q_LEN
    first = bh * (2 * splits) * ROWS + row
    p_partial += first * DV
    p_max += first
    p_total += first
    plain = splits * ROWS  # where the plain parts begin
    k = tl.arange(0, BK)

    code_top = _tile_top(p_max, m_row, splits, ROWS, BM)
    top = _tile_top(p_max + plain, m_row, splits, ROWS, BM)
    bias = tl.zeros([BM], tl.float32)
    if NOISE:
        p_query += (r // ROWS).to(tl.int64) * stride_q_b + q_head * stride_q_h + row % Q_LEN * stride_q_n
        for d in range(0, D, BK):  # BK is a multiple of SUB: a block of the noise's diagonal is in one step
            m = d + k < D
            channel = tl.load(p_channels + h * D + d + k, mask=m, other=0)
            q = tl.load(p_query[:, None] + channel[None, :], mask=m_row[:, None] & m[None, :], other=0.0)
            q = q.to(tl.float32) * scale  # [BM, BK]
            block = (k[:, None] // SUB == k[None, :] // SUB) & m[:, None]
            p = p_noise + (h * D + d + k)[:, None] * SUB + (k % SUB)[None, :]
            noise = tl.load(p, mask=block, other=0.0)  # [BK, BK]
            bias += tl.sum(tl.dot(q, noise, input_precision=PRECISION) * q, 1)
        bias = LOG2E * tl.minimum(tl.maximum(0.5 * bias, 0.0), LARGEST_BIAS)
    top = tl.maximum(top, code_top + bias)
    if SINK_LOGIT:
        sink = tl.load(p_sink_logit + q_head, mask=m_row, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing

    dv = tl.arange(0, BDV)
    out = _tile_sum(p_partial + plain * DV, p_max + plain, m_row, dv, safe, splits, ROWS, DV, BM, BDV)
    code_total = _tile_total(p_total, p_max, m_row, safe - bias, splits, ROWS, BM)
    total = code_total + _tile_total(p_total + plain, p_max + plain, m_row, safe, splits, ROWS, BM)
    for c in range(0, DV, BK):
        latent = _tile_sum(p_partial, p_max, m_row, c + k, safe - bias, splits, ROWS, DV, BM, BK)
        p_basis = p_synthesis + h * DV * DV + (c + k)[:, None] * DV + dv[None, :]
        basis = tl.load(p_basis, mask=(c + k < DV)[:, None] & (dv < DV)[None, :], other=0.0)
        out = tl.dot(latent, basis, out, input_precision=PRECISION)
    out += code_total[:, None] * tl.load(p_mean + h * DV + dv, mask=dv < DV, other=0.0)[None, :]
    if SINK_LOGIT:
        total += tl.exp2(sink - safe)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    o_row = bh * ROWS + row
    p = p_out + o_row[:, None] * DV + dv[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (dv < DV)[None, :])
    tl.store(p_lse + o_row, (top + tl.log2(total)) / LOG2E, mask=m_row)


def merge_splits(
    partial: torch.Tensor,
    state: torch.Tensor,
    tables: ValueTables | None,
    sink_logit: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor | None = None,
    keys: KeyTables | None = None,
    scale: float = 1.0,
) -> None:
    """Writes `out` ``(batch, q_heads, q_len, value_dim)``, any float dtype; `lse` ``(batch, q_heads, q_len)``, float32.

    Args:
        partial: float32 ``(batch, kv_heads, parts, rows, value_dim)``, unnormalised; the first half in the latent
            basis of `tables`, the second in plain channels, or all of them without `tables`.
        tables: of the values, with their basis (`synthesis`, `mean`); None where nothing is coded.
        sink_logit: ``(q_heads,)``, a logit with no value in each head's softmax; None for none.
        state: float32 ``(2, batch, kv_heads, parts, rows)``: maximum (in units of log 2) and sum of weights.
        query, keys, scale: ``(batch, q_heads, q_len, head_dim)`` after RoPE, stride 1 along channels, the tables whose
            noise raises the logits of coded tokens, and the factor on q.k; without them nothing is raised.

    Raises:
        ValueError: if the noise of `keys` does not fit `partial`'s heads.
    """
    batch, heads, parts, rows, dim = partial.shape
    columns = 32
    basis = (out, out) if tables is None else (tables.synthesis, tables.mean)
    if query is None or keys is None or keys.noise is None:
        noise, sizes = (out, 0, 0, 0, out, out, 1.0), dict(D=dim, SUB=1, NOISE=False)
    else:
        want = (heads, keys.codes.groups, keys.codes.sub_dim, keys.codes.sub_dim)
        fits = keys.noise.shape == want and keys.noise.dtype == torch.float32 and keys.noise.is_contiguous()
        require(fits, f"noise is {tuple(keys.noise.shape)} {keys.noise.dtype}; contiguous float32 {want} is needed")
        noise = (query, *query.stride()[:3], keys.channels, keys.noise, scale)
        sizes = dict(D=query.shape[3], SUB=keys.codes.sub_dim, NOISE=True)
    splits = parts if tables is None else parts // 2
    sink, has_sink = (out, False) if sink_logit is None else (sink_logit, True)
    arguments = (partial, state[0], state[1], *basis, sink, *noise, out, lse, splits)
    fixed = dict(H=heads, ROWS=rows, Q_LEN=out.shape[2], DV=dim, BDV=head_block(dim), SINK_LOGIT=has_sink, **sizes)
    if tables is not None and batch * rows >= TILES_FROM and splits <= TILE_SPLITS:
        # Three products of TF32 keep what float32 has, but for the last bits; other makers' units have float32's.
        precision = "ieee" if torch.version.hip is not None else "tf32x3"
        merge_tiles_kernel[(ceil_div(batch * rows, ROWS_OF_A_TILE), heads)](
            *arguments, batch * rows, BM=ROWS_OF_A_TILE, BK=CHANNELS_OF_A_STEP, PRECISION=precision, **fixed,
            num_warps=4,
        )  # fmt: skip
        return
    merge_splits_kernel[(batch * heads, rows, ceil_div(dim, columns))](
        *arguments, BD=head_block(fixed["D"]), BS=max(2, power_of_2(splits)), BC=columns, BASIS=tables is not None,
        **fixed, num_warps=4,
    )  # fmt: skip

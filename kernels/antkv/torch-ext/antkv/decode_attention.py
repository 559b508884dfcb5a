"""Decode attention: a few query tokens over codes, exact tokens and the recent window, split over tokens.

One launch does all the attending: some programs stream codes, some the exact tokens and the window. A second, small one
merges their partial results by log-sum-exp, applies the basis and mean of the values once a query, and returns the LSE.

    o_i = (sum_{j coded} p_ij y_j) S + (sum_{j coded} p_ij) mean + sum_{j exact or recent} p_ij v_j,
    p_ij = exp(softcap(scale q_i . k_j) [+ b(q_i) if j is coded] - lse_i)

Keys are coded before RoPE. With R(t) the rotation to position t and s the position of a tile's first token,
``q . R(s + r) k = (R(-s) q) . (R(r) k)``: the query is turned once a tile, keys by a table that every tile shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tables
from .checks import head_block, mask_arguments, power_of_2, require
from .decode_plan import (
    MIN_ROWS,
    check_decode,
    check_rows,
    dot_dtype,
    plan_splits,
    pointers,
    sort_exact,
    tile_options,
    triton_dtype,
)
from .merge_splits import merge_splits
from .past import QuantizedPast
from .softmax import dot, masked_logits, softmax_step
from .tiles import first_codes, gather_latent, sin_cos, turned

TURNS = tl.constexpr(tables.TURNS)
MAX_DIM = 256


@triton.jit
def attend_codes(
    qx, qy, first, last, p_key_row, p_value_row, p_bits, p_key_table, p_value_table, p_turns, frequency, m_pair,
    mean_x, mean_y, offset, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row, query_of_row, m_row,
    softcap, maximum, acc,
    K_GROUPS: tl.constexpr, K_STAGES: tl.constexpr, K_BITS: tl.constexpr, K_SUB: tl.constexpr, K_WIDTH: tl.constexpr,
    V_GROUPS: tl.constexpr, V_STAGES: tl.constexpr, V_BITS: tl.constexpr, V_SUB: tl.constexpr, V_WIDTH: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    ROTATES: tl.constexpr, HAS_EXACT: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds the coded tokens ``first..last-1`` to the online softmax; `acc` [BDV, BR] is in the values' latent basis."""
    r = tl.arange(0, BN)
    if ROTATES:
        # All tiles turn keys by the same table; the query is turned to the tile's first token, BN positions a step.
        pair, xy = tl.arange(0, BD // 2), tl.arange(0, 2)
        p_turn = p_turns + r[:, None, None] * D + pair[None, :, None] * 2 + xy[None, None, :]  # [BN, BD / 2, 2]
        frequency = frequency[:, None]
        sin_s, cos_s = sin_cos((first - offset).to(tl.float32) * frequency)  # [BD / 2, 1]
        sin_step, cos_step = sin_cos(BN * frequency)
    weights = tl.zeros([BN, qx.shape[1]], tl.float32)
    row = (first + r).to(tl.int64)
    m_n = first + r < last
    # Codes come from far away: those of the next tile are asked for before this tile is worked on.
    key_codes = first_codes(p_key_row + row * K_WIDTH, m_n, K_GROUPS, BD // K_SUB, K_STAGES, K_BITS, K_WIDTH)
    value_codes = first_codes(p_value_row + row * V_WIDTH, m_n, V_GROUPS, BDV // V_SUB, V_STAGES, V_BITS, V_WIDTH)
    if HAS_EXACT:
        bits = tl.load(p_bits + row // 8, mask=m_n, other=0)
    for start_n in range(first, last, BN):
        n = start_n + r
        m_n = n < last
        row = n.to(tl.int64)
        m_next = n + BN < last
        next_keys = first_codes(
            p_key_row + (row + BN) * K_WIDTH, m_next, K_GROUPS, BD // K_SUB, K_STAGES, K_BITS, K_WIDTH
        )
        next_values = first_codes(
            p_value_row + (row + BN) * V_WIDTH, m_next, V_GROUPS, BDV // V_SUB, V_STAGES, V_BITS, V_WIDTH
        )
        if HAS_EXACT:
            next_bits = tl.load(p_bits + (row + BN) // 8, mask=m_next, other=0)
        key = gather_latent(
            p_key_row + row * K_WIDTH, m_n, key_codes, p_key_table, K_GROUPS, BD // K_SUB, K_STAGES, K_BITS, K_SUB,
            K_WIDTH,
        )  # fmt: skip
        kx, ky = tl.split(tl.reshape(key, [BN, BD // 2, 2]))
        # In the tables' dtype: what float16 rounds here, it would round on the way into the dot.
        kx = kx.to(DTYPE) + mean_x[None, :].to(DTYPE)
        ky = ky.to(DTYPE) + mean_y[None, :].to(DTYPE)
        qx_s, qy_s = qx, qy
        if ROTATES:
            turn = tl.load(p_turn, mask=m_pair[None, :, None], other=0.0) if BD != D else tl.load(p_turn)
            cos_r, sin_r = tl.split(turn)
            kx, ky = turned(kx, ky, cos_r, sin_r)
            qx_s, qy_s = turned(qx, qy, cos_s, -sin_s)
            cos_s, sin_s = turned(cos_s, sin_s, cos_step, sin_step)
        # Both channels of the pairs in one product: its operands pass through shared memory once instead of twice.
        key = tl.reshape(tl.join(kx, ky), [BN, BD])
        query = tl.reshape(tl.join(tl.trans(qx_s.to(DTYPE)), tl.trans(qy_s.to(DTYPE))), [qx.shape[1], BD])
        logits = dot(key, tl.trans(query), tl.zeros([BN, qx.shape[1]], tl.float32), DTYPE)
        if HAS_EXACT:
            m_n = m_n & (((bits >> (n % 8).to(tl.uint8)) & 1) == 0)
            bits = next_bits
        logits = masked_logits(
            logits, m_n[:, None], n, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row, query_of_row,
            m_row, softcap, SOFTCAP, MASK,
        )  # fmt: skip
        # Only here, so that its registers are not held while keys are worked on; the softmax hides the wait.
        value = gather_latent(
            p_value_row + row * V_WIDTH, n < last, value_codes, p_value_table, V_GROUPS, BDV // V_SUB, V_STAGES, V_BITS,
            V_SUB, V_WIDTH,
        )  # fmt: skip
        key_codes, value_codes = next_keys, next_values
        probs, decay, maximum = softmax_step(logits, maximum)
        weights = weights * decay[None, :] + probs  # summed over keys after the loop: that sum crosses warps
        acc = dot(tl.trans(tl.reshape(value, [BN, BDV]).to(DTYPE)), probs.to(DTYPE), acc * decay[None, :], DTYPE)
    return maximum, tl.sum(weights, 0), acc


@triton.jit
def attend_exact(
    qx, qy, first, last, p_positions, p_keys, p_values, p_key_scale, p_value_scale, channel_x, channel_y, m_pair,
    frequency, pair_scale, mean_x, mean_y, offset, first_index, p_mask, stride_mask_h, stride_mask_q, stride_mask_n,
    head_of_row, query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
    D: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    KIND: tl.constexpr, ROTATES: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds exact tokens ``first..last-1`` of a set. KIND: "tail" (consecutive tokens from `first_index`), "plain"
    (positions, keys after RoPE) or "int8" (positions, keys before RoPE less their mean, scales)."""
    dv = tl.arange(0, BDV)
    for start_n in range(first, last, BN):
        n = start_n + tl.arange(0, BN)
        m_n = n < last
        # Everything is asked for before anything is waited for; what empty slots hold is hidden below.
        if KIND == "tail":
            position = first_index + n
        else:
            position = tl.load(p_positions + n, mask=m_n, other=-1)
        if KIND == "int8":
            key_scale = tl.load(p_key_scale + n, mask=m_n, other=0.0).to(tl.float32)[:, None]
            value_scale = tl.load(p_value_scale + n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        m_key = m_n[:, None] & m_pair[None, :]
        p_key = p_keys + n.to(tl.int64)[:, None] * D
        kx = tl.load(p_key + channel_x[None, :], mask=m_key, other=0.0)
        ky = tl.load(p_key + channel_y[None, :], mask=m_key, other=0.0)
        value = tl.load(
            p_values + n.to(tl.int64)[:, None] * DV + dv[None, :], mask=m_n[:, None] & (dv < DV)[None, :], other=0.0
        )
        m_n = m_n & (position >= 0)
        if KIND == "int8":
            kx = kx.to(tl.float32) * key_scale + mean_x[None, :]
            ky = ky.to(tl.float32) * key_scale + mean_y[None, :]
            if ROTATES:
                angle = (position - offset).to(tl.float32)[:, None] * frequency[None, :]
                sin, cos = sin_cos(angle)
                kx, ky = turned(kx, ky, cos * pair_scale[None, :], sin * pair_scale[None, :])
            value = value.to(tl.float32) * tl.where(m_n[:, None], value_scale, 0.0)
        elif KIND == "plain":
            value = tl.where(m_n[:, None], value, 0.0)
        logits = tl.zeros([BN, qx.shape[1]], tl.float32)
        logits = dot(kx.to(DTYPE), qx.to(DTYPE), logits, DTYPE)
        logits = dot(ky.to(DTYPE), qy.to(DTYPE), logits, DTYPE)
        visible = m_n[:, None]
        if KIND == "tail":
            visible = visible & (position[:, None] <= last_of_row[None, :])
        logits = masked_logits(
            logits, visible, position, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row, query_of_row,
            m_row, softcap, SOFTCAP, MASK,
        )  # fmt: skip
        probs, decay, maximum = softmax_step(logits, maximum)
        total = total * decay + tl.sum(probs, 0)
        acc = dot(tl.trans(value.to(DTYPE)), probs.to(DTYPE), acc * decay[None, :], DTYPE)
    return maximum, total, acc


_COUNTS = ["n_codes", "n_anchors", "n_sinks", "n_tail", "code_rows", "anchor_rows", "tail_rows", "splits", "bits_width"]


@triton.jit(do_not_specialize=_COUNTS)
def decode_kernel(
    p_query, stride_q_b, stride_q_h, stride_q_n, p_partial, p_partial_max, p_partial_total,
    p_key_codes, p_value_codes, p_bits, p_offset, p_key_table, p_value_table,
    p_channels, p_frequency, p_pair_scale, p_mean, p_turns,
    p_anchor_positions, p_anchor_keys, p_anchor_values, p_anchor_key_scale, p_anchor_value_scale,
    p_sink_positions, p_sink_keys, p_sink_values, p_tail_keys, p_tail_values,
    p_mask, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_n, p_lengths,
    n_codes, n_anchors, n_sinks, n_tail, code_rows, anchor_rows, tail_rows, splits, bits_width, scale, softcap,
    B, H: tl.constexpr, LANES: tl.constexpr, PITCH: tl.constexpr,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, BR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    K_GROUPS: tl.constexpr, K_STAGES: tl.constexpr, K_BITS: tl.constexpr, K_SUB: tl.constexpr, K_WIDTH: tl.constexpr,
    V_GROUPS: tl.constexpr, V_STAGES: tl.constexpr, V_BITS: tl.constexpr, V_SUB: tl.constexpr, V_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr, ANCHOR_DTYPE: tl.constexpr, SINK_DTYPE: tl.constexpr, TAIL_DTYPE: tl.constexpr,
    ANCHORS: tl.constexpr, ROTATES: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """One split: partial outputs ``(B, H, 2 * splits, GROUP * Q_LEN, DV)``, all of codes first, and softmax states.

    Buffers have `code_rows`, `anchor_rows` and `tail_rows` tokens a kv head. If STATIC, how many of them count is read
    from `p_lengths`, and tokens before `p_offset` are not visible (no mask says so then).
    """
    if STATIC:
        n_codes = tl.load(p_lengths)
        n_tail = tl.load(p_lengths + 1)
        n_anchors = tl.load(p_lengths + 2)
    # Programs that share an SM should share a head, whose tables fill its L1. SMs are dealt programs in order: with as
    # many pairs as SMs those PITCH apart become neighbours; with more, heads alternate by LANES, which divides the SMs.
    pid = tl.program_id(0)
    if PITCH > 0:
        pid = pid % PITCH * 2 + pid // PITCH
    lane = pid % LANES
    rest = pid // LANES
    split = rest % splits
    rest = rest // splits
    b = rest % B
    h = rest // B * LANES + lane
    bh = (b * H + h).to(tl.int64)

    row = tl.arange(0, BR)
    m_row = row < GROUP * Q_LEN
    head_of_row = h * GROUP + row // Q_LEN
    query_of_row = row % Q_LEN
    pair = tl.arange(0, BD // 2)
    m_pair = pair < D // 2
    channel_x = tl.load(p_channels + h * D + 2 * pair, mask=m_pair, other=0)
    channel_y = tl.load(p_channels + h * D + 2 * pair + 1, mask=m_pair, other=0)
    mean_x = tl.load(p_mean + h * D + 2 * pair, mask=m_pair, other=0.0)
    mean_y = tl.load(p_mean + h * D + 2 * pair + 1, mask=m_pair, other=0.0)
    frequency = tl.load(p_frequency + h * (D // 2) + pair, mask=m_pair, other=0.0)
    pair_scale = tl.load(p_pair_scale + h * (D // 2) + pair, mask=m_pair, other=1.0)
    p_row = p_query + b.to(tl.int64) * stride_q_b + head_of_row * stride_q_h + query_of_row * stride_q_n
    # Tokens x rows, not rows x tokens: a dot takes few rows as its N (8) cheaper than as its M (16).
    m_query = m_pair[:, None] & m_row[None, :]
    qx = tl.load(p_row[None, :] + channel_x[:, None], mask=m_query, other=0.0).to(tl.float32) * scale
    qy = tl.load(p_row[None, :] + channel_y[:, None], mask=m_query, other=0.0).to(tl.float32) * scale
    offset = tl.load(p_offset + b).to(tl.int32)
    if MASK != "none":
        p_mask += b.to(tl.int64) * stride_mask_b

    maximum = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BDV, BR], tl.float32)
    HAS_EXACT: tl.constexpr = (ANCHORS != "none") or HAS_SINKS
    share = tl.cdiv(tl.cdiv(n_codes, BN), splits) * BN
    first = split * share
    last = tl.minimum(first + share, n_codes)
    if STATIC:
        first = tl.maximum(first, offset)
    code_maximum, code_total, code_acc = attend_codes(
        qx, qy, first, last, p_key_codes + bh * code_rows * K_WIDTH, p_value_codes + bh * code_rows * V_WIDTH,
        p_bits + bh * bits_width, p_key_table + h * (K_GROUPS * K_STAGES * K_SUB << K_BITS),
        p_value_table + h * (V_GROUPS * V_STAGES * V_SUB << V_BITS),
        p_turns + h * (TURNS * D), frequency, m_pair, mean_x, mean_y, offset, p_mask, stride_mask_h, stride_mask_q,
        stride_mask_n, head_of_row, query_of_row, m_row, softcap, maximum, acc,
        K_GROUPS, K_STAGES, K_BITS, K_SUB, K_WIDTH, V_GROUPS, V_STAGES, V_BITS, V_SUB, V_WIDTH,
        D, BD, BDV, BN, DTYPE, ROTATES, HAS_EXACT, SOFTCAP, MASK,
    )  # fmt: skip
    dv = tl.arange(0, BDV)
    m_out = (dv < DV)[:, None] & m_row[None, :]
    out = (bh * 2 * splits + split) * (GROUP * Q_LEN) + row
    tl.store(p_partial + out[None, :] * DV + dv[:, None], code_acc, mask=m_out)
    tl.store(p_partial_max + out, code_maximum, mask=m_row)
    tl.store(p_partial_total + out, code_total, mask=m_row)

    # Its part of the exact tokens, in whole tiles: their values are in plain channels, so they are summed apart.
    last_of_row = n_codes + n_tail - (Q_LEN if CAUSAL else 1) + (query_of_row if CAUSAL else 0 * query_of_row)
    if ANCHORS != "none":
        share = tl.cdiv(tl.cdiv(n_anchors, BM), splits) * BM
        first = split * share
        maximum, total, acc = attend_exact(
            qx, qy, first, tl.minimum(first + share, n_anchors), p_anchor_positions + bh * anchor_rows,
            p_anchor_keys + bh * anchor_rows * D, p_anchor_values + bh * anchor_rows * DV,
            p_anchor_key_scale + bh * anchor_rows, p_anchor_value_scale + bh * anchor_rows, channel_x, channel_y,
            m_pair, frequency, pair_scale, mean_x, mean_y, offset, 0, p_mask, stride_mask_h, stride_mask_q,
            stride_mask_n, head_of_row, query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
            D, DV, BDV, BM, ANCHOR_DTYPE, ANCHORS, ROTATES, SOFTCAP, MASK,
        )  # fmt: skip
    if HAS_SINKS and split == splits - 1:
        maximum, total, acc = attend_exact(
            qx, qy, 0, n_sinks, p_sink_positions + bh * n_sinks, p_sink_keys + bh * n_sinks * D,
            p_sink_values + bh * n_sinks * DV, p_sink_keys, p_sink_keys, channel_x, channel_y, m_pair,
            frequency, pair_scale, mean_x, mean_y, offset, 0, p_mask, stride_mask_h, stride_mask_q, stride_mask_n,
            head_of_row, query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
            D, DV, BDV, BM, SINK_DTYPE, "plain", ROTATES, SOFTCAP, MASK,
        )  # fmt: skip
    share = tl.cdiv(tl.cdiv(n_tail, BM), splits) * BM
    first = (splits - 1 - split) * share  # the last splits have fewest anchors
    last = tl.minimum(first + share, n_tail)
    if STATIC:
        first = tl.maximum(first, offset - n_codes)
    maximum, total, acc = attend_exact(
        qx, qy, first, last, p_offset, p_tail_keys + bh * tail_rows * D, p_tail_values + bh * tail_rows * DV,
        p_tail_keys, p_tail_keys, channel_x, channel_y, m_pair, frequency, pair_scale, mean_x, mean_y, offset, n_codes,
        p_mask, stride_mask_h, stride_mask_q, stride_mask_n,
        head_of_row, query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
        D, DV, BDV, BM, TAIL_DTYPE, "tail", ROTATES, SOFTCAP, MASK,
    )  # fmt: skip
    out += splits * GROUP * Q_LEN
    tl.store(p_partial + out[None, :] * DV + dv[:, None], acc, mask=m_out)
    tl.store(p_partial_max + out, maximum, mask=m_row)
    tl.store(p_partial_total + out, total, mask=m_row)


def decode_attention(
    query: torch.Tensor,
    past: QuantizedPast,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest tokens over a quantized past and an exact tail (AnTKV, arXiv 2506.19505, section 3.3).

    Args:
        query: ``(batch, q_heads, q_len, head_dim)`` after RoPE, with ``q_heads / kv_heads * q_len <= 64``.
        past: see `QuantizedPast`; with its `lengths`, the tail may have unused tokens at its end as well.
        tail_keys, tail_values: ``(batch, kv_heads, tail, dim)``, the newest tokens, keys after RoPE, contiguous.
        is_causal: without a mask, query r sees keys up to ``past.length + tail - q_len + r``; else all.
        scale: factor on q.k. softcap: ``softcap * tanh(logit / softcap)``.
        mask: bool (True = visible) or additive, ``(batch or 1, 1 or q_heads, 1 or q_len, past.length + tail)``.
        sink_logit: ``(q_heads,)``, joins the denominator only.
        out: where to write the output, contiguous.

    Returns:
        output ``(batch, q_heads, q_len, value_dim)`` in the query's dtype and float32 LSE ``(batch, q_heads, q_len)``.

    Raises:
        ValueError: for shapes, dtypes or layouts that the kernel was not written for.
    """
    batch, q_heads, q_len, dim = query.shape
    heads, tail, value_dim = tail_keys.shape[1], tail_keys.shape[2], tail_values.shape[3]
    group = q_heads // heads
    rows, n_codes, lengths = group * q_len, past.length, past.lengths
    keys, values = past.key_tables, past.value_tables
    require(n_codes > 0 or lengths is not None, "0 coded tokens: without a quantized past any attention kernel will do")
    check_decode(query, past, tail_keys, tail_values, sink_logit, out)
    check_rows(query, rows, max(dim, value_dim))
    require(max(dim, value_dim) <= MAX_DIM, f"head sizes {dim} and {value_dim}; up to {MAX_DIM} have a kernel")
    anchors, sinks = sort_exact(past.exact)
    n_anchors = 0 if anchors is None else anchors.positions.shape[2]
    n_sinks = 0 if sinks is None else sinks.positions.shape[2]
    block, value_block = head_block(dim), head_block(value_dim)
    row_block = max(MIN_ROWS, power_of_2(rows))
    dtype = tl.float32 if keys.centroids.dtype == torch.float32 else tl.float16
    splits, lanes, pitch = plan_splits(max(1, n_codes), batch, heads, query.device)

    options = dict(device=query.device, dtype=torch.float32)
    partial = torch.empty(batch, heads, 2 * splits, rows, value_dim, **options)
    state = torch.empty(2, batch, heads, 2 * splits, rows, **options)
    lse = torch.empty(batch, q_heads, q_len, **options)
    out = torch.empty(batch, q_heads, q_len, value_dim, device=query.device, dtype=query.dtype) if out is None else out
    columns = mask.shape[-1] if mask is not None and lengths is not None else n_codes + tail
    mask, kind, strides = mask_arguments(mask, batch, q_heads, q_len, columns)
    a = pointers(anchors, query)
    s = pointers(sinks, query)
    decode_kernel[(batch * heads * splits,)](
        query, *query.stride()[:3], partial, state[0], state[1],
        past.key_codes, past.value_codes, past.exact_bits, past.offset, keys.centroids, values.centroids,
        keys.channels, keys.frequency, keys.pair_scale, keys.mean, keys.turns, *a, *s[:3], tail_keys, tail_values,
        query if mask is None else mask, *strides, query if lengths is None else lengths,
        n_codes, n_anchors, n_sinks, tail, past.capacity, n_anchors, tail, splits, past.exact_bits.shape[-1], scale,
        softcap or 0.0,
        batch, H=heads, LANES=lanes, PITCH=pitch, GROUP=group, Q_LEN=q_len, BR=row_block,
        D=dim, DV=value_dim, BD=block, BDV=value_block, **tile_options(block, row_block, dtype == tl.float32),
        K_GROUPS=keys.codes.groups, K_STAGES=keys.codes.stages, K_BITS=keys.codes.code_bits, K_SUB=keys.codes.sub_dim,
        K_WIDTH=keys.codes.width, V_GROUPS=values.codes.groups, V_STAGES=values.codes.stages,
        V_BITS=values.codes.code_bits, V_SUB=values.codes.sub_dim, V_WIDTH=values.codes.width,
        DTYPE=dtype, ANCHOR_DTYPE=dot_dtype(anchors, dtype), SINK_DTYPE=dot_dtype(sinks, dtype),
        TAIL_DTYPE=triton_dtype(tail_keys.dtype),
        ANCHORS="none" if anchors is None else "plain" if anchors.key_scale is None else "int8",
        ROTATES=keys.rotates, HAS_SINKS=sinks is not None, CAUSAL=is_causal and mask is None,
        SOFTCAP=softcap is not None, MASK=kind, STATIC=lengths is not None,
    )  # fmt: skip
    merge_splits(partial, state, values, sink_logit, out, lse, query, keys, scale)
    return out, lse

"""Decode attention over scalar codes: keys by channel, values by token; exact tokens and window in the same launch.

    k_j = R(j) (mean + zero_g + scale_g * code_j),  v_j = mean' + std (zero_j + scale_j * code_j),
    o_i = sum_j p_ij v_j,  p_ij = exp(softcap(scale q_i . k_j) - lse_i)

with g the group of consecutive tokens that j belongs to, whose scale and zero are loaded once. A tile never crosses a
group; as in `decode_attention` the query is turned once a tile and keys by a table that every tile shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, mask_arguments, power_of_2, require
from .decode_attention import MAX_DIM, attend_exact
from .decode_plan import (
    MIN_ROWS,
    check_rows,
    check_tail,
    dot_dtype,
    plan_splits,
    pointers,
    sort_exact,
    triton_dtype,
)  # fmt: skip
from .merge_splits import merge_splits
from .past import ExactTokens
from .softmax import dot, masked_logits, softmax_step
from .tiles import sin_cos, turned

BITS = (2, 4)
GROUPS = (32, 64, 128)


class ChannelPairs(NamedTuple):
    """RoPE of a layer: channels in pairs, of which pair p turns by ``position * frequency[p]``.

    Args:
        channels: int32 ``(head_dim,)``: plain channels, those of pair p at 2p and 2p + 1.
        frequency, pair_scale: float32 ``(head_dim // 2,)``; 0 and 1 for a pair that does not turn.
        rotates: False if none does.
        turns: ``(TURNS, head_dim // 2, 2)``, float16 or float32: cosine and sine of ``t * frequency`` times
            `pair_scale` for t = 0, 1, ...
    """

    channels: torch.Tensor
    frequency: torch.Tensor
    pair_scale: torch.Tensor
    rotates: bool
    turns: torch.Tensor


class ScalarPast(NamedTuple):
    """Scalar codes of the tokens at indices 0, 1, ... and the exact tokens among them.

    Args:
        key_codes: uint8 ``(batch, kv_heads, n, head_dim * key_bits / 8)``, channel 0 in the low bits of byte 0.
        value_codes: uint8 ``(batch, kv_heads, n, bytes)``: packed codes, then the float16 scales of the channel groups,
            then their zeros.
        starts: int32 ``(groups,)``: first token of each group of keys. scale, zero: float16
            ``(batch, kv_heads, groups, head_dim)``.
        key_mean, value_mean, value_std: float32 ``(batch, kv_heads, dim)``: what codes of values stand for is
            multiplied by the last, and the means are added.
        pairs: RoPE.
        key_bits, value_bits: 2 or 4. key_group: most tokens of a group. value_group: channels of one.
        exact, exact_bits, offset: as in `QuantizedPast`; the center of int8 keys is `key_mean`.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    starts: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    value_std: torch.Tensor
    pairs: ChannelPairs
    key_bits: int
    value_bits: int
    key_group: int
    value_group: int
    exact: tuple[ExactTokens, ...]
    exact_bits: torch.Tensor
    offset: torch.Tensor

    @property
    def length(self) -> int:
        """Coded tokens."""
        return self.key_codes.shape[2]


@triton.jit
def scalar_codes(p_rows, m_rows, channel, m_channel, BITS: tl.constexpr):
    """Codes of `channel` [C] in the packed rows at pointers `p_rows` [N] -> float32 [N, C]."""
    m = m_rows[:, None] & m_channel[None, :]
    byte = tl.load(p_rows[:, None] + (channel * BITS // 8)[None, :], mask=m, other=0).to(tl.int32)
    return ((byte >> (channel * BITS % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def attend_groups(
    qx, qy, first, last, n_groups, n_codes, p_starts, p_scale, p_zero, p_key_row, p_value_row, p_value_half, p_bits,
    p_turns, frequency, channel_x, channel_y, m_pair, mean_x, mean_y, value_mean, value_std, offset, p_mask,
    stride_mask_h, stride_mask_q, stride_mask_n, head_of_row, query_of_row, m_row, softcap, maximum, total, acc,
    K_BITS: tl.constexpr, K_WIDTH: tl.constexpr, V_BITS: tl.constexpr, V_WIDTH: tl.constexpr, V_GROUPS: tl.constexpr,
    V_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, ROTATES: tl.constexpr, HAS_EXACT: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of the key groups ``first..last-1`` to the online softmax; `acc` is [BDV, BR]."""
    r = tl.arange(0, BN)
    dv = tl.arange(0, BDV)
    value_group = tl.arange(0, BDV // V_SIZE)
    if ROTATES:
        pair, xy = tl.arange(0, BD // 2), tl.arange(0, 2)
        p_turn = p_turns + r[:, None, None] * D + pair[None, :, None] * 2 + xy[None, None, :]  # [BN, BD / 2, 2]
        cos_r, sin_r = tl.split(tl.load(p_turn, mask=m_pair[None, :, None], other=0.0))
        frequency = frequency[:, None]
    for group in range(first, last):
        start = tl.load(p_starts + group)
        stop = tl.load(p_starts + group + 1, mask=group + 1 < n_groups, other=n_codes)
        p_shared = group * D
        scale_x = tl.load(p_scale + p_shared + channel_x, mask=m_pair, other=0.0).to(tl.float32)
        scale_y = tl.load(p_scale + p_shared + channel_y, mask=m_pair, other=0.0).to(tl.float32)
        zero_x = mean_x + tl.load(p_zero + p_shared + channel_x, mask=m_pair, other=0.0).to(tl.float32)
        zero_y = mean_y + tl.load(p_zero + p_shared + channel_y, mask=m_pair, other=0.0).to(tl.float32)
        for start_n in range(start, stop, BN):
            n = start_n + r
            m_n = n < stop
            row = n.to(tl.int64)
            kx = scalar_codes(p_key_row + row * K_WIDTH, m_n, channel_x, m_pair, K_BITS)  # [BN, BD / 2]
            ky = scalar_codes(p_key_row + row * K_WIDTH, m_n, channel_y, m_pair, K_BITS)
            kx = (kx * scale_x[None, :] + zero_x[None, :]).to(DTYPE)
            ky = (ky * scale_y[None, :] + zero_y[None, :]).to(DTYPE)
            qx_s, qy_s = qx, qy
            if ROTATES:
                kx, ky = turned(kx, ky, cos_r, sin_r)
                sin_s, cos_s = sin_cos((start_n - offset).to(tl.float32) * frequency)  # [BD / 2, 1]
                qx_s, qy_s = turned(qx, qy, cos_s, -sin_s)
            logits = tl.zeros([BN, qx.shape[1]], tl.float32)
            logits = dot(kx, qx_s.to(DTYPE), logits, DTYPE)
            logits = dot(ky, qy_s.to(DTYPE), logits, DTYPE)

            value = scalar_codes(p_value_row + row * V_WIDTH, m_n, dv, dv < DV, V_BITS)  # [BN, BDV]
            p_half = p_value_half + row[:, None] * (V_WIDTH // 2) + DV * V_BITS // 16 + value_group[None, :]
            m_half = m_n[:, None] & (value_group < V_GROUPS)[None, :]
            value_scale = tl.load(p_half, mask=m_half, other=0.0).to(tl.float32)
            value_zero = tl.load(p_half + V_GROUPS, mask=m_half, other=0.0).to(tl.float32)
            value = tl.reshape(value, [BN, BDV // V_SIZE, V_SIZE]) * value_scale[:, :, None] + value_zero[:, :, None]
            value = tl.reshape(value, [BN, BDV]) * value_std[None, :] + value_mean[None, :]

            if HAS_EXACT:
                bits = tl.load(p_bits + row // 8, mask=m_n, other=0)
                m_n = m_n & (((bits >> (n % 8).to(tl.uint8)) & 1) == 0)
            logits = masked_logits(
                logits, m_n[:, None], n, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row,
                query_of_row, m_row, softcap, SOFTCAP, MASK,
            )  # fmt: skip
            probs, decay, maximum = softmax_step(logits, maximum)
            total = total * decay + tl.sum(probs, 0)
            acc = dot(tl.trans(value.to(DTYPE)), probs.to(DTYPE), acc * decay[None, :], DTYPE)
    return maximum, total, acc


_COUNTS = ["n_codes", "n_groups", "n_anchors", "n_sinks", "n_tail", "splits", "bits_width"]


@triton.jit(do_not_specialize=_COUNTS)
def scalar_decode_kernel(
    p_query, stride_q_b, stride_q_h, stride_q_n, p_partial, p_partial_max, p_partial_total,
    p_key_codes, p_value_codes, p_value_halves, p_starts, p_scale, p_zero, p_key_mean, p_value_mean, p_value_std,
    p_bits, p_offset,
    p_channels, p_frequency, p_pair_scale, p_turns,
    p_anchor_positions, p_anchor_keys, p_anchor_values, p_anchor_key_scale, p_anchor_value_scale,
    p_sink_positions, p_sink_keys, p_sink_values, p_tail_keys, p_tail_values,
    p_mask, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_n,
    n_codes, n_groups, n_anchors, n_sinks, n_tail, splits, bits_width, scale, softcap,
    H: tl.constexpr, GROUP: tl.constexpr, Q_LEN: tl.constexpr, BR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, K_BITS: tl.constexpr,
    K_WIDTH: tl.constexpr, V_BITS: tl.constexpr, V_WIDTH: tl.constexpr, V_GROUPS: tl.constexpr, V_SIZE: tl.constexpr,
    DTYPE: tl.constexpr, ANCHOR_DTYPE: tl.constexpr, SINK_DTYPE: tl.constexpr, TAIL_DTYPE: tl.constexpr,
    ANCHORS: tl.constexpr, ROTATES: tl.constexpr, HAS_SINKS: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One split: its share of the groups, of the anchors and of the tail; partial ``(B, H, splits, rows, DV)``."""
    split = tl.program_id(0) % splits
    bh = (tl.program_id(0) // splits).to(tl.int64)
    b = bh // H
    h = (bh % H).to(tl.int32)
    row = tl.arange(0, BR)
    m_row = row < GROUP * Q_LEN
    head_of_row = h * GROUP + row // Q_LEN
    query_of_row = row % Q_LEN
    pair = tl.arange(0, BD // 2)
    m_pair = pair < D // 2
    dv = tl.arange(0, BDV)
    channel_x = tl.load(p_channels + 2 * pair, mask=m_pair, other=0)
    channel_y = tl.load(p_channels + 2 * pair + 1, mask=m_pair, other=0)
    mean_x = tl.load(p_key_mean + bh * D + channel_x, mask=m_pair, other=0.0)
    mean_y = tl.load(p_key_mean + bh * D + channel_y, mask=m_pair, other=0.0)
    value_mean = tl.load(p_value_mean + bh * DV + dv, mask=dv < DV, other=0.0)
    value_std = tl.load(p_value_std + bh * DV + dv, mask=dv < DV, other=0.0)
    frequency = tl.load(p_frequency + pair, mask=m_pair, other=0.0)
    pair_scale = tl.load(p_pair_scale + pair, mask=m_pair, other=1.0)
    p_row = p_query + b * stride_q_b + head_of_row * stride_q_h + query_of_row * stride_q_n
    m_query = m_pair[:, None] & m_row[None, :]
    qx = tl.load(p_row[None, :] + channel_x[:, None], mask=m_query, other=0.0).to(tl.float32) * scale
    qy = tl.load(p_row[None, :] + channel_y[:, None], mask=m_query, other=0.0).to(tl.float32) * scale
    offset = tl.load(p_offset + b).to(tl.int32)
    if MASK != "none":
        p_mask += b * stride_mask_b

    maximum = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BDV, BR], tl.float32)
    share = tl.cdiv(n_groups, splits)
    first = split * share
    maximum, total, acc = attend_groups(
        qx, qy, first, tl.minimum(first + share, n_groups), n_groups, n_codes, p_starts, p_scale + bh * n_groups * D,
        p_zero + bh * n_groups * D, p_key_codes + bh * n_codes * K_WIDTH, p_value_codes + bh * n_codes * V_WIDTH,
        p_value_halves + bh * n_codes * (V_WIDTH // 2), p_bits + bh * bits_width, p_turns, frequency, channel_x,
        channel_y, m_pair, mean_x, mean_y, value_mean, value_std, offset, p_mask, stride_mask_h, stride_mask_q,
        stride_mask_n, head_of_row, query_of_row, m_row, softcap, maximum, total, acc,
        K_BITS, K_WIDTH, V_BITS, V_WIDTH, V_GROUPS, V_SIZE, D, DV, BD, BDV, BN, DTYPE, ROTATES,
        (ANCHORS != "none") or HAS_SINKS, SOFTCAP, MASK,
    )  # fmt: skip
    last_of_row = n_codes + n_tail - (Q_LEN if CAUSAL else 1) + (query_of_row if CAUSAL else 0 * query_of_row)
    if ANCHORS != "none":
        share = tl.cdiv(tl.cdiv(n_anchors, BM), splits) * BM
        first = split * share
        maximum, total, acc = attend_exact(
            qx, qy, first, tl.minimum(first + share, n_anchors), p_anchor_positions + bh * n_anchors,
            p_anchor_keys + bh * n_anchors * D, p_anchor_values + bh * n_anchors * DV,
            p_anchor_key_scale + bh * n_anchors, p_anchor_value_scale + bh * n_anchors, channel_x, channel_y, m_pair,
            frequency, pair_scale, mean_x, mean_y, offset, 0, p_mask, stride_mask_h, stride_mask_q, stride_mask_n,
            head_of_row, query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
            D, DV, BDV, BM, ANCHOR_DTYPE, ANCHORS, ROTATES, SOFTCAP, MASK,
        )  # fmt: skip
    if HAS_SINKS and split == splits - 1:
        maximum, total, acc = attend_exact(
            qx, qy, 0, n_sinks, p_sink_positions + bh * n_sinks, p_sink_keys + bh * n_sinks * D,
            p_sink_values + bh * n_sinks * DV, p_sink_keys, p_sink_keys, channel_x, channel_y, m_pair, frequency,
            pair_scale, mean_x, mean_y, offset, 0, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row,
            query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
            D, DV, BDV, BM, SINK_DTYPE, "plain", ROTATES, SOFTCAP, MASK,
        )  # fmt: skip
    share = tl.cdiv(tl.cdiv(n_tail, BM), splits) * BM
    first = (splits - 1 - split) * share  # the last splits have fewest anchors
    maximum, total, acc = attend_exact(
        qx, qy, first, tl.minimum(first + share, n_tail), p_offset, p_tail_keys + bh * n_tail * D,
        p_tail_values + bh * n_tail * DV, p_tail_keys, p_tail_keys, channel_x, channel_y, m_pair, frequency,
        pair_scale, mean_x, mean_y, offset, n_codes, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row,
        query_of_row, m_row, last_of_row, softcap, maximum, total, acc,
        D, DV, BDV, BM, TAIL_DTYPE, "tail", ROTATES, SOFTCAP, MASK,
    )  # fmt: skip
    out = (bh * splits + split) * (GROUP * Q_LEN) + row
    tl.store(p_partial + out[None, :] * DV + dv[:, None], acc, mask=(dv < DV)[:, None] & m_row[None, :])
    tl.store(p_partial_max + out, maximum, mask=m_row)
    tl.store(p_partial_total + out, total, mask=m_row)


def scalar_decode_attention(
    query: torch.Tensor,
    past: ScalarPast,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest tokens over scalar codes and an exact tail (OTT, arXiv 2505.10938).

    Args and returns as `decode_attention`, with a `ScalarPast`.

    Raises:
        ValueError: for shapes, dtypes or layouts that the kernel was not written for.
    """
    batch, q_heads, q_len, dim = query.shape
    heads, tail, value_dim = tail_keys.shape[1], tail_keys.shape[2], tail_values.shape[3]
    group, n_codes, n_groups = q_heads // heads, past.length, past.starts.shape[0]
    rows = group * q_len
    require(n_codes > 0, "0 coded tokens: without a quantized past any attention kernel will do")
    check_rows(query, rows, max(dim, value_dim))
    check_scalar_past(past, batch, heads, dim, value_dim)
    check_tail(query, tail_keys, tail_values, sink_logit)
    anchors, sinks = sort_exact(past.exact)
    counts = [0 if tokens is None else tokens.positions.shape[2] for tokens in (anchors, sinks)]
    block, value_block = head_block(dim), head_block(value_dim)
    row_block = max(MIN_ROWS, power_of_2(rows))
    dtype = triton_dtype(past.pairs.turns.dtype)
    splits = min(plan_splits(n_codes, batch, heads, query.device)[0], n_groups)

    options = dict(device=query.device, dtype=torch.float32)
    partial = torch.empty(batch, heads, splits, rows, value_dim, **options)
    state = torch.empty(2, batch, heads, splits, rows, **options)
    lse = torch.empty(batch, q_heads, q_len, **options)
    out = torch.empty(batch, q_heads, q_len, value_dim, device=query.device, dtype=query.dtype)
    mask, kind, strides = mask_arguments(mask, batch, q_heads, q_len, n_codes + tail)
    tokens_of_tile = min(past.key_group, 32 if block > 128 or dtype == tl.float32 else 64)
    scalar_decode_kernel[(batch * heads * splits,)](
        query, *query.stride()[:3], partial, state[0], state[1],
        past.key_codes, past.value_codes, past.value_codes.view(torch.float16), past.starts, past.scale, past.zero,
        past.key_mean, past.value_mean, past.value_std, past.exact_bits, past.offset, past.pairs.channels,
        past.pairs.frequency, past.pairs.pair_scale, past.pairs.turns, *pointers(anchors, query),
        *pointers(sinks, query)[:3], tail_keys, tail_values, query if mask is None else mask, *strides,
        n_codes, n_groups, *counts, tail, splits, past.exact_bits.shape[-1], scale, softcap or 0.0,
        H=heads, GROUP=group, Q_LEN=q_len, BR=row_block, D=dim, DV=value_dim, BD=block, BDV=value_block,
        BN=tokens_of_tile, BM=16, K_BITS=past.key_bits, K_WIDTH=past.key_codes.shape[3], V_BITS=past.value_bits,
        V_WIDTH=past.value_codes.shape[3], V_GROUPS=ceil_div(value_dim, past.value_group),
        V_SIZE=min(past.value_group, value_block), DTYPE=dtype, ANCHOR_DTYPE=dot_dtype(anchors, dtype),
        SINK_DTYPE=dot_dtype(sinks, dtype), TAIL_DTYPE=triton_dtype(tail_keys.dtype),
        ANCHORS="none" if anchors is None else "plain" if anchors.key_scale is None else "int8",
        ROTATES=past.pairs.rotates, HAS_SINKS=sinks is not None, CAUSAL=is_causal and mask is None,
        SOFTCAP=softcap is not None, MASK=kind,
        num_warps=4 if row_block == MIN_ROWS and block <= 128 else 2, num_stages=1,
    )  # fmt: skip
    merge_splits(partial, state, None, sink_logit, out, lse)
    return out, lse


def check_scalar_past(past: ScalarPast, batch: int, heads: int, dim: int, value_dim: int) -> None:
    """Raises ValueError, naming tensor and numbers, for a past that the kernel was not written for."""
    n, groups = past.length, past.starts.shape[0]
    for name, bits in (("keys", past.key_bits), ("values", past.value_bits)):
        require(bits in BITS, f"{name} of {bits} bits have no kernel; {BITS} have")
    for name, group in (("keys", past.key_group), ("values", past.value_group)):
        require(group in GROUPS, f"groups of {group} {name} have no kernel; {GROUPS} have")
    for name, size in (("key", dim), ("value", value_dim)):
        require(
            size % 8 == 0 and size <= MAX_DIM, f"{name} head size {size} has no kernel; multiples of 8 to {MAX_DIM}"
        )
    value_bytes = value_dim * past.value_bits // 8 + 4 * ceil_div(value_dim, past.value_group)
    shapes = {
        "key_codes": (batch, heads, n, dim * past.key_bits // 8), "value_codes": (batch, heads, n, value_bytes),
        "starts": (groups,), "scale": (batch, heads, groups, dim), "zero": (batch, heads, groups, dim),
        "key_mean": (batch, heads, dim), "value_mean": (batch, heads, value_dim),
        "value_std": (batch, heads, value_dim),
        "exact_bits": (batch, heads, ceil_div(n, 8)), "offset": (batch,),
    }  # fmt: skip
    for name, shape in shapes.items():
        tensor = getattr(past, name)
        fits = tuple(tensor.shape) == shape and tensor.is_contiguous()
        require(fits, f"{name} has shape {tuple(tensor.shape)}; {shape}, contiguous, is needed")
    for tokens in past.exact:
        slots = (batch, heads, tokens.positions.shape[2])
        for tensor, size in zip(tokens, (slots, (*slots, dim), (*slots, value_dim), (*slots, 1), (*slots, 1))):
            fits = tensor is None or (tuple(tensor.shape) == size and tensor.is_contiguous())
            require(fits, f"exact tokens of another shape than {size}, contiguous")

"""Pieces shared by the kernels: reading packed codes, gathering centroids, turning channel pairs, a step's query
moment."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_codes(p_rows, m_rows, slots, m_slots, CODE_BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Codes at `slots` [G] of the packed rows at pointers `p_rows` [N] -> int32 [N, G]."""
    m_code = m_rows[:, None] & m_slots[None, :]
    if CODE_BITS == 8:  # codes are read once: they leave the L1 cache to the tables
        return tl.load(p_rows[:, None] + slots[None, :], mask=m_code, other=0, eviction_policy="evict_first").to(
            tl.int32
        )
    byte = slots * CODE_BITS // 8
    low = tl.load(p_rows[:, None] + byte[None, :], mask=m_code, other=0).to(tl.int32)
    # No code of 4 to 12 bits that starts at an even bit spans more than two bytes.
    m_high = m_code & (byte + 1 < WIDTH)[None, :]
    high = tl.load(p_rows[:, None] + byte[None, :] + 1, mask=m_high, other=0).to(tl.int32)
    return ((low | (high << 8)) >> (slots * CODE_BITS % 8)[None, :]) & ((1 << CODE_BITS) - 1)


@triton.jit
def first_codes(
    p_rows, m_rows,
    GROUPS: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes of the first stage of every group: int32 [N, BG]."""
    group = tl.arange(0, BG)
    return read_codes(p_rows, m_rows, group * STAGES, group < GROUPS, CODE_BITS, WIDTH)


@triton.jit
def gather_latent(
    p_rows, m_rows, first, p_centroids,
    GROUPS: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr, SUB_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Latent vectors of the packed rows at pointers `p_rows` [N], whose `first_codes` are known -> [N, BG, SUB_DIM].

    Groups beyond GROUPS are 0, and rows outside `m_rows` hold anything finite. One stage keeps the tables' dtype;
    residual stages are summed in float32.
    """
    group = tl.arange(0, BG)
    channel = tl.arange(0, SUB_DIM)
    m_group = group < GROUPS
    row = ((group * STAGES) << CODE_BITS)[None, :] + first  # [N, BG]
    p_latent = p_centroids + row[:, :, None] * SUB_DIM + channel[None, None, :]
    if BG == GROUPS:  # code 0 of rows that are masked is as good as any, and loads without a mask are cheaper
        latent = tl.load(p_latent, eviction_policy="evict_last")
    else:
        latent = tl.load(p_latent, mask=m_group[None, :, None], other=0.0, eviction_policy="evict_last")
    if STAGES > 1:
        latent = latent.to(tl.float32)
        for stage in tl.static_range(1, STAGES):
            code = read_codes(p_rows, m_rows, group * STAGES + stage, m_group, CODE_BITS, WIDTH)
            row = ((group * STAGES + stage) << CODE_BITS)[None, :] + code
            p_part = p_centroids + row[:, :, None] * SUB_DIM + channel[None, None, :]
            part = tl.load(p_part, mask=m_group[None, :, None], other=0.0)
            latent += part.to(tl.float32)
    return latent


@triton.jit
def turned(x, y, cos, sin):
    """Channel pairs (x, y) turned by an angle: first and second channel."""
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def sin_cos(angle):
    """Sine and cosine of float32 angles of any size that a position can give, to 1e-6.

    The libraries' exact ones keep a slow path for huge angles that costs registers in every kernel; with fused
    multiply-adds three parts of pi / 2 are enough up to 2^22 quarter turns.
    """
    quarter = tl.floor(angle * 0.63661977236758134 + 0.5)
    r = tl.fma(quarter, -1.5707963705062866, angle)
    r = tl.fma(quarter, 4.371138828673793e-08, r)
    r = tl.fma(quarter, 1.7151245100058819e-15, r)  # |r| <= pi / 4
    square = r * r
    sine = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    sine = tl.fma(tl.fma(square, sine, -1.6666654611e-1), square * r, r)
    cosine = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    cosine = tl.fma(tl.fma(square, cosine, 4.166664568298827e-2), square * square, 1.0 - 0.5 * square)
    turns = quarter.to(tl.int32)
    swapped = (turns & 1) != 0
    sine, cosine = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((turns & 2) != 0, -sine, sine), tl.where(((turns + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def add_moment_of_step(
    p_query, p_moment, stride_qh, factor, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    """In place: the moment at `p_moment` += (factor sum |q|^2, G) of one token's G <= BM query heads at `p_query`."""
    head, d = tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    m = (head < G)[:, None] & (d < D)[None, :]
    query = tl.load(p_query + (head * stride_qh)[:, None] + d[None, :], mask=m, other=0.0).to(tl.float32)
    squares = tl.load(p_moment) + tl.sum(tl.sum(query * query, 1), 0) * factor
    count = tl.load(p_moment + 1) + G
    tl.debug_barrier()  # every warp has loaded before one stores
    tl.store(p_moment, squares)
    tl.store(p_moment + 1, count)

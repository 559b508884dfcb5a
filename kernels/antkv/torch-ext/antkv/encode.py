"""Encoding: nearest centroids of keys and values, packed as they are stored, and what the codes lose.

    code_gs = argmax_k  r_gs . e_gsk + b_gsk,    r_g0 = latent_g,    r_g(s+1) = r_gs - centroid_gs[code_gs]

with e and b the tables' `encode_centroids` and `encode_bias`. A key's latent is the key turned back to before RoPE,
less its mean, in latent order; a value's is ``(value - mean) @ analysis``. Neither is ever stored: a program turns or
projects one group of a tile of tokens at a time and searches it at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, power_of_2, register_limit, require
from .tables import Codes, KeyTables, ValueTables
from .tiles import first_codes, gather_latent, sin_cos

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODE_BITS = (4, 6, 8, 10, 12)
SUB_DIMS = (2, 4, 8, 16, 32)
MAX_STAGES = 8
MAX_DIM = 256
SLOTS = 32  # codes of a token that a program collects before it packs them
TILE = (128, 8, 128)  # tokens, warps and centroids of a large program
SMALL = 16384  # token-heads below which programs are made small: a decode step's chunk should fill the device too


@triton.jit
def _best_of_tile(score, PRECISION: tl.constexpr):
    """Largest of each row of `score` [BT, BC] and its column; NaN and 0 for a row of NaN.

    Of equal scores the first wins, but with TF32: there a column takes the place of the lowest log2(BC) bits of its
    score, so that one maximum finds both, and scores that agree in all but those bits count as equal and any of them
    may win. Of 24 bits at least 17 are left (BC <= 128), where rounding the factors has left 11.
    """
    size: tl.constexpr = score.shape[1]
    column = tl.arange(0, size)[None, :]
    if PRECISION == "tf32":
        packed = (score.to(tl.int32, bitcast=True) & -size) | column
        top = tl.max(packed.to(tl.float32, bitcast=True), 1)
        return top, top.to(tl.int32, bitcast=True) & (size - 1)
    top = tl.max(score, 1)
    return top, tl.min(tl.where(score == top[:, None], column, size - 1), 1)


@triton.jit
def _search_groups(
    rest, codes, groups, first_slot, table, p_centroids, p_encode, p_bias,
    STAGES: tl.constexpr, SUB_DIM: tl.constexpr, CENTROIDS: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Codes `groups` groups side by side in a tile, `rest` [BT, BS], whose tables begin at number `table`.

    Writes the codes to the slots of `codes` [BT, SP] from `first_slot` on and returns what is left of `rest`.
    """
    PACK: tl.constexpr = rest.shape[1] // SUB_DIM
    s = tl.arange(0, rest.shape[1])
    slot = tl.arange(0, codes.shape[1])
    place = tl.arange(0, PACK)
    channel = tl.arange(0, SUB_DIM)
    for stage in range(STAGES):  # not unrolled: the tiles of two searches do not fit the registers together
        taken = tl.zeros([rest.shape[0], PACK], tl.int32)
        for j in range(groups):
            first = (table + j * STAGES + stage) * CENTROIDS
            mine = (s // SUB_DIM == j)[None, :]  # a product takes no fewer than 16 channels: those of others are 0
            best = tl.full([rest.shape[0]], float("-inf"), tl.float32)
            code = tl.zeros([rest.shape[0]], tl.int32)
            for c0 in range(0, CENTROIDS, BC):
                c = first + c0 + tl.arange(0, BC)
                p = p_encode + c[:, None] * SUB_DIM + (s % SUB_DIM)[None, :]
                centroids = tl.load(p, mask=mine, other=0.0)  # [BC, BS]
                score = tl.dot(rest, tl.trans(centroids), input_precision=PRECISION) + tl.load(p_bias + c)[None, :]
                top, index = _best_of_tile(score, PRECISION)
                better = top > best  # never for NaN: its code stays 0
                code = tl.where(better, c0 + index, code)
                best = tl.where(better, top, best)
            codes = tl.where((slot == first_slot + j * STAGES + stage)[None, :], code[:, None], codes)
            taken = tl.where((place == j)[None, :], code[:, None], taken)
        row = (table + place * STAGES + stage)[None, :] * CENTROIDS + taken
        p = p_centroids + row[:, :, None] * SUB_DIM + channel[None, None, :]
        part = tl.load(p, mask=(place < groups)[None, :, None], other=0.0)  # [BT, PACK, SUB_DIM]
        rest -= tl.reshape(part, [rest.shape[0], rest.shape[1]]).to(tl.float32)
    return rest, codes


@triton.jit
def _store_codes(
    codes, p_row, m_token, first_byte,
    USED: tl.constexpr, CODE_BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Packs the first USED of `codes` [BT, SP] into the rows at `p_row` [BT] from byte `first_byte` on."""
    if CODE_BITS == 8:
        byte = first_byte + tl.arange(0, codes.shape[1])
        m_byte = (tl.arange(0, codes.shape[1]) < USED) & (byte < WIDTH)
        tl.store(p_row[:, None] + byte[None, :], codes.to(tl.uint8), mask=m_token[:, None] & m_byte[None, :])
    else:
        # Four codes of an even number of bits fill whole bytes: a word of 16 to 48 bits.
        units: tl.constexpr = codes.shape[1] // 4
        unit_bytes: tl.constexpr = CODE_BITS // 2
        four = tl.reshape(codes, [codes.shape[0], units, 4]).to(tl.int64)
        word = tl.sum(four << (tl.arange(0, 4) * CODE_BITS)[None, None, :], 2)  # [BT, units]
        unit = tl.arange(0, units)
        for j in tl.static_range(unit_bytes):
            byte = first_byte + unit * unit_bytes + j
            m_byte = (unit * 4 < USED) & (byte < WIDTH)
            value = ((word >> (8 * j)) & 255).to(tl.uint8)
            tl.store(p_row[:, None] + byte[None, :], value, mask=m_token[:, None] & m_byte[None, :])


@triton.jit
def encode_keys_kernel(
    p_keys, p_offset, p_centroids, p_encode, p_bias, p_mean, p_channels, p_frequency, p_pair_scale, p_codes, p_error,
    stride_b, stride_h, stride_t, kv_heads, n, first_position,
    D: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr, SUB_DIM: tl.constexpr,
    WIDTH: tl.constexpr, ROTATES: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Codes of BG groups of BT keys: turn back by position * frequency, take the mean off, search.

    error[chunk, bh, t] is |latent - decoded|^2 over the groups of this chunk.
    """
    bh = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    b, h = bh // kv_heads, bh % kv_heads
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_token = t < n
    p_row = p_keys + b * stride_b + h * stride_h + t.to(tl.int64) * stride_t
    position = (first_position + t - tl.load(p_offset + b)).to(tl.float32)
    s = tl.arange(0, BS)
    pair = tl.arange(0, BS // 2)
    codes = tl.zeros([BT, SP], tl.int32)
    error = tl.zeros([BT], tl.float32)
    last = tl.minimum(chunk * BG + BG, GROUPS)
    for group in range(chunk * BG, last, BS // SUB_DIM):
        groups = tl.minimum(last - group, BS // SUB_DIM)
        o_latent = h * D + group * SUB_DIM
        m_s = s < groups * SUB_DIM
        channel = tl.load(p_channels + o_latent + s, mask=m_s, other=0)
        mean = tl.load(p_mean + o_latent + s, mask=m_s, other=0.0)
        m_key = m_token[:, None] & m_s[None, :]
        latent = tl.load(p_row[:, None] + channel[None, :], mask=m_key, other=0.0).to(tl.float32)  # [BT, BS]
        if ROTATES:
            m_pair = pair < groups * SUB_DIM // 2
            frequency = tl.load(p_frequency + o_latent // 2 + pair, mask=m_pair, other=0.0)
            inverse = 1.0 / tl.load(p_pair_scale + o_latent // 2 + pair, mask=m_pair, other=1.0)
            angle = position[:, None] * frequency[None, :]  # [BT, BS / 2]
            sin, cos = sin_cos(angle)
            cos, sin = cos * inverse[None, :], sin * inverse[None, :]
            x, y = tl.split(tl.reshape(latent, [BT, BS // 2, 2]))
            latent = tl.reshape(tl.join(x * cos + y * sin, y * cos - x * sin), [BT, BS])
        rest, codes = _search_groups(
            latent - mean[None, :], codes, groups, (group - chunk * BG) * STAGES, (h * GROUPS + group) * STAGES,
            p_centroids, p_encode, p_bias, STAGES, SUB_DIM, 1 << CODE_BITS, BC, PRECISION,
        )  # fmt: skip
        error += tl.sum(rest * rest, 1)
    o_token = bh * n + t
    _store_codes(
        codes, p_codes + o_token * WIDTH, m_token, chunk * (BG * STAGES * CODE_BITS // 8), BG * STAGES, CODE_BITS, WIDTH
    )
    tl.store(p_error + chunk.to(tl.int64) * tl.num_programs(2) * n + o_token, error, mask=m_token)


@triton.jit
def encode_values_kernel(
    p_values, p_centroids, p_encode, p_bias, p_mean, p_analysis, p_codes,
    stride_b, stride_h, stride_t, kv_heads, n,
    D: tl.constexpr, BD: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr,
    SUB_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Codes of BG groups of BT values: latent_g = (value - mean) @ analysis[:, g], then the search."""
    bh = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    b, h = bh // kv_heads, bh % kv_heads
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_token = t < n
    d = tl.arange(0, BD)
    s = tl.arange(0, BS)
    value = tl.load(
        p_values + b * stride_b + h * stride_h + t.to(tl.int64)[:, None] * stride_t + d[None, :],
        mask=m_token[:, None] & (d < D)[None, :], other=0.0,
    ).to(tl.float32)  # [BT, BD]  # fmt: skip
    value -= tl.load(p_mean + h * D + d, mask=d < D, other=0.0)[None, :]
    codes = tl.zeros([BT, SP], tl.int32)
    last = tl.minimum(chunk * BG + BG, GROUPS)
    for group in range(chunk * BG, last, BS // SUB_DIM):
        groups = tl.minimum(last - group, BS // SUB_DIM)
        analysis = tl.load(
            p_analysis + (h * D + d)[:, None] * D + group * SUB_DIM + s[None, :],
            mask=(d < D)[:, None] & (s < groups * SUB_DIM)[None, :], other=0.0,
        )  # [BD, BS]  # fmt: skip
        latent = tl.dot(value, analysis, input_precision=PRECISION)  # [BT, BS]
        _, codes = _search_groups(
            latent, codes, groups, (group - chunk * BG) * STAGES, (h * GROUPS + group) * STAGES,
            p_centroids, p_encode, p_bias, STAGES, SUB_DIM, 1 << CODE_BITS, BC, PRECISION,
        )  # fmt: skip
    _store_codes(
        codes, p_codes + (bh * n + t) * WIDTH, m_token, chunk * (BG * STAGES * CODE_BITS // 8), BG * STAGES, CODE_BITS,
        WIDTH,
    )  # fmt: skip


@triton.jit
def value_error_kernel(
    p_values, p_codes, p_centroids, p_mean, p_synthesis, p_error,
    stride_b, stride_h, stride_t, kv_heads, n,
    D: tl.constexpr, BD: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr,
    SUB_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """error[bh, t] = |value - mean - latent(codes) @ synthesis|^2, BO plain channels at a time."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // kv_heads, bh % kv_heads
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_token = t < n
    o_token = bh * n + t
    p_row = p_codes + o_token * WIDTH
    first = first_codes(p_row, m_token, GROUPS, BD // SUB_DIM, STAGES, CODE_BITS, WIDTH)
    latent = gather_latent(
        p_row, m_token, first, p_centroids + h * ((GROUPS * STAGES * SUB_DIM) << CODE_BITS),
        GROUPS, BD // SUB_DIM, STAGES, CODE_BITS, SUB_DIM, WIDTH,
    )  # fmt: skip
    latent = tl.reshape(latent, [BT, BD]).to(tl.float32)
    d = tl.arange(0, BD)
    p_row = p_values + b * stride_b + h * stride_h + t.to(tl.int64) * stride_t
    error = tl.zeros([BT], tl.float32)
    for o0 in range(0, D, BO):
        o = o0 + tl.arange(0, BO)
        m_o = o < D
        synthesis = tl.load(
            p_synthesis + (h * D + d)[:, None] * D + o[None, :], mask=(d < D)[:, None] & m_o[None, :], other=0.0
        )  # [BD, BO]
        value = tl.load(p_row[:, None] + o[None, :], mask=m_token[:, None] & m_o[None, :], other=0.0).to(tl.float32)
        rest = value - tl.load(p_mean + h * D + o, mask=m_o, other=0.0)[None, :]
        rest -= tl.dot(latent, synthesis, input_precision=PRECISION)  # [BT, BO]
        error += tl.sum(rest * rest, 1)
    tl.store(p_error + o_token, error, mask=m_token)


def encode_keys(
    keys: torch.Tensor, tables: KeyTables, positions_start: int, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of keys as they are after RoPE, and what the codes lose.

    Args:
        keys: ``(batch, kv_heads, n, dim)``, any strides but a last one of 1; float16, bfloat16 or float32.
        tables: of the layer.
        positions_start: index of the first token; token t turned by position ``positions_start + t - offset[b]``.
        offset: int64 ``(batch,)``.

    Returns:
        uint8 codes ``(batch, kv_heads, n, width)`` and float32 ``|key - decoded key|^2`` before RoPE
        ``(batch, kv_heads, n)``.

    Raises:
        ValueError: for a size, dtype or stride that the kernel was not written for.
    """
    _check(keys, "keys", tables.codes, tables.centroids, tables.encode_centroids, tables.encode_bias)
    batch, kv_heads, n, dim = keys.shape
    require(dim % 2 == 0, f"head size {dim} is odd: RoPE turns pairs of channels")
    for name, dtype, shape in (
        ("mean", torch.float32, (kv_heads, dim)), ("channels", torch.int32, (kv_heads, dim)),
        ("frequency", torch.float32, (kv_heads, dim // 2)), ("pair_scale", torch.float32, (kv_heads, dim // 2)),
    ):  # fmt: skip
        _check_table(name, getattr(tables, name), dtype, shape)
    _check_table("offset", offset, torch.int64, (batch,))
    codes = torch.empty(batch, kv_heads, n, tables.codes.width, dtype=torch.uint8, device=keys.device)
    small = batch * kv_heads * n <= SMALL or keys.dtype == torch.float32
    chunk, constants = _search_constants(tables.codes, keys, small)
    chunks = ceil_div(tables.codes.groups, chunk)
    error = torch.empty(chunks, batch, kv_heads, n, dtype=torch.float32, device=keys.device)
    if n == 0:
        return codes, error[0]
    block, warps = (32, 4) if small else TILE[:2]
    encode_keys_kernel[(ceil_div(n, block), chunks, batch * kv_heads)](
        keys, offset, tables.centroids, tables.encode_centroids, tables.encode_bias, tables.mean, tables.channels,
        tables.frequency, tables.pair_scale, codes, error, *keys.stride()[:3], kv_heads, n, positions_start,
        D=dim, ROTATES=tables.rotates, BT=block, **constants, **register_limit(warps, keys), num_warps=warps,
        num_stages=2,
    )  # fmt: skip
    return codes, error[0] if chunks == 1 else error.sum(0)


def encode_values(values: torch.Tensor, tables: ValueTables) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of values, and what the codes lose.

    Args:
        values: ``(batch, kv_heads, n, dim)``, any strides but a last one of 1; float16, bfloat16 or float32.
        tables: of the layer.

    Returns:
        uint8 codes ``(batch, kv_heads, n, width)`` and float32 ``|value - decoded value|^2`` ``(batch, kv_heads, n)``.

    Raises:
        ValueError: for a size, dtype or stride that the kernel was not written for.
    """
    _check(values, "values", tables.codes, tables.centroids, tables.encode_centroids, tables.encode_bias)
    batch, kv_heads, n, dim = values.shape
    _check_table("mean", tables.mean, torch.float32, (kv_heads, dim))
    _check_table("synthesis", tables.synthesis, torch.float32, (kv_heads, dim, dim))
    _check_table("analysis", tables.analysis, torch.float32, (kv_heads, dim, dim))
    codes = torch.empty(batch, kv_heads, n, tables.codes.width, dtype=torch.uint8, device=values.device)
    error = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=values.device)
    if n == 0:
        return codes, error
    padded = head_block(dim)
    # The tile of values stays in float32 for all groups, and has to leave room on cards with 64 KB of shared memory.
    small = batch * kv_heads * n <= SMALL or padded > 128 or values.dtype == torch.float32
    chunk, constants = _search_constants(tables.codes, values, small)
    block, warps = (32, 4) if small else TILE[:2]
    grid = ceil_div(n, block), ceil_div(tables.codes.groups, chunk), batch * kv_heads
    encode_values_kernel[grid](
        values, tables.centroids, tables.encode_centroids, tables.encode_bias, tables.mean, tables.analysis, codes,
        *values.stride()[:3], kv_heads, n, D=dim, BD=padded, BT=block, **constants, **register_limit(warps, values),
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    value_error_kernel[(grid[0], grid[2])](
        values, codes, tables.centroids, tables.mean, tables.synthesis, error, *values.stride()[:3], kv_heads, n,
        D=dim, BD=padded, BT=block, BO=16 if padded > 128 else 32, num_warps=4, num_stages=1,
        **{name: constants[name] for name in ("GROUPS", "STAGES", "CODE_BITS", "SUB_DIM", "WIDTH", "PRECISION")},
    )  # fmt: skip
    return codes, error


def _search_constants(codes: Codes, x: torch.Tensor, small: bool) -> tuple[int, dict]:
    """Groups of a program, and the constants of a search kernel; `small`: its tile of tokens is.

    Groups come by a multiple of 4, so that the codes of a program fill whole bytes whatever their bits.
    """
    few = x.shape[0] * x.shape[1] * x.shape[2] <= SMALL
    chunk = 4 if few else max(4, SLOTS // power_of_2(codes.stages))
    chunk = min(chunk, max(4, power_of_2(codes.groups)))
    exact = x.dtype == torch.float32 or torch.version.hip is not None  # TF32 keeps float16's bits and float32's range
    return chunk, dict(
        GROUPS=codes.groups, STAGES=codes.stages, CODE_BITS=codes.code_bits, SUB_DIM=codes.sub_dim, WIDTH=codes.width,
        PRECISION="ieee" if exact else "tf32", BS=max(16, codes.sub_dim),
        BC=min(32 if exact else 64 if small else TILE[2], 1 << codes.code_bits), BG=chunk,
        SP=power_of_2(chunk * codes.stages),
    )  # fmt: skip


def _check(
    x: torch.Tensor, name: str, codes: Codes, centroids: torch.Tensor, encode: torch.Tensor, bias: torch.Tensor
) -> None:
    kv_heads, dim = x.shape[1], x.shape[3]
    require(x.dtype in DTYPES, f"{name} are {x.dtype}; they must be float16, bfloat16 or float32")
    require(x.stride(3) == 1, f"the last stride of {name} is {x.stride(3)}; it must be 1")
    require(dim <= MAX_DIM, f"head size {dim} has no kernel; up to {MAX_DIM} have")
    require(codes.code_bits in CODE_BITS, f"code_bits={codes.code_bits} has no kernel; {CODE_BITS} have")
    require(codes.sub_dim in SUB_DIMS, f"sub_dim={codes.sub_dim} has no kernel; {SUB_DIMS} have")
    require(1 <= codes.stages <= MAX_STAGES, f"stages={codes.stages} has no kernel; 1 to {MAX_STAGES} have")
    sizes = f"{codes.groups} sub-vectors of {codes.sub_dim} channels"
    require(codes.groups * codes.sub_dim == dim, f"{name} of size {dim} do not fit tables of {sizes}")
    shape = (kv_heads, codes.groups, codes.stages, 1 << codes.code_bits, codes.sub_dim)
    dtype = centroids.dtype if centroids.dtype == torch.float16 else torch.float32
    _check_table("centroids", centroids, dtype, shape)
    _check_table("encode_centroids", encode, torch.float32, shape)
    _check_table("encode_bias", bias, torch.float32, shape[:-1])


def _check_table(name: str, table: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    require(table.dtype == dtype, f"{name} is {table.dtype}; it must be {dtype}")
    require(table.shape == shape, f"{name} has shape {tuple(table.shape)}; it must be {shape}")
    require(table.is_contiguous(), f"{name} must be contiguous")

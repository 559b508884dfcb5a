"""Codes to dense keys and values: what a long prompt's queries attend to at tensor-core speed, a segment at a time.

    key[channels[2p, 2p + 1]] = pair_scale[p] R((t - offset) frequency[p]) (mean + latent)[2p, 2p + 1]
    value                     = mean + latent @ synthesis

with t the token's index and R(a) the rotation by angle a. Exact tokens are written over what their codes stand for.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, power_of_2, require
from .past import ExactTokens, QuantizedPast
from .tables import Codes
from .tiles import first_codes, gather_latent, turned

CODE_BITS = (4, 6, 8, 10, 12)
SUB_DIMS = (2, 4, 8, 16, 32)
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 4096  # elements of a tile of keys: 32 a thread
VALUE_COLUMNS = 32  # plain channels of a value that are made at a time


@triton.jit
def rotate_pairs(x, y, positions, p_frequency, p_pair_scale, pair, m_pair):
    """Channel pairs x, y [BN, BP] before RoPE, turned by float32 ``positions[n] * frequency[p]`` and scaled."""
    frequency = tl.load(p_frequency + pair, mask=m_pair, other=0.0)
    pair_scale = tl.load(p_pair_scale + pair, mask=m_pair, other=1.0)
    angle = positions[:, None] * frequency[None, :]
    cos = tl.cos(angle) * pair_scale[None, :]
    sin = tl.sin(angle) * pair_scale[None, :]
    return turned(x, y, cos, sin)


@triton.jit
def dequantize_keys_kernel(
    p_codes, p_centroids, p_mean, p_channels, p_frequency, p_pair_scale, p_offset, p_out,
    start, count, capacity, heads, stride_ob, stride_oh, stride_on,
    D: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr,
    SUB_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n, channels] = R(start + n - offset) (mean + latent[start + n]): one tile of tokens of one kv head."""
    BP: tl.constexpr = BG * SUB_DIM // 2
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = n < count
    p_rows = p_codes + (row * capacity + start + n) * WIDTH
    p_table = p_centroids + ((head * GROUPS * STAGES) << CODE_BITS) * SUB_DIM
    first = first_codes(p_rows, m_n, GROUPS, BG, STAGES, CODE_BITS, WIDTH)
    latent = gather_latent(p_rows, m_n, first, p_table, GROUPS, BG, STAGES, CODE_BITS, SUB_DIM, WIDTH)
    x, y = tl.split(tl.reshape(latent.to(tl.float32), [BN, BP, 2]))  # [BN, BP] each

    pair = tl.arange(0, BP)
    m_pair = pair < D // 2
    p_first = head * D + 2 * pair
    x += tl.load(p_mean + p_first, mask=m_pair, other=0.0)[None, :]
    y += tl.load(p_mean + p_first + 1, mask=m_pair, other=0.0)[None, :]
    if ROTATES:
        positions = (start + n - tl.load(p_offset + batch)).to(tl.float32)
        turn = head * (D // 2)
        x, y = rotate_pairs(x, y, positions, p_frequency + turn, p_pair_scale + turn, pair, m_pair)

    p_row = p_out + batch * stride_ob + head * stride_oh + n.to(tl.int64)[:, None] * stride_on
    m_out = m_n[:, None] & m_pair[None, :]
    channel_x = tl.load(p_channels + p_first, mask=m_pair, other=0)
    channel_y = tl.load(p_channels + p_first + 1, mask=m_pair, other=0)
    tl.store(p_row + channel_x[None, :], x.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_row + channel_y[None, :], y.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def dequantize_values_kernel(
    p_codes, p_centroids, p_mean, p_synthesis, p_out,
    start, count, capacity, heads, stride_ob, stride_oh, stride_on,
    DV: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, CODE_BITS: tl.constexpr,
    SUB_DIM: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n] = mean + latent[start + n] @ synthesis: one tile of tokens of one kv head, BC channels at a time."""
    BD: tl.constexpr = BG * SUB_DIM
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = n < count
    p_rows = p_codes + (row * capacity + start + n) * WIDTH
    p_table = p_centroids + ((head * GROUPS * STAGES) << CODE_BITS) * SUB_DIM
    first = first_codes(p_rows, m_n, GROUPS, BG, STAGES, CODE_BITS, WIDTH)
    latent = gather_latent(p_rows, m_n, first, p_table, GROUPS, BG, STAGES, CODE_BITS, SUB_DIM, WIDTH)
    b_latent = tl.reshape(latent.to(tl.float32), [BN, BD])

    d = tl.arange(0, BD)
    p_basis = p_synthesis + head * DV * DV + d[:, None] * DV
    p_row = p_out + batch * stride_ob + head * stride_oh + n.to(tl.int64)[:, None] * stride_on
    for first in range(0, DV, BC):
        c = first + tl.arange(0, BC)
        m_c = c < DV
        b_basis = tl.load(p_basis + c[None, :], mask=(d < DV)[:, None] & m_c[None, :], other=0.0)  # [BD, BC]
        b_out = tl.dot(b_latent, b_basis, input_precision=PRECISION)
        b_out += tl.load(p_mean + head * DV + c, mask=m_c, other=0.0)[None, :]
        tl.store(p_row + c[None, :], b_out.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


@triton.jit
def write_exact_kernel(
    p_positions, p_keys, p_values, p_key_scale, p_value_scale, p_mean, p_channels, p_frequency, p_pair_scale, p_offset,
    p_out_keys, p_out_values, start, stop, slots, heads,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, INT8: tl.constexpr, ROTATES: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """out[position - start] = the exact token, for one tile of slots whose position lies in [start, stop)."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    slot = tl.program_id(0) * BM + tl.arange(0, BM)
    position = tl.load(p_positions + row * slots + slot, mask=slot < slots, other=-1)  # -1: an empty slot
    m = (position >= start) & (position < stop)
    if tl.sum(m.to(tl.int32), 0) > 0:  # most tiles lie outside a segment of a long past
        source = row * slots + slot  # int64
        n = (position - start).to(tl.int64)
        p_key_row = p_out_keys + batch * stride_kb + head * stride_kh + n[:, None] * stride_kn
        p_value_row = p_out_values + batch * stride_vb + head * stride_vh + n[:, None] * stride_vn
        d = tl.arange(0, BDV)
        m_value = m[:, None] & (d < DV)[None, :]
        value = tl.load(p_values + source[:, None] * DV + d[None, :], mask=m_value, other=0)
        if INT8:
            value = value.to(tl.float32) * tl.load(p_value_scale + source, mask=m, other=0.0).to(tl.float32)[:, None]
        tl.store(p_value_row + d[None, :], value.to(p_out_values.dtype.element_ty), mask=m_value)
        if INT8:
            scale = tl.load(p_key_scale + source, mask=m, other=0.0).to(tl.float32)[:, None]
            pair = tl.arange(0, BD // 2)
            m_pair = pair < D // 2
            m_key = m[:, None] & m_pair[None, :]
            p_first = head * D + 2 * pair
            channel_x = tl.load(p_channels + p_first, mask=m_pair, other=0)[None, :]
            channel_y = tl.load(p_channels + p_first + 1, mask=m_pair, other=0)[None, :]
            p_key = p_keys + source[:, None] * D
            x = tl.load(p_key + channel_x, mask=m_key, other=0).to(tl.float32) * scale
            y = tl.load(p_key + channel_y, mask=m_key, other=0).to(tl.float32) * scale
            x += tl.load(p_mean + p_first, mask=m_pair, other=0.0)[None, :]
            y += tl.load(p_mean + p_first + 1, mask=m_pair, other=0.0)[None, :]
            if ROTATES:
                turned = (position - tl.load(p_offset + batch)).to(tl.float32)
                turn = head * (D // 2)
                x, y = rotate_pairs(x, y, turned, p_frequency + turn, p_pair_scale + turn, pair, m_pair)
            tl.store(p_key_row + channel_x, x.to(p_out_keys.dtype.element_ty), mask=m_key)
            tl.store(p_key_row + channel_y, y.to(p_out_keys.dtype.element_ty), mask=m_key)
        else:
            d = tl.arange(0, BD)
            m_key = m[:, None] & (d < D)[None, :]
            key = tl.load(p_keys + source[:, None] * D + d[None, :], mask=m_key, other=0.0)
            tl.store(p_key_row + d[None, :], key.to(p_out_keys.dtype.element_ty), mask=m_key)


def dequantize(
    past: QuantizedPast,
    start: int,
    stop: int,
    dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys (after RoPE) and values of the coded tokens at indices ``start..stop-1``, exact tokens in their place.

    Args:
        past: codes, tables and exact tokens of one layer.
        start, stop: ``0 <= start <= stop <= past.length``.
        dtype: float16, bfloat16 or float32.
        out: tensors to write to, shaped and typed as the result, contiguous along the last dimension.

    Returns:
        keys ``(batch, kv_heads, stop - start, head_dim)`` and values ``(batch, kv_heads, stop - start, value_dim)`` in
        plain channels.

    Raises:
        ValueError: for sizes, dtypes or layouts that the kernels were not written for.
    """
    require(0 <= start <= stop <= past.length, f"tokens {start}..{stop} do not lie within 0..{past.length}")
    require(dtype in DTYPES, f"dtype {dtype} is not supported; allowed are {DTYPES}")
    check_past(past)
    batch, heads = past.key_codes.shape[:2]
    dim, value_dim, count = past.key_tables.mean.shape[1], past.value_tables.mean.shape[1], stop - start
    shapes = (batch, heads, count, dim), (batch, heads, count, value_dim)
    if out is None:
        keys, values = (torch.empty(shape, dtype=dtype, device=past.key_codes.device) for shape in shapes)
    else:
        keys, values = out
        for tensor, shape in zip(out, shapes):
            fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.stride(3) == 1
            found = f"shape {tuple(tensor.shape)}, strides {tensor.stride()} and {tensor.dtype}"
            require(fits, f"out has {found}; {shape}, stride 1 along the last dimension and {dtype} are needed")
    if keys.numel() == 0:
        return keys, values
    with torch.cuda.device_of(keys):
        _launch_keys(past, start, keys)
        _launch_values(past, start, values)
        for tokens in past.exact:
            _launch_exact(past, tokens, start, keys, values)
    return keys, values


def _launch_keys(past: QuantizedPast, start: int, keys: torch.Tensor) -> None:
    batch, heads, count, dim = keys.shape
    tables, codes = past.key_tables, past.key_tables.codes
    groups = power_of_2(codes.groups)
    tile = min(64, TILE // (groups * codes.sub_dim))
    dequantize_keys_kernel[(ceil_div(count, tile), batch * heads)](
        past.key_codes, tables.centroids, tables.mean, tables.channels, tables.frequency, tables.pair_scale,
        past.offset, keys, start, count, past.capacity, heads, *keys.stride()[:3],
        D=dim, GROUPS=codes.groups, BG=groups, STAGES=codes.stages, CODE_BITS=codes.code_bits, SUB_DIM=codes.sub_dim,
        WIDTH=codes.width, ROTATES=tables.rotates, BN=tile, num_warps=4,
    )  # fmt: skip


def _launch_values(past: QuantizedPast, start: int, values: torch.Tensor) -> None:
    batch, heads, count, dim = values.shape
    tables, codes = past.value_tables, past.value_tables.codes
    groups = head_block(dim) // codes.sub_dim
    # TF32 rounds the basis to 2^-11, as far as 16 bits round the result; a float32 model gets exact products.
    precision = "ieee" if values.dtype == torch.float32 or torch.version.hip is not None else "tf32"
    tile = 64 if groups * codes.sub_dim <= 128 else 32
    dequantize_values_kernel[(ceil_div(count, tile), batch * heads)](
        past.value_codes, tables.centroids, tables.mean, tables.synthesis, values,
        start, count, past.capacity, heads, *values.stride()[:3],
        DV=dim, GROUPS=codes.groups, BG=groups, STAGES=codes.stages, CODE_BITS=codes.code_bits, SUB_DIM=codes.sub_dim,
        WIDTH=codes.width, BN=tile, BC=VALUE_COLUMNS, PRECISION=precision, num_warps=4, num_stages=1,
    )  # fmt: skip


def _launch_exact(past: QuantizedPast, tokens: ExactTokens, start: int, keys: torch.Tensor, values: torch.Tensor):
    batch, heads, count, dim = keys.shape
    slots, tables = tokens.positions.shape[2], past.key_tables
    if slots == 0:
        return
    tile = 16
    write_exact_kernel[(ceil_div(slots, tile), batch * heads)](
        tokens.positions, tokens.keys, tokens.values, tokens.key_scale, tokens.value_scale,
        tables.mean, tables.channels, tables.frequency, tables.pair_scale, past.offset,
        keys, values, start, start + count, slots, heads, *keys.stride()[:3], *values.stride()[:3],
        D=dim, DV=values.shape[3], BD=head_block(dim), BDV=head_block(values.shape[3]),
        INT8=tokens.key_scale is not None, ROTATES=tables.rotates, BM=tile, num_warps=4,
    )  # fmt: skip


def check_past(past: QuantizedPast) -> None:
    """Raises ValueError unless the past's tensors fit together. Every layer of every step asks: no message is made
    before it is needed."""
    batch, heads, length = past.key_codes.shape[:3]
    for name, codes, tables in (
        ("key", past.key_codes, past.key_tables),
        ("value", past.value_codes, past.value_tables),
    ):
        cut, centroids, (table_heads, dim) = tables.codes, tables.centroids, tables.mean.shape
        _check_codes(name, cut, dim)
        if codes.dtype != torch.uint8:
            raise ValueError(f"{name}_codes are {codes.dtype}; uint8 is needed")
        if codes.shape != (shape := (batch, heads, length, cut.width)):
            raise ValueError(f"{name}_codes have shape {tuple(codes.shape)}; {shape} is needed")
        if table_heads != heads:
            raise ValueError(f"{name} tables are of {table_heads} kv heads, codes of {heads}")
        if centroids.shape != (size := (heads, cut.groups, cut.stages, 1 << cut.code_bits, cut.sub_dim)):
            raise ValueError(f"{name} centroids have shape {tuple(centroids.shape)}; {size} is needed")
        if centroids.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"{name} centroids are {centroids.dtype}; float16 or float32 is needed")
        for tensor in (codes, *tables):
            if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
                raise ValueError(f"{name} codes and tables must be contiguous, not of {tensor.stride()}")
    if past.offset.shape != (batch,):
        raise ValueError(f"offset has shape {tuple(past.offset.shape)}; ({batch},) is needed")
    for tokens in past.exact:
        slots = (batch, heads, tokens.positions.shape[2])
        sizes = slots, (*slots, past.key_tables.mean.shape[1]), (*slots, past.value_tables.mean.shape[1])
        for tensor, size in zip((tokens.positions, tokens.keys, tokens.values), sizes):
            if tensor.shape != size or not tensor.is_contiguous():
                raise ValueError(f"exact tokens of shape {tuple(tensor.shape)}: {size}, contiguous, is needed")
        if tokens.positions.dtype != torch.int32:
            raise ValueError(f"positions are {tokens.positions.dtype}; int32 is needed")
        scaled = tokens.key_scale is not None and tokens.value_scale is not None
        if scaled != (tokens.keys.dtype == tokens.values.dtype == torch.int8):
            raise ValueError(f"exact tokens in {tokens.keys.dtype}: int8 ones, and only those, need scales")
        for scale in (tokens.key_scale, tokens.value_scale):
            if scale is not None and (scale.shape != (*slots, 1) or not scale.is_contiguous()):
                raise ValueError(f"scales of exact tokens must be contiguous and of shape {(*slots, 1)}")


@functools.lru_cache(maxsize=256)
def _check_codes(name: str, codes: Codes, dim: int) -> None:
    require(codes.code_bits in CODE_BITS, f"{name} codes of {codes.code_bits} bits have no kernel; {CODE_BITS} have")
    require(codes.sub_dim in SUB_DIMS, f"{name} sub_dim={codes.sub_dim} has no kernel; {SUB_DIMS} have")
    require(dim <= MAX_HEAD_DIM, f"{name} head size {dim} has no kernel; sizes up to {MAX_HEAD_DIM} have")
    covered = codes.groups * codes.sub_dim
    require(covered == dim, f"{codes.groups} sub-vectors of {codes.sub_dim} {name} channels make {covered}, not {dim}")

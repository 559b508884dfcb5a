"""Attention over dense keys and values with its log-sum-exp: a FlashAttention-2 kernel, and PyTorch's where it can.

    s_ij = softcap(scale q_i . k_j) + mask_ij,   lse_i = log sum_j exp(s_ij),   o_i = sum_j exp(s_ij - lse_i) v_j

after Dao, "FlashAttention-2" (arXiv 2307.08691): queries stay in a tile, keys stream by, the softmax is online.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, mask_arguments, power_of_2, require
from .softmax import LOG2E

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CUDNN_QUERIES = 1024  # fewer are not worth a plan of their own
MAX_HEAD_DIM = 256


@triton.jit
def attend_tiles(
    b_q, b_out, b_max, b_sum, first, last, kv_len, p_k, p_v, p_mask, stride_kn, stride_vn, stride_mn,
    row, m_row, causal_offset, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of keys ``first..last-1`` to the online softmax of queries b_q [BM, BD].

    Tiles that are not at an EDGE end within the keys and are seen by every query (up to `mask`).
    """
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        m_n = n < kv_len
        if EDGE:
            m_k = m_n[:, None] & (d < D)[None, :]
            m_v = m_n[:, None] & (e < DV)[None, :]
        else:
            m_k = (d < D)[None, :]
            m_v = (e < DV)[None, :]
        n64 = n.to(tl.int64)
        b_k = tl.load(p_k + n64[:, None] * stride_kn + d[None, :], mask=m_k, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + n64[:, None] * stride_vn + e[None, :], mask=m_v, other=0.0)  # [BN, BDV]
        # "ieee": exact products of float32 operands; 16-bit ones go through the matrix units whatever it says.
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BM, BN]
        if SOFTCAP:
            b_s = softcap * (2 * tl.sigmoid(2 * b_s / softcap) - 1)  # tanh
        if MASK != "none":
            m_mask = m_row[:, None] & m_n[None, :]
            b_mask = tl.load(p_mask + n64[None, :] * stride_mn, mask=m_mask, other=0)
            if MASK == "bool":
                b_s = tl.where(b_mask != 0, b_s, float("-inf"))
            else:
                b_s += b_mask.to(tl.float32)
        if EDGE:
            visible = m_n[None, :]
            if CAUSAL:
                visible = visible & (n[None, :] <= row[:, None] + causal_offset)
            b_s = tl.where(visible, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # a query that has seen no key yet
        # The difference first: an additive mask of float32's minimum would overflow if it were scaled by LOG2E.
        b_p = tl.exp2((b_s - b_safe[:, None]) * LOG2E)
        decay = tl.exp2((b_max - b_safe) * LOG2E)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * decay[:, None], input_precision="ieee")
        b_max = b_new
    return b_out, b_max, b_sum


@triton.jit
def flash_attention_kernel(
    p_q, p_k, p_v, p_mask, p_out, p_lse, q_len, kv_len, q_heads, group, causal_offset, scale, softcap,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ob, stride_oh, stride_om,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j: one tile of queries of one head over all the keys that it sees."""
    tiles = tl.cdiv(q_len, BM)
    # Tiles of a head run together and share its keys in L2; late queries first, since causally they see the most.
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // q_heads, batch_head % q_heads
    kv_head = head // group
    first_row = tile * BM
    row = first_row + tl.arange(0, BM)
    m_row = row < q_len
    row64 = row.to(tl.int64)

    d = tl.arange(0, BD)
    p_q_rows = p_q + batch * stride_qb + head * stride_qh + row64[:, None] * stride_qm
    b_q = tl.load(p_q_rows + d[None, :], mask=m_row[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
    p_k += batch * stride_kb + kv_head * stride_kh
    p_v += batch * stride_vb + kv_head * stride_vh
    p_mask_rows = p_mask
    if MASK != "none":
        p_mask_rows = p_mask + batch * stride_mb + head * stride_mh + row64[:, None] * stride_mm  # [BM, 1]

    last = kv_len
    inner = kv_len // BN * BN  # keys before it need neither the end nor causality checked
    if CAUSAL:
        last = tl.minimum(kv_len, tl.maximum(first_row + BM + causal_offset, 0))
        inner = tl.minimum(inner, tl.maximum(first_row + causal_offset + 1, 0) // BN * BN)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BDV], tl.float32)
    b_out, b_max, b_sum = attend_tiles(
        b_q, b_out, b_max, b_sum, 0, inner, kv_len, p_k, p_v, p_mask_rows, stride_kn, stride_vn, stride_mn,
        row, m_row, causal_offset, scale, softcap, D, DV, BD, BDV, BN, CAUSAL, MASK, SOFTCAP, False,
    )  # fmt: skip
    b_out, b_max, b_sum = attend_tiles(
        b_q, b_out, b_max, b_sum, inner, last, kv_len, p_k, p_v, p_mask_rows, stride_kn, stride_vn, stride_mn,
        row, m_row, causal_offset, scale, softcap, D, DV, BD, BDV, BN, CAUSAL, MASK, SOFTCAP, True,
    )  # fmt: skip

    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    e = tl.arange(0, BDV)
    p_out_rows = p_out + batch * stride_ob + head * stride_oh + row64[:, None] * stride_om
    tl.store(p_out_rows + e[None, :], b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (e < DV)[None, :])
    tl.store(p_lse + batch_head * q_len + row64, b_max + tl.log(b_sum), mask=m_row)  # log 0 = -inf: saw no key


def flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal_offset: int | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query` over dense keys and values by the Triton kernel.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)``; float16, bfloat16 or float32, as keys and values.
        keys, values: ``(batch, kv_heads, n, head_dim)`` and ``(..., value_dim)``; kv_heads divides q_heads. Any strides
            but the last, which is 1.
        scale: factor on q.k.
        causal_offset: query r sees keys up to ``r + causal_offset``; None: all of them.
        mask: bool (True = visible) or additive float ``(batch or 1, 1 or q_heads, 1 or q_len, n)`` of any strides.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Returns:
        output ``(batch, q_heads, q_len, value_dim)`` in the query's dtype (laid out with heads next to channels, as
        PyTorch's kernel does) and natural-log LSE ``(batch, q_heads, q_len)`` float32: 0 and -inf where a query sees
        no key.

    Raises:
        ValueError: for shapes, dtypes or layouts that the kernel was not written for.
    """
    _check(query, keys, values)
    batch, q_heads, q_len, dim = query.shape
    kv_len, value_dim = values.shape[2:]
    p_mask, kind, mask_strides = mask_arguments(mask, batch, q_heads, q_len, kv_len)
    place = dict(device=query.device)
    out = torch.empty(batch, q_len, q_heads, value_dim, dtype=query.dtype, **place).transpose(1, 2)
    lse = torch.empty(batch, q_heads, q_len, dtype=torch.float32, **place)
    if out.numel() == 0:
        return out, lse
    tile_q, tile_k, warps, stages = _tiles(max(dim, value_dim), query.dtype, q_len, mask is not None)
    with torch.cuda.device_of(query):
        flash_attention_kernel[(ceil_div(q_len, tile_q) * batch * q_heads,)](
            query, keys, values, p_mask, out, lse, q_len, kv_len, q_heads, q_heads // keys.shape[1],
            0 if causal_offset is None else causal_offset, float(scale), float(softcap or 1.0),
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *mask_strides, *out.stride()[:3],
            D=dim, DV=value_dim, BD=head_block(dim), BDV=head_block(value_dim), BM=tile_q, BN=tile_k,
            CAUSAL=causal_offset is not None, MASK=kind, SOFTCAP=softcap is not None,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def exact_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal_offset: int | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` by PyTorch's own kernel where that answers with an LSE, else by the Triton one.

    PyTorch's is called for 16-bit tensors on CUDA (sm_80 or newer) without mask and softcap, with equal head sizes
    that are multiples of 8 up to 256. It takes fewer kv heads than query heads as they are, and counts causality from
    the last key: ``causal_offset == n - q_len`` (torch/nn/attention/bias.py, `CausalVariant.LOWER_RIGHT`). On sm_90 and
    newer many queries go to cuDNN, which is faster there and counts causality from the first key.

    Args, returns and raises as `flash_attention`.
    """
    _check(query, keys, values)
    if causal_offset is not None and causal_offset >= keys.shape[2] - 1:
        causal_offset = None  # even the first query sees every key
    if mask is None and softcap is None and _library_answers(query, keys, values, causal_offset):
        if cudnn_answers(query, keys.shape[2], causal_offset):
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, keys, values, None, True, 0.0, causal_offset is not None, scale=scale
            )
            return out, lse.view(query.shape[:3])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, causal_offset is not None, scale=scale
        )
        return out, lse
    return flash_attention(
        query, keys, values, scale=scale, causal_offset=causal_offset, mask=mask, softcap=softcap
    )  # fmt: skip


def _library_answers(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal_offset: int | None) -> bool:
    dim, q_len, kv_len = query.shape[3], query.shape[2], keys.shape[2]
    if not query.is_cuda or query.dtype == torch.float32 or dim != values.shape[3] or dim % 8 or dim > MAX_HEAD_DIM:
        return False
    if 0 in (query.numel(), keys.numel()) or query.shape[0] > 65535:
        return False
    if causal_offset is not None and (causal_offset < 0 or causal_offset != kv_len - q_len):
        return False
    if torch.version.hip is not None:  # its kernel's causality for q_len != n is not documented
        return causal_offset is None or q_len == kv_len
    # It loads 16 bytes at a time.
    aligned = all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3]) for x in (query, keys, values))
    return aligned and torch.cuda.get_device_capability(query.device) >= (8, 0)


def cudnn_answers(query: torch.Tensor, kv_len: int, causal_offset: int | None) -> bool:
    """Whether PyTorch's cuDNN kernel is the one to ask, where PyTorch has a kernel at all."""
    if torch.version.cuda is None or not torch.backends.cuda.cudnn_sdp_enabled() or not query.is_cuda:
        return False
    # It refuses a single key.
    square = kv_len > 1 and (causal_offset is None or (causal_offset == 0 and query.shape[2] == kv_len))
    fits = query.dtype != torch.float32 and query.shape[3] <= 128 and query.shape[2] >= CUDNN_QUERIES
    return square and fits and torch.cuda.get_device_capability(query.device) >= (9, 0)


def _tiles(dim: int, dtype: torch.dtype, q_len: int, masked: bool) -> tuple[int, int, int, int]:
    """Tile of queries, tile of keys, warps and stages: what fits in 99 KB of shared memory on every card."""
    dim = head_block(dim)
    if dtype == torch.float32:
        queries, keys, warps, stages = (32, 32, 4, 1) if dim <= 128 else (16, 16, 4, 1)
    elif dim <= 64:
        queries, keys, warps, stages = 128, 64, 4, 3
    elif dim <= 128:
        queries, keys, warps, stages = 128, 32, 4, 3
    else:
        queries, keys, warps, stages = 64, 32, 4, 2
    if masked:  # tiles of the mask are staged as well
        stages = max(stages - 1, 1)
    if torch.version.hip is not None:  # 64 KB of shared memory
        stages = min(stages, 2)
    return min(queries, max(16, power_of_2(q_len))), keys, warps, stages


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    for name, x in (("query", query), ("keys", keys), ("values", values)):
        require(x.ndim == 4, f"{name} has {x.ndim} dimensions; (batch, heads, tokens, channels) are needed")
        require(x.dtype == query.dtype, f"{name} is {x.dtype}, but the query {query.dtype}: they must agree")
        require(x.stride(3) == 1 or x.shape[3] == 1, f"{name} has stride {x.stride(3)} along channels; 1 is needed")
        require(x.shape[3] <= MAX_HEAD_DIM, f"{name} has head size {x.shape[3]}; up to {MAX_HEAD_DIM} are supported")
    require(query.dtype in DTYPES, f"dtype {query.dtype} is not supported; allowed are {DTYPES}")
    require(
        query.shape[0] == keys.shape[0] and query.shape[3] == keys.shape[3] and keys.shape[:3] == values.shape[:3],
        f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit together",
    )
    require(
        keys.shape[1] > 0 and query.shape[1] % keys.shape[1] == 0,
        f"{keys.shape[1]} kv heads do not divide {query.shape[1]} query heads",
    )

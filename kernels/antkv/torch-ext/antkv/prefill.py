"""Attention of a prompt's chunk over a quantized past: a segment is made dense, attended to and merged, then the next.

With segments S of the past and the exact tail T, each answering with its own normalised output and LSE,

    lse = log(sum_S exp(lse_S) + exp(lse_T)),   out = sum_S exp(lse_S - lse) out_S + exp(lse_T - lse) out_T

so the workspace is one segment and the chunk, however long the past is.

Logits of coded tokens may have a bias b that exact tokens E of the past have not (`CodeBias`). Segments hold both, and
no fused kernel adds b to some keys alone. So all of the past gets b, and what E has too much is taken off again:

    w = (1 - exp(-b)) exp(lse_E - lse_P),   out = (out_P - w out_E) / (1 - w),   lse = lse_P + b + log(1 - w).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from .checks import ceil_div, head_block, require
from .dequantize import dequantize
from .flash_attention import cudnn_answers, exact_attention
from .past import QuantizedPast

SEGMENT = 16384  # tokens of all sequences together that are dense at a time: 67 MB for 8 heads of 128 in 16 bits
BIAS_ROWS = 1024  # queries whose exact tokens are looked at again at a time: bounds the gathered mask
Answer = tuple[torch.Tensor, torch.Tensor]  # output and LSE
MIN_SEGMENT = 4096  # of one sequence: a shorter one spends its time on merging


class DensePast(Protocol):
    """A past that says itself what its codes stand for; others are `dequantize`d."""

    @property
    def length(self) -> int:
        """Coded tokens."""
        ...

    def dense(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values ``(batch, kv_heads, stop - start, dim)`` in the tail's dtype."""
        ...


class CodeBias(NamedTuple):
    """What the logits of coded tokens get, and the tokens of the past that are not coded.

    Args:
        bias: float32 ``(batch, q_heads, q_len)``, natural log, at least 0 and small: the formula above loses as many
            digits as ``exp(bias)`` has where exact tokens hold nearly all of the attention.
        keys, values: exact tokens ``(batch, kv_heads, m, dim)`` in the query's dtype, keys after RoPE.
        positions: int ``(batch, kv_heads, m)``, their index in the sequence, -1 for an empty slot.
    """

    bias: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


@triton.jit
def merge_segments_kernel(
    p_out, p_lse, p_part, p_part_lse, p_new_lse, q_len, q_heads,
    stride_ob, stride_oh, stride_om, stride_pb, stride_ph, stride_pm,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """lse' = log(e^lse + e^part_lse), out' = e^(lse - lse') out + e^(part_lse - lse') part; out in place.

    lse' goes elsewhere: every warp loads lse, and one that stores before another has loaded would spoil it.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // q_heads, row % q_heads
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = m < q_len
    lse = tl.load(p_lse + row * q_len + m, mask=m_m, other=0.0)
    part_lse = tl.load(p_part_lse + row * q_len + m, mask=m_m, other=0.0)
    maximum = tl.maximum(lse, part_lse)
    safe = tl.where(maximum == float("-inf"), 0.0, maximum)  # seen no key in either
    weight, part_weight = tl.exp(lse - safe), tl.exp(part_lse - safe)
    total = weight + part_weight
    tl.store(p_new_lse + row * q_len + m, maximum + tl.log(tl.where(total == 0.0, 1.0, total)), mask=m_m)

    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, BDV)
    m_out = m_m[:, None] & (d < DV)[None, :]
    m64 = m.to(tl.int64)[:, None]
    p_rows = p_out + batch * stride_ob + head * stride_oh + m64 * stride_om + d[None, :]
    p_part_rows = p_part + batch * stride_pb + head * stride_ph + m64 * stride_pm + d[None, :]
    b_out = tl.load(p_rows, mask=m_out, other=0.0)  # [BM, BDV]
    b_part = tl.load(p_part_rows, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_rows, b_out * (weight * norm)[:, None] + b_part * (part_weight * norm)[:, None], mask=m_out)


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Merges the attention over more keys into `out`, in place; returns the new LSE.

    Args:
        out: float32 ``(batch, q_heads, q_len, value_dim)``; lse: float32 ``(batch, q_heads, q_len)``, contiguous.
        part, part_lse: the same over the other keys; `part` of any float dtype.

    Raises:
        ValueError: for shapes, dtypes or layouts that do not fit.
    """
    batch, q_heads, q_len, dim = out.shape
    require(out.dtype == torch.float32, f"out is {out.dtype}; float32 is needed to merge into")
    require(part.shape == out.shape, f"part has shape {tuple(part.shape)}, but out {tuple(out.shape)}")
    require(out.stride(3) == part.stride(3) == 1, "out and part must have stride 1 along channels")
    for x in (lse, part_lse):
        fits = x.shape == out.shape[:3] and x.dtype == torch.float32 and x.is_contiguous()
        require(fits, f"an LSE is {tuple(x.shape)} {x.dtype}; contiguous float32 {tuple(out.shape[:3])} is needed")
    new_lse = torch.empty_like(lse)
    if out.numel() == 0:
        return new_lse
    tile = 32
    with torch.cuda.device_of(out):
        merge_segments_kernel[(ceil_div(q_len, tile), batch * q_heads)](
            out, lse, part, part_lse, new_lse, q_len, q_heads, *out.stride()[:3], *part.stride()[:3],
            DV=dim, BDV=head_block(dim), BM=tile, num_warps=4,
        )  # fmt: skip
    return new_lse


def prefill_attention(
    query: torch.Tensor,
    past: QuantizedPast | DensePast | None,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    segment: int = SEGMENT,
    code_bias: CodeBias | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk of queries over the quantized past and the exact tail, which ends with the chunk itself.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)`` after RoPE; float16, bfloat16 or float32.
        past: coded tokens, all before the queries; None if there are none.
        tail_keys, tail_values: ``(batch, kv_heads, n_tail, head_dim)`` and ``(..., value_dim)``, the query's dtype.
        scale: factor on q.k.
        mask: bool (True = visible) or additive float, ``(batch or 1, 1 or q_heads, 1 or q_len, past + n_tail)``; it
            stands in for causality.
        is_causal: without a mask, query r sees the past and the tail up to ``n_tail - q_len + r``.
        softcap: Gemma 2's logit cap. sink_logit: GPT-OSS's ``(q_heads,)`` logits that join the denominator only.
        segment: past tokens, of all sequences together, that are dense at a time.
        code_bias: see `CodeBias`; after `softcap`.

    Returns:
        output ``(batch, q_heads, q_len, value_dim)`` in the query's dtype and natural-log LSE, sinks included,
        float32 ``(batch, q_heads, q_len)``: 0 and -inf where a query sees no key.

    Raises:
        ValueError: for shapes, dtypes or layouts that the kernels were not written for.
    """
    coded, q_len, n_tail = 0 if past is None else past.length, query.shape[2], tail_keys.shape[2]
    require(segment > 0, f"segment={segment} must be at least 1 token")
    require(coded + n_tail > 0, "there are no keys to attend to: neither a past nor a tail")
    if isinstance(past, QuantizedPast):
        for name, tail, tables in (("key", tail_keys, past.key_tables), ("value", tail_values, past.value_tables)):
            want = (past.key_codes.shape[0], past.key_codes.shape[1], n_tail, tables.mean.shape[1])
            require(tuple(tail.shape) == want, f"the tail's {name}s have shape {tuple(tail.shape)}; {want} is needed")
    if mask is not None:
        require(mask.shape[-1] == coded + n_tail, f"the mask covers {mask.shape[-1]} keys, not {coded + n_tail}")
    elif is_causal:
        require(n_tail >= q_len, f"{q_len} causal queries do not fit a tail of {n_tail} tokens, which must hold them")
    if sink_logit is not None:
        found = tuple(sink_logit.shape)
        require(found == (query.shape[1],), f"sink_logit has shape {found}; ({query.shape[1]},) is needed")

    options = dict(scale=scale, softcap=softcap)
    found = _merged(None, _past_parts(query, past, tail_keys, tail_values, mask, segment, **options))
    if found is not None and code_bias is not None:
        found = _raised(*found, query, code_bias, mask, **options)
    found = _merged(found, _tail_parts(query, coded, tail_keys, tail_values, mask, is_causal, **options))
    assert found is not None  # there are keys
    out, lse = found
    if sink_logit is not None:
        sink = sink_logit.float().view(1, -1, 1)
        out = out * torch.sigmoid(lse - sink).unsqueeze(-1)  # exp(lse) / (exp(lse) + exp(sink)); 0 where lse is -inf
        lse = torch.logaddexp(lse, sink)
    return out.to(query.dtype), lse


def _merged(found: Answer | None, parts: Iterator[Answer]) -> Answer | None:
    """Output and LSE over what `found` and `parts` have answered."""
    for part, part_lse in parts:
        if found is None:
            found = part, part_lse
        else:
            out, lse = found[0].float(), found[1]
            found = out, merge_(out, lse, part, part_lse)
    return found


def _past_parts(
    query: torch.Tensor, past: QuantizedPast | DensePast | None, tail_keys: torch.Tensor, tail_values: torch.Tensor,
    mask: torch.Tensor | None, segment: int, **options,
) -> Iterator[Answer]:  # fmt: skip
    """Output and LSE over each segment of the past. The next one overwrites a segment's keys."""
    if past is None or past.length == 0:
        return
    step = _segment_length(past.length, query.shape[0], segment)
    batch, heads = tail_keys.shape[:2]
    scratch = [
        torch.empty(batch, heads, step, x.shape[3], dtype=query.dtype, device=query.device)
        for x in (tail_keys, tail_values)
        if isinstance(past, QuantizedPast)
    ]
    for start in range(0, past.length, step):
        stop = min(start + step, past.length)
        if isinstance(past, QuantizedPast):
            keys, values = (x[:, :, : stop - start] for x in scratch)
            dense = dequantize(past, start, stop, query.dtype, out=(keys, values))
        else:
            dense = past.dense(start, stop)
        columns = None if mask is None else mask[..., start:stop]
        yield exact_attention(query, *dense, mask=columns, **options)


def _tail_parts(
    query: torch.Tensor, coded: int, tail_keys: torch.Tensor, tail_values: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, **options,
) -> Iterator[Answer]:  # fmt: skip
    """Output and LSE over the tail, in one part or two."""
    q_len, n_tail = query.shape[2], tail_keys.shape[2]
    if not n_tail:
        return
    columns = None if mask is None else mask[..., coded:]
    offset = n_tail - q_len if mask is None and is_causal else None
    if offset and options["softcap"] is None and cudnn_answers(query, q_len, 0):  # its causality is that of a square
        yield exact_attention(query, tail_keys[:, :, :offset], tail_values[:, :, :offset], **options)
        tail_keys, tail_values, offset = tail_keys[:, :, offset:], tail_values[:, :, offset:], 0
    yield exact_attention(query, tail_keys, tail_values, causal_offset=offset, mask=columns, **options)


def _raised(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, code_bias: CodeBias, mask: torch.Tensor | None, **options
) -> Answer:  # fmt: skip
    """Output and LSE over the past with the bias of its coded tokens (formula above); some rows at a time."""
    bias, keys, values, positions = code_bias
    kept, group = keys.shape[2], query.shape[1] // keys.shape[1]
    for name, x, want in (
        ("bias", bias, query.shape[:3]),
        ("keys", keys, (query.shape[0], keys.shape[1], kept, query.shape[3])),
        ("values", values, (query.shape[0], keys.shape[1], kept, out.shape[3])),
        ("positions", positions, (query.shape[0], keys.shape[1], kept)),
    ):
        require(x.shape == want, f"code_bias: {name} have shape {tuple(x.shape)}; {tuple(want)} is needed")
    if kept == 0:
        return out, lse + bias
    positions = positions.repeat_interleave(group, 1).unsqueeze(2)  # (batch, q_heads, 1, kept)
    empty, index = positions < 0, positions.clamp_min(0).long()
    raised, raised_lse = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
    for start in range(0, query.shape[2], BIAS_ROWS):
        rows = slice(start, start + BIAS_ROWS)
        visible = ~empty
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            at = index.expand(-1, -1, part.shape[2], -1)
            found = part.expand(*at.shape[:3], -1).gather(3, at)
            visible = found.masked_fill_(empty, False if mask.dtype == torch.bool else float("-inf"))
        exact, exact_lse = exact_attention(query[:, :, rows], keys, values, mask=visible, **options)
        share = (exact_lse - lse[:, :, rows]).clamp_max(0.0).exp()
        share = (-torch.expm1(-bias[:, :, rows]) * share).nan_to_num(0.0)  # a query that sees nothing: -inf - -inf
        rest = 1.0 - share
        raised[:, :, rows] = (out[:, :, rows] - share.unsqueeze(-1) * exact) / rest.unsqueeze(-1)
        raised_lse[:, :, rows] = lse[:, :, rows] + bias[:, :, rows] + rest.log()
    return raised, raised_lse


def _segment_length(coded: int, batch: int, segment: int) -> int:
    """Tokens of a segment of each sequence: about as many in each, so that the last one is not a short one."""
    most = segment if batch == 1 else min(segment, max(MIN_SEGMENT, segment // batch))
    count = ceil_div(coded, most)
    return min(most, ceil_div(ceil_div(coded, count), 128) * 128)

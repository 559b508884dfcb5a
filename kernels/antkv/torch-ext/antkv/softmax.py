"""Pieces of online softmax attention: dots by dtype, softcap and mask, one step over a tile of keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def masked_logits(
    logits, visible, columns, p_mask, stride_mask_h, stride_mask_q, stride_mask_n, head_of_row, query_of_row, m_row,
    softcap, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Softcap and mask of `logits` [BN, BR]; the result is in units of log 2."""
    if SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    logits = logits * LOG2E
    if MASK != "none":
        p = p_mask + head_of_row[None, :] * stride_mask_h + query_of_row[None, :] * stride_mask_q
        m = m_row[None, :] & visible
        value = tl.load(p + columns[:, None].to(tl.int64) * stride_mask_n, mask=m, other=0)
        if MASK == "bool":
            visible = visible & (value != 0)
        else:
            # Only -inf hides: a row that is masked by finite numbers alone keeps its softmax over all keys.
            value = value.to(tl.float32)
            logits += tl.where(value == float("-inf"), value, tl.maximum(value, -1e30)) * LOG2E
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def softmax_step(logits, maximum):
    """One more tile of logits [BN, BR] of an online softmax -> its weights, decay of what was summed, new maximum."""
    new = tl.maximum(maximum, tl.max(logits, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
    return tl.exp2(logits - safe[None, :]), tl.exp2(maximum - safe), new


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:  # noqa: SIM300
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc)

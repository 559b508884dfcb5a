"""Merges the partial results of split attention by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import head_block
from .softmax import LOG2E
from .tables import ValueTables


@triton.jit
def _weights(p_max, p_total, first, last, top, ROWS: tl.constexpr, BS: tl.constexpr):
    """exp2(maximum - top) of the splits ``first..last-1`` [BS] and the sum of their weighted totals."""
    s = first + tl.arange(0, BS)
    weight = tl.exp2(tl.load(p_max + s * ROWS, mask=s < last, other=float("-inf")) - top)
    return weight, tl.sum(weight * tl.load(p_total + s * ROWS, mask=s < last, other=0.0), 0)


@triton.jit
def _weighted_sum(p_partial, weight, first, last, channel, ROWS: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr):
    """sum_s weight_s partial_s of the splits ``first..last-1`` at some channels [BC]."""
    s = first + tl.arange(0, BS)
    p = p_partial + (s * ROWS)[:, None] * DV + channel[None, :]
    part = tl.load(p, mask=(s < last)[:, None] & (channel < DV)[None, :], other=0.0)
    return tl.sum(part * weight[:, None], 0)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    p_partial, p_max, p_total, p_synthesis, p_mean, p_sink_logit, p_out, p_lse, splits,
    H: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr, SINK_LOGIT: tl.constexpr, BASIS: tl.constexpr,
):  # fmt: skip
    """Merges the parts of one row: `splits` of codes through the values' basis (if there is one), then as many plain
    ones.

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

    s = tl.arange(0, BS)
    top = tl.max(tl.load(p_max + (plain + s) * ROWS, mask=s < splits, other=float("-inf")), 0)
    if BASIS:
        top = tl.maximum(top, tl.max(tl.load(p_max + s * ROWS, mask=s < splits, other=float("-inf")), 0))
    if SINK_LOGIT:
        sink = tl.load(p_sink_logit + h * (ROWS // Q_LEN) + row // Q_LEN).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing
    weight, total = _weights(p_max, p_total, plain, plain + splits, safe, ROWS, BS)
    if BASIS:
        code_weight, code_total = _weights(p_max, p_total, 0, splits, safe, ROWS, BS)
        total += code_total
    if SINK_LOGIT:
        total += tl.exp2(sink - safe)

    c = tl.program_id(2) * BC + tl.arange(0, BC)
    out = _weighted_sum(p_partial, weight, plain, plain + splits, c, ROWS, DV, BS)
    if BASIS:  # every program of a row sums all latent channels and projects them to BC plain ones
        dv = tl.arange(0, BDV)
        latent = _weighted_sum(p_partial, code_weight, 0, splits, dv, ROWS, DV, BS)
        p_basis = p_synthesis + h * DV * DV + dv[:, None] * DV + c[None, :]
        basis = tl.load(p_basis, mask=(dv < DV)[:, None] & (c < DV)[None, :], other=0.0)
        out += tl.sum(latent[:, None] * basis, 0)
        out += code_total * tl.load(p_mean + h * DV + c, mask=c < DV, other=0.0)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + (bh * ROWS + row) * DV + c, out.to(p_out.dtype.element_ty), mask=c < DV)
    tl.store(p_lse + bh * ROWS + row, (top + tl.log2(total)) / LOG2E)


def merge_splits(
    partial: torch.Tensor,
    state: torch.Tensor,
    tables: ValueTables | None,
    sink_logit: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out` ``(batch, q_heads, q_len, value_dim)`` and `lse` ``(batch, q_heads, q_len)``.

    Args:
        partial: float32 ``(batch, kv_heads, parts, rows, value_dim)``, unnormalised; the first half in the latent
            basis of `tables`, the second in plain channels, or all of them without `tables`.
        state: float32 ``(2, batch, kv_heads, parts, rows)``: maximum (in units of log 2) and sum of weights.
    """
    batch, heads, parts, rows, dim = partial.shape
    columns = 32
    basis = (out, out) if tables is None else (tables.synthesis, tables.mean)
    splits = parts if tables is None else parts // 2
    merge_splits_kernel[(batch * heads, rows, triton.cdiv(dim, columns))](
        partial, state[0], state[1], *basis, out if sink_logit is None else sink_logit, out, lse,
        splits, H=heads, ROWS=rows, Q_LEN=out.shape[2], DV=dim, BDV=head_block(dim),
        BS=max(2, triton.next_power_of_2(splits)), BC=columns, SINK_LOGIT=sink_logit is not None,
        BASIS=tables is not None, num_warps=4,
    )  # fmt: skip

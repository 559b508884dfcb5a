"""Attention over an exact chunk with its log-sum-exp: PyTorch's own flash attention where it can answer."""

from __future__ import annotations

import torch

from ..reference.attention import Visibility


def exact_attention(past, query: torch.Tensor, visibility: Visibility, scale: float):
    """Attention over the tail alone through the CPU flash kernel, which returns the LSE as well.

    Args and returns as `reference.attention.attention`; None where the kernel does not apply (other devices, decode
    steps, per-head or additive masks), so that the reference answers.
    """
    keys, values = past.tail_keys, past.tail_values
    mask = visibility.mask
    if query.device.type != "cpu" or visibility.q_len == 1 or keys.shape[-1] != values.shape[-1]:
        return None
    if not query.dtype == keys.dtype == values.dtype:  # autocast may mix them
        return None
    if visibility.is_causal and visibility.q_len != visibility.kv_len:
        return None  # the kernel counts causality from the first key
    blind = None  # rows that see nothing: the kernel answers 0 for their LSE
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return None
        blind = ~mask.any(-1)
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    group = query.shape[1] // keys.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        keys.repeat_interleave(group, 1),
        values.repeat_interleave(group, 1),
        0.0,
        visibility.is_causal and mask is None,
        attn_mask=mask,
        scale=scale,
    )
    if blind is not None:
        lse = lse.masked_fill(blind, float("-inf"))
    return out.float().unflatten(1, (keys.shape[1], -1)), lse.float().unflatten(1, (keys.shape[1], -1))

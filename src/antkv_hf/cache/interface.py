"""The fast lane: attention implementation "antkv", registered with transformers on import.

``model.set_attn_implementation("antkv")`` sends every attention call here; layers that hold quantized keys and values
are answered over their codes, all others exactly. Models that no other lane serves (logit softcap, attention sinks)
work in this one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention.attend import attend
from ..codecs import IdentityCodec, LayerCodec
from ..storage import Snapshot
from .handle import KVHandle

NAME = "antkv"


def antkv_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' interface, query ``(batch, q_heads, q_len, head_dim)`` -> ``(batch, q_len, q_heads, dim)``."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options: dict[str, Any] = dict(
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1 and bool(causal),
        softcap=softcap,
        sink_logit=s_aux,
    )
    if isinstance(key, KVHandle):
        out = key.shared.attend(query, attention_mask, **options)
    elif softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    else:  # a layer that is not quantized, of a model that sdpa does not serve
        out = attend(_plain(key, value), query, attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


def _plain(keys: torch.Tensor, values: torch.Tensor) -> Snapshot:
    codec = LayerCodec(IdentityCodec(), IdentityCodec())
    return Snapshot(codec, None, None, (), keys, values, torch.zeros(keys.shape[0], dtype=torch.int64))


AttentionInterface.register(NAME, antkv_attention_forward)
# The sdpa mask is right for every family (flash attention's 2-D mask is not, on Llama 4 and Gemma 4).
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

"""The fast lane: attention implementation "antkv", registered with transformers on import.

``model.set_attn_implementation("antkv")`` sends every attention call here; layers that hold quantized keys and values
are answered over their codes, all others exactly. Models that no other lane serves (logit softcap, attention sinks)
work in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..attention.attend import attend
from ..codecs import IdentityCodec, LayerCodec
from ..snapshot import Snapshot
from .compiled_step import NewToken, attend_new_token
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
    if isinstance(key, NewToken) and isinstance(value, NewToken):  # within torch.compile
        out = attend_new_token(query, key, value, attention_mask, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
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
        if (
            options["is_causal"] and query.shape[2] < key.shape[2]
        ):  # `antkv_mask` left it out; sdpa counts from the start
            length, past = query.shape[2], key.shape[2] - query.shape[2]
            attention_mask = torch.ones(length, past + length, dtype=torch.bool, device=query.device).tril(past)
            attention_mask = attention_mask[None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    else:  # a layer that is not quantized, of a model that sdpa does not serve
        out = attend(_plain(key, value), query, attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


def _plain(keys: torch.Tensor, values: torch.Tensor) -> Snapshot:
    codec = LayerCodec(IdentityCodec(), IdentityCodec())
    return Snapshot(codec, None, None, (), keys, values, torch.zeros(keys.shape[0], dtype=torch.int64))


def antkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | None:
    """transformers' sdpa mask, but None for every chunk without padding.

    The sdpa mask is right for every family (flash attention's 2-D one is not, on Llama 4 and Gemma 4). This lane counts
    causality from the end, and the mask of an 8K chunk after 128K tokens would take a gigabyte.
    """
    plain = allow_is_causal_skip and mask_function is causal_mask_function and local_size is None and kv_offset == 0
    newest = isinstance(q_offset, int) and q_offset + q_length == kv_length
    if plain and newest and (attention_mask is None or bool(attention_mask[:, :kv_length].all())):
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,  # type: ignore[arg-type]
        allow_is_causal_skip, **kwargs,
    )  # fmt: skip


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, `model` attends by the implementation `name`; each of its parts gets its own back."""
    config = model.config
    before = {"": config._attn_implementation}
    for part in getattr(config, "sub_configs", None) or {}:
        if (sub := getattr(config, part, None)) is not None:
            before[part] = sub._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, antkv_attention_forward)
AttentionMaskInterface.register(NAME, antkv_mask)

"""Sees every attention call of a frozen model: attention implementation "antkv_calibration"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention.exact import exact_attention
from ..cache.interface import attention_implementation
from ..codecs import IdentityCodec, LayerCodec
from ..reference.attention import Visibility, attention, grouped, logits_of
from ..reference.scores import anchor_score_term, column_statistic
from ..snapshot import Snapshot

NAME = "antkv_calibration"


@dataclass(frozen=True)
class Attended:
    """What one layer's attention call leaves behind.

    Args:
        key, value: ``(batch, kv_heads, n, dim)``, key after RoPE; their ``.grad`` is there after the backward pass.
        anchor_score: AnS ``(batch, kv_heads, n)`` float32.
    """

    key: torch.Tensor
    value: torch.Tensor
    anchor_score: torch.Tensor


class Recorder:
    """Collects `Attended` of the layers asked for, by layer index."""

    def __init__(self, layers: list[int]):
        self.layers = frozenset(layers)
        self.seen: dict[int, Attended] = {}

    def wants(self, layer: int | None) -> bool:
        # The first call counts: later layers that share another layer's keys (Gemma 3n) add to its gradients.
        return layer in self.layers and layer not in self.seen


_RECORDER: ContextVar[Recorder | None] = ContextVar("antkv_recorder", default=None)


def calibration_attention_forward(
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
    """Differentiable exact attention of transformers' interface, which also records keys, values and AnS."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    n, length = query.shape[2], key.shape[2]
    visibility = Visibility(attention_mask, attention_mask is None and bool(causal), n, length)
    recorder = _RECORDER.get()
    layer: int = getattr(module, "layer_idx", None)  # type: ignore[assignment]
    if recorder is not None and recorder.wants(layer):
        key, value = _with_grad(key), _with_grad(value)
        score = anchor_score(query, key, value, visibility, scale, softcap, s_aux)
        recorder.seen[layer] = Attended(key, value, score)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    out = dense_attention(query, key, value, visibility, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def anchor_score(query, key, value, visibility: Visibility, scale: float, softcap=None, sink_logit=None):
    """AnS_j = sum over the head group and queries i of A_ij |v_j - o_i| |q_i| (RECIPE definition 1), blockwise.

    Args:
        query: ``(batch, q_heads, n, head_dim)`` after RoPE. key, value: ``(batch, kv_heads, n, dim)``.

    Returns:
        float32 ``(batch, kv_heads, n)``; the n x n map never exists as a whole.
    """
    codec = LayerCodec(IdentityCodec(), IdentityCodec())
    start = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
    past = Snapshot(codec, None, None, (), key.detach(), value.detach(), start)
    answer = None
    if softcap is None and sink_logit is None:
        answer = exact_attention(past, query, visibility, scale)
    output, lse = answer or attention(past, query, visibility, scale, softcap, sink_logit)
    return column_statistic(
        anchor_score_term, grouped(query, key.shape[1]), past.tail_keys, past.tail_values, output, lse, visibility, 0,
        scale, softcap,
    )  # fmt: skip


def dense_attention(query, key, value, visibility: Visibility, scale: float, softcap, sink_logit):
    """Attention with a logit cap or sink logits, which sdpa has not; holds the whole map of one layer."""
    q = grouped(query, key.shape[1])
    logits = visibility.apply(logits_of(q, key, scale, softcap), slice(0, key.shape[2]))
    if sink_logit is not None:
        sink = sink_logit.float().view(1, key.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    probs = logits.softmax(-1)[..., : key.shape[2]]
    return (probs @ value.float().unsqueeze(2)).flatten(1, 2).to(query.dtype)


def _with_grad(x: torch.Tensor) -> torch.Tensor:
    if not x.requires_grad:  # nothing before the first recorded layer needs a graph
        return x.detach().requires_grad_()
    x.retain_grad()
    return x


@contextmanager
def frozen_for_statistics(model: PreTrainedModel, implementation: str = NAME) -> Iterator[None]:
    """Inside: evaluation mode, no parameter requires grad, attention is ours. All put back after, also on error."""
    training = [(module, module.training) for module in model.modules()]
    needs_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        with attention_implementation(model, implementation):
            yield
    finally:
        for parameter, flag in needs_grad:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


@contextmanager
def recording(layers: list[int]) -> Iterator[Recorder]:
    """Inside: attention calls of `layers` are recorded."""
    recorder = Recorder(layers)
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


AttentionInterface.register(NAME, calibration_attention_forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

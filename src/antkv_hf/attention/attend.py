"""How an attention call on a cached layer is answered, and what its queries leave behind for the anchor score."""

from __future__ import annotations

import torch

from ..reference.attention import Visibility
from ..snapshot import Snapshot
from ..storage import LayerStorage
from .backends import Backend
from .beside import beside
from .reference_backend import REFERENCE


def attend(
    past: Snapshot,
    query: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    backend: Backend = REFERENCE,
    observer: LayerStorage | None = None,
    commit: bool = False,
) -> torch.Tensor:
    """Attention of `query` ``(batch, q_heads, q_len, head_dim)`` over a snapshot; the tail is its newest part.

    Args:
        mask: bool or additive ``(batch or 1, 1 or q_heads, 1 or q_len, length)``, or None.
        scale: factor on q.k, ``head_dim ** -0.5`` by default.
        is_causal: without a mask, causal counted from the end of the keys.
        softcap, sink_logit: see `reference.attention.attention`.
        observer: the storage whose tail tokens these queries score.
        commit: encode at once what has left the window, so that a long prefill holds one layer's exact keys at a time.

    Returns:
        ``(batch, q_heads, q_len, value_dim)`` in the query's dtype.

    Raises:
        ValueError: if heads, sizes or mask do not fit the snapshot, or grad is enabled.
    """
    batch, kv_heads = past.tail_keys.shape[:2]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, past.tail_keys, past.tail_values)):
        raise ValueError(
            f"attention over {past.length} cached keys was called with grad enabled, and its gradients would vanish: "
            'use torch.no_grad(), or train with model.set_attn_implementation("sdpa" or "eager") and DynamicCache'
        )
    if query.shape[0] != batch or query.shape[1] % kv_heads or query.shape[3] != past.tail_keys.shape[3]:
        raise ValueError(
            f"query of shape {tuple(query.shape)} does not fit a cache of batch {batch}, {kv_heads} kv heads "
            f"and head size {past.tail_keys.shape[3]}: give (batch, heads, tokens, head size) of the model that filled "
            "it, with a multiple of the kv heads"
        )
    captured = past.static is not None and past.static.planned is not None
    if captured:
        mask = None  # older transformers make one while capturing: one token sees all, and padding is in `offset`
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[-1] != past.length:
            raise ValueError(
                f"the attention mask covers {mask.shape[-1]} keys, but the cache holds {past.length}: give a mask "
                "over all of them, new ones included, or none; this call's are in some layers now, so then call "
                "cache.reset() first"
            )
    q_len = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):  # sums and scores stay in float32
        step = _is_step(past, query, backend, observer)
        if captured and not step:
            raise ValueError(
                f"a captured step was asked {q_len} query tokens of {query.shape[1]} heads, and answers one: decode "
                "with antkv_generate(..., cuda_graphs=False)"
            )
        given = mask
        if mask is None and not step and past.static is not None and past.static.padded and q_len == 1:
            mask = past.unpadded()
        visibility = Visibility(mask, is_causal and q_len > 1, q_len, past.length)
        logits = None
        if step:
            out, lse, logits = backend.attend_step(past, query, mask, scale, softcap, sink_logit, _term(observer))
        else:
            out, lse = backend.attention(past, query, visibility, scale, softcap, sink_logit)
        if observer is not None and observer.tail_keys is past.tail_keys:  # else an old snapshot, encoded since
            if given is not None:
                _learn_padding(observer, past, given)
            observe(observer, backend, past, query, out, lse, visibility, scale, softcap, step, logits)
            if commit:
                observer.commit()
    return out.flatten(1, 2).to(query.dtype)


def _is_step(past: Snapshot, query: torch.Tensor, backend: Backend, observer: LayerStorage | None) -> bool:
    """Whether the backend answers from preallocated buffers alone (a score of the user's own has no kernel there)."""
    if past.static is None or not past.static.holds_tail:
        return False
    return backend.answers_step(query, past.tail_keys.shape[1], _term(observer))


def _term(observer: LayerStorage | None):
    """What the observer's score sums over queries; None if it sums nothing, or nobody observes."""
    return None if observer is None or observer.score is None else observer.score.term


def observe(
    storage: LayerStorage, backend: Backend, past: Snapshot, query, out, lse, visibility: Visibility, scale, softcap,
    step: bool = False, logits: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Adds what these queries say of the tail tokens to the storage's running statistic.

    `step`: in place, see `Backend.observe_step`, which takes `logits`; in a captured step beside what follows.
    """
    if storage.score is None:
        return
    if step:
        with beside(query, lse, out if logits is None else logits):
            backend.observe_step(storage, past, query, out, lse, visibility.mask, scale, softcap, logits)
        return
    several = visibility.mask is not None and visibility.mask.shape[2] > 1
    first_query = storage.offset if several else None
    kv_heads = past.tail_keys.shape[1]
    moment = backend.query_moment(query, kv_heads, scale, first_query, past.length)
    storage.replace("query_moment", storage.query_moment + moment)
    if storage.score.term is not None:
        received = backend.column_statistic(
            storage.score.term, past, query, out, lse, visibility, scale, softcap, first_query,
            storage.config.anchors.query_stride,
        )  # fmt: skip
        storage.replace("statistic", storage.statistic + received)


def _learn_padding(storage: LayerStorage, past: Snapshot, mask: torch.Tensor) -> None:
    """The padding of a sequence is open until its first real token is encoded, and fixed from then on."""
    if storage.max_offset >= storage.coded_length:
        padding = padding_of(mask, past.tail_keys.shape[0])
        storage.replace("offset", torch.where(storage.offset >= storage.coded_length, padding, storage.offset))
        storage.max_offset = int(storage.offset.max())


def padding_of(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """Left padding of each sequence ``(batch,)``: keys before the first one that the last query sees."""
    last = mask[:, 0, -1]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    first = seen.to(torch.int8).argmax(-1)
    return torch.where(seen.any(-1), first, seen.shape[-1]).expand(batch).clone()

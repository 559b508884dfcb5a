"""A decode step within `torch.compile`: one opaque operator a layer, so that the model's graph is whole.

While a forward is traced, ``update`` of a compileable layer hands the new token on as it is (`NewToken`), and the
``"antkv"`` lane gives it to `decode_step`, whose Python runs in every step: it appends, encodes what has left the
window and attends, as outside of `torch.compile`. Nothing that Dynamo sees changes from step to step.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any
from weakref import WeakValueDictionary

import torch

_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()
# Compiled code may be captured in CUDA graphs around this operator, never with it.
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch._C.Tag, name, None)) is not None)
ELSEWHERE = (
    'a cache with compileable=True is compiled in the "antkv" lane only: call model.set_attn_implementation("antkv"), '
    "or make it without compileable; it holds the prompt already, so then call cache.reset() first"
)


class Ticket:
    """How compiled code names a layer: a number, and a tensor that keeps the operators of a layer in order."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        self.number, self.order = next(_NUMBERS), torch.zeros(1, device=device)
        torch._dynamo.mark_static_address(self.order)
        _LAYERS[self.number] = layer

    def __deepcopy__(self, memo: dict) -> Ticket | None:
        layer = memo.get(id(_LAYERS.get(self.number)))  # a copied layer has one of its own
        return None if layer is None else Ticket(layer, self.order.device)


class NewToken:
    """Keys or values of one token ``(batch, kv_heads, 1, dim)`` on their way from a layer's ``update`` to attention."""

    def __init__(self, ticket: Ticket, tensor: torch.Tensor) -> None:
        self.ticket, self.tensor = ticket, tensor

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(ELSEWHERE)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(ELSEWHERE)


def attend_new_token(
    query: torch.Tensor, key: NewToken, value: NewToken, mask: torch.Tensor | None, scale: float | None,
    softcap: float | None, sink_logit: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """What ``attend`` gives for that token's query, ``(batch, q_heads, 1, value_dim)``.

    Raises:
        ValueError: if gradients are asked for, which the operator would not see: while it is traced.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key.tensor, value.tensor)):
        raise ValueError(
            "a compiled step of AnTKVCache: queries or keys require grad, and gradients cannot flow through codes. "
            "Run the model under torch.no_grad() or model.generate(), or train with DynamicCache."
        )
    ticket = key.ticket
    return decode_step(query, key.tensor, value.tensor, mask, sink_logit, ticket.order, ticket.number, scale, softcap)


@torch.library.custom_op("antkv_hf::decode_step", mutates_args=("order",), tags=_TAGS)
def decode_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    sink_logit: torch.Tensor | None, order: torch.Tensor, layer: int, scale: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Adds a token to the layer of that number and answers its query ``(batch, q_heads, 1, head_dim)``.

    Raises:
        ValueError: as the layer's ``update``, and for a mask of another width. The layer has not changed then, and as
            the first layer is the first to be asked, no other has (but for anchors without a slot after many crops,
            which each layer finds by itself).
    """
    held = _LAYERS[layer]
    limit, length = held.get_max_length(), held.get_seq_length() + 1
    if mask is not None and mask.shape[-1] not in (limit, length):
        raise ValueError(
            f"the attention mask covers {mask.shape[-1]} keys, but the cache holds {length} with the new one and was "
            f"made for max_length={limit}: give a mask over so many, or none"
        )
    keys, _ = held.update(key, value)
    if mask is not None and _hides_padding_alone(mask, held, length):
        mask = None  # which kernels know from `offset`; the fastest takes no mask
    return keys.shared.attend(query, mask, scale=scale, softcap=softcap, sink_logit=sink_logit).contiguous()


_last = threading.local()  # the mask that was looked at, and what was found


def _hides_padding_alone(mask: torch.Tensor, held: Any, length: int) -> bool:
    """Whether a token's mask ``(batch or 1, 1, 1, columns)`` hides what the layer holds as left padding, and no more.

    Waits for the device, once a step: the first layer looks, and the others are given the same mask.
    """
    seen = (mask.data_ptr(), mask.shape, mask.stride(), length)
    if held.plan.layer_idx == 0 or getattr(_last, "seen", None) != seen:
        offset = held.storage.offset
        padding = torch.arange(length, device=offset.device) < offset.view(-1, 1, 1, 1)
        mask = mask[..., :length]
        if mask.dtype == torch.bool:
            alone = mask != padding
        else:  # what is added to logits may be less than a mask
            alone = torch.where(padding, mask < torch.finfo(mask.dtype).min / 2, mask == 0)
        _last.seen, _last.found = seen, tuple(mask.shape[1:3]) == (1, 1) and bool(alone.all())
    return _last.found


@decode_step.register_fake
def _(query, key, value, mask, sink_logit, order, layer, scale, softcap):
    return query.new_empty(*query.shape[:3], value.shape[3])

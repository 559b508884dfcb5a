"""One-shot evaluation protocols: attention over what the codes stand for, with errors that run from layer to layer.

A plain one-shot forward hides all error of a cache (attention sees the exact chunk), so quality is measured by one of

- **W0**: every key and value goes through the codec, a token's own included. Anchors are chosen with the whole window
  in view; they and the sinks are read back as stored. The harshest protocol, and the one that papers report.
- **S<n>** (S128 by default): causal streaming, what a user gets. The last n keys of each query are exact; older ones
  are codes, anchors or sinks. A token of a chunk is scored only by queries that come before the chunk leaves the
  window, and the best of each chunk become anchors.

Both are one attention function registered with transformers as "antkv_evaluation", for forwards with use_cache=False
and no padding. It uses the library's own codecs, storage of exact tokens and scores. A real cache read back chunk by
chunk (protocol "cache" in `perplexity`) is slower and a little better than S<n>: its window breathes between n and
n + chunk tokens.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..anchors import AnchorScore, get_score
from ..attention.backends import Encoded
from ..attention.reference_backend import REFERENCE
from ..cache.cache import AnTKVCache
from ..cache.interface import antkv_attention_forward, attention_implementation
from ..cache.layer import AnTKVLayer, LayerPlan
from ..codebook import AnTKVCodebook
from ..codecs import ChannelQuantizer, LayerCodec, ScalarScales
from ..config import AnTKVConfig
from ..exact_tokens import ExactTokens, sink_dtype
from ..reference.attention import Visibility, grouped
from ..reference.scores import column_statistic
from ..snapshot import Snapshot
from ..storage import ENCODE_BLOCK
from .chunk_anchors import best_of_chunks, last_queries
from .windowed import exact_with_lse, windowed_attention

NAME = "antkv_evaluation"


@dataclass(frozen=True)
class Protocol:
    """How a perplexity is measured; `name` is stated with every number.

    Args:
        name: ``FP`` (plain forward), ``W0``, ``S<n>`` or ``cache``.
        window: most recent keys that stay exact in a one-shot forward; 0 for W0, None for FP and cache.
    """

    name: str
    window: int | None = None

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """Reads a protocol's name; raises ValueError listing the names there are."""
        name = text.strip()
        if name.upper() == "FP":
            return cls("FP")
        if name.lower() == "cache":
            return cls("cache")
        if name.upper() == "W0":
            return cls("W0", 0)
        if match := re.fullmatch(r"[sS](\d+)", name):
            if int(match[1]) < 1:
                raise ValueError("protocol S0 has no window, so its tokens could not be scored; use W0")
            return cls(f"S{int(match[1])}", int(match[1]))
        raise ValueError(f"protocol {text!r} is unknown; choose FP, W0, S<window> such as S128, or cache")

    @property
    def one_shot(self) -> bool:
        """True for the protocols that this module's attention answers."""
        return self.window is not None


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in a one-shot forward: all that decides what is read back.

    Args:
        layer: index of the layer.
        query: ``(batch, q_heads, n, head_dim)`` after RoPE.
        keys, values: ``(batch, kv_heads, n, dim)``, keys after RoPE.
        window: most recent keys of each query that stay exact; 0 for W0.
        scale, softcap, sink_logit: of the attention, see `reference.attention`.
    """

    layer: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    window: int
    scale: float
    softcap: float | None = None
    sink_logit: torch.Tensor | None = None


class Read(NamedTuple):
    """What attention reads of old tokens.

    Args:
        keys, values: as they are read once coded, ``(batch, kv_heads, n, dim)`` float32, keys after RoPE.
        bias: what the logits of coded tokens get, ``(batch, q_heads, n)`` a query (`reference.code_bias`), or None.
        coded: bool ``(batch, kv_heads, n)``, the tokens that get it: all but anchors and sinks. Needed with `bias`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    coded: torch.Tensor | None = None


ReadBack = Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor] | Read]


class ProtocolEvaluator:
    """Gives a model the attention of a one-shot protocol for as long as `active` is entered.

    Args:
        model: any loaded causal language model that `AnTKVCache` accepts.
        protocol: W0 or S<n>.
        config, codebook: as for `AnTKVCache`; the same layers are quantized by the same codecs.
        read_back: another way to quantize, measured by the same protocol; of `config` only the layers count then.
        query_stride: every how many-th query scores a token far before it, as `AnchorConfig.query_stride`; by default
            all do, whatever the config says. S128 looks at no query that is far.

    Raises:
        ValueError: as `AnTKVCache`, or for a protocol that is not a one-shot one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        protocol: Protocol,
        config: AnTKVConfig | None = None,
        codebook: AnTKVCodebook | None = None,
        *,
        read_back: ReadBack | None = None,
        query_stride: int = 1,
    ):
        if protocol.window is None:
            raise ValueError(f"protocol {protocol.name} is no one-shot protocol; use W0 or S<window>")
        if read_back is not None and config is None:
            config = AnTKVConfig.preset("identity")
        cache = AnTKVCache(model.config, config, codebook)
        self.model, self.protocol, self.config = model, protocol, cache.antkv_config
        self.read_back, self.query_stride = read_back or self._read_back, query_stride
        self.plans: dict[int, LayerPlan] = {
            i: layer.plan for i, layer in enumerate(cache.layers) if isinstance(layer, AnTKVLayer)
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While entered, the model's forwards (with ``use_cache=False``) follow the protocol."""
        token = _ACTIVE.set(self)
        try:
            with attention_implementation(self.model, NAME):
                yield
        finally:
            _ACTIVE.reset(token)

    @torch.no_grad()
    def attend(self, layer: int, query, keys, values, scale: float, softcap=None, sink_logit=None) -> torch.Tensor:
        """Causal attention of a layer: query ``(batch, q_heads, n, dim)`` -> ``(batch, q_heads, n, value_dim)``."""
        window = self.protocol.window
        assert window is not None
        with torch.autocast(query.device.type, enabled=False):
            call = AttentionCall(layer, query, keys, values, window, scale, softcap, sink_logit)
            read = Read(*self.read_back(call))
            out = windowed_attention(
                query, keys, values, read.keys, read.values, window, scale, softcap, sink_logit, read.bias, read.coded
            )
        return out.to(query.dtype)

    def _read_back(self, call: AttentionCall) -> Read:
        """What the cache's own codecs, anchors and sinks give back."""
        keys, values = call.keys, call.values
        codec = self.plans[call.layer].codec(keys.device, keys.shape[1], keys.shape[3], values.shape[3])
        return read_back(
            codec, self.config, call.window, call.query, keys, values, call.scale, call.softcap, call.sink_logit,
            self.query_stride,
        )  # fmt: skip


_ACTIVE: contextvars.ContextVar[ProtocolEvaluator] = contextvars.ContextVar("antkv_evaluation")


def evaluation_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface; layers that a cache leaves unquantized are answered exactly."""
    evaluator = _ACTIVE.get(None)
    if evaluator is None:
        raise RuntimeError(f'attn_implementation "{NAME}" only works inside ProtocolEvaluator.active()')
    layer = getattr(module, "layer_idx", None)
    if layer not in evaluator.plans:
        return antkv_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries meet {key.shape[2]} keys: W0 and S<n> are one-shot protocols, call the model "
            "with use_cache=False (to measure through a cache, use the protocol 'cache')"
        )
    _check_causal(attention_mask, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = evaluator.attend(layer, query, key, value, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, evaluation_attention_forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def read_back(
    codec: LayerCodec, config: AnTKVConfig, window: int, query, keys, values, scale, softcap, sink_logit, stride=1
) -> Read:
    """Keys and values of all tokens as a cache gives them back once coded."""
    n, device = keys.shape[2], keys.device
    offset = torch.zeros(keys.shape[0], dtype=torch.int64, device=device)
    sinks = min(config.anchors.sinks, n)
    excluded = (torch.arange(n, device=device) < sinks).expand(keys.shape[:3])
    scales = _first_scales(codec, config, keys, values, sinks)
    coded = _encode(codec, keys, values, offset, scales, excluded)
    score = get_score(config.anchors.score)
    index = None
    if config.anchors.enabled and score is not None:
        scaling = 1.0 if codec.rotary is None else codec.rotary.scaling
        errors = (coded.key_error * scaling**2, coded.value_error)
        index = choose_anchors(score, config, window, query, keys, values, errors, scale, softcap, sink_logit, stride)
        if coded.scales is not None:
            chosen = torch.zeros(*keys.shape[:2], n + 1, dtype=torch.bool, device=device)
            chosen.scatter_(2, index.masked_fill(index < 0, n), True)
            coded = _encode(codec, keys, values, offset, scales, excluded | chosen[:, :, :n])
    exact: list[ExactTokens] = []
    center = codec.key_center(coded.scales)
    if sinks:
        first = torch.arange(sinks, device=device).expand(*keys.shape[:2], sinks)
        exact.append(_store(first, keys, values, sink_dtype(keys.dtype, codec), codec, offset, center))
    if index is not None:
        dtype = torch.int8 if config.anchors.dtype == "int8" else torch.float16
        exact.append(_store(index, keys, values, dtype, codec, offset, center))
    empty = keys[:, :, :0].float(), values[:, :, :0].float()
    snapshot = Snapshot(codec, coded.key_codes, coded.value_codes, tuple(exact), *empty, offset, scales=coded.scales)
    remains = torch.ones(*keys.shape[:2], n + 1, dtype=torch.bool, device=device)  # the last takes empty slots
    for tokens in exact:
        remains.scatter_(2, torch.where(tokens.positions < 0, n, tokens.positions).long(), False)
    bias = codec.code_bias(grouped(query, keys.shape[1]), scale)
    return Read(*snapshot.dense(), None if bias is None else bias.flatten(1, 2), remains[:, :, :n])


def _encode(codec: LayerCodec, keys, values, offset: torch.Tensor, scales, excluded: torch.Tensor) -> Encoded:
    """All tokens coded, a block of them at a time."""
    parts = []
    for start in range(0, keys.shape[2], ENCODE_BLOCK):
        part = slice(start, start + ENCODE_BLOCK)
        parts.append(
            REFERENCE.encode(codec, keys[:, :, part], values[:, :, part], start, offset, scales, excluded[:, :, part])
        )
    found = parts[0].scales
    for i, coded in enumerate(parts[1:], 1):
        if found is not None and coded.scales is not None:
            found = found.append(coded.scales, i * ENCODE_BLOCK)
    key_codes, value_codes, key_error, value_error = (torch.cat(tensors, 2) for tensors in list(zip(*parts))[:4])
    return Encoded(key_codes, value_codes, key_error, value_error, found)


def _first_scales(codec: LayerCodec, config: AnTKVConfig, keys, values, sinks: int) -> ScalarScales | None:
    """Means and deviations that a cache takes from the first chunk with any but sinks; None where it takes none."""
    if not isinstance(codec.key, ChannelQuantizer):
        return None
    stop = min((sinks // config.chunk + 1) * config.chunk, keys.shape[2])
    index = torch.arange(stop, device=keys.device).expand(keys.shape[0], stop)
    plain = codec.plain_keys(keys[:, :, :stop], index)
    unknown = torch.zeros(keys.shape[0], dtype=torch.bool, device=keys.device)
    return ScalarScales.none(keys, values).learn(plain, values[:, :, :stop], index >= sinks, unknown)


def choose_anchors(
    score: AnchorScore, config: AnTKVConfig, window: int, query, keys, values, errors, scale, softcap, sink_logit,
    stride: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Positions of the anchors ``(batch, kv_heads, m)`` int64, -1 for an empty slot.

    With window 0 (W0) the whole text is one chunk that all queries score. Otherwise chunk c is scored by queries up to
    ``(c + 1) * chunk + window - 1``, those that a streaming cache has seen when it encodes the chunk. Sinks are never
    anchors.
    """
    n = keys.shape[2]
    chunk = config.chunk if window else n
    last, q, statistic = last_queries(n, chunk, window, keys.device), grouped(query, keys.shape[1]), None
    if score.term is not None:
        out, lse = exact_with_lse(query, keys, values, scale, softcap, sink_logit)
        limit = last if window else None
        view = Visibility(None, n > 1, n, n)
        statistic = column_statistic(
            score.term, q, keys, values, out, lse, view, 0, scale, softcap, last_query=limit, stride=stride
        )
    index, best = best_of_chunks(score, config, chunk, q, keys, values, errors, statistic, last, scale)
    return index.masked_fill(best == float("-inf"), -1)


def _store(index, keys, values, dtype, codec: LayerCodec, offset, center) -> ExactTokens:
    """Exact tokens at `index` ``(batch, kv_heads, m)`` (-1: empty) of all keys and values, as a cache stores them."""
    slots = index.clamp_min(0).unsqueeze(-1)
    kept_keys, kept_values = (t.gather(2, slots.expand(*index.shape, t.shape[-1])) for t in (keys, values))
    return ExactTokens.store(index, kept_keys, kept_values, dtype, codec, offset, center)


def _check_causal(mask: torch.Tensor | None, n: int) -> None:
    """Raises ValueError for a mask that is not plainly causal (padding, several texts in one row)."""
    if mask is None:
        return
    visible = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril_()
    if not (visible[..., :n] == causal).all():
        raise ValueError("evaluation needs windows of one length without padding; cut the text with token_windows")

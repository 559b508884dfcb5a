"""Perplexity under the protocols of `protocols`, and through a cache that is really filled and read back."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import interface
from ..cache.cache import AnTKVCache
from ..codebook import AnTKVCodebook
from ..config import AnTKVConfig
from .baselines import cache_bits, quantized_cache
from .protocols import Protocol, ProtocolEvaluator

CHUNK = 128  # tokens at a time through a cache
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationRow:
    """One measured perplexity, with everything that decided it.

    Args:
        method: what holds keys and values, e.g. ``d8b8/d8b8`` (keys/values) or ``quanto-int4``.
        protocol: ``FP``, ``W0``, ``S<n>`` or ``cache`` (see `protocols`).
        text: name of the text.
        windows, window: number of windows and tokens in each; counted: tokens at the end of each window whose
            loss counts (all but the first if the whole window counts).
        perplexity: exp of the mean negative log-likelihood a token, in nats.
        ratio: perplexity over that of the plain forward on the same tokens; None if FP was not measured.
        bits: bits an element of the coded tokens really takes in a cache filled with one window (codes, anchors,
            positions, scales, sinks); bits_with_window: of all tokens, the exact window and running scores included.
        seconds: wall-clock time of the measurement.
    """

    method: str
    protocol: str
    text: str
    windows: int
    window: int
    counted: int
    perplexity: float
    ratio: float | None
    bits: float
    bits_with_window: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, rounded to what the measurement can tell apart."""
        digits = {"perplexity": 4, "ratio": 4, "bits": 3, "bits_with_window": 3, "seconds": 1}
        row = dict(vars(self))
        return {k: round(v, digits[k]) if k in digits and v is not None else v for k, v in row.items()}


def evaluate(
    model: PreTrainedModel,
    tokenizer,
    texts: Sequence[str] | torch.Tensor,
    codebook: AnTKVCodebook | None = None,
    config: AnTKVConfig | None = None,
    *,
    protocols: Sequence[str] | None = None,
    window: int = 2048,
    windows: int = 12,
    last: int | None = None,
    baselines: Sequence[str] = (),
    text_name: str = "text",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[EvaluationRow]:
    """Perplexity of a codebook (or config) and of baselines on one text, every protocol on the same tokens.

    Args:
        model: a loaded causal language model; its attention implementation is put back afterwards.
        tokenizer: cuts `texts` into windows; may be None if `texts` are token windows already.
        texts: documents, or token windows ``(count, window)`` int64.
        codebook, config: as for `AnTKVCache`. With neither, only FP and baselines are measured.
        protocols: names as in `Protocol.parse`; by default FP, W0, S<config.window> and cache. A row of protocol S<n>
            has an exact window of n tokens, whatever the config says.
        window, windows: tokens of a window, and how many (fewer if the text is short).
        last: count only the last n tokens of each window (long-context rows); all by default.
        baselines: transformers' own quantized caches, ``quanto-int4``, ``quanto-int2``, ``hqq-int4``, ...: always
            measured by the protocol "cache".
        text_name: named in every row.
        batch_size: windows that run together.
        progress: called with (row's name, windows done, windows).

    Returns:
        Rows in the order FP, protocols, baselines. FP is measured whenever it is asked for; ratios need it.

    Raises:
        ValueError: unknown protocol or baseline, text shorter than one window, `last` that does not fit, or a
            codebook of another model.
        ImportError: a baseline whose package is not installed.
    """
    ids = _windows(tokenizer, texts, window, windows)
    count, length = ids.shape
    if last is not None and not 0 < last < length:
        raise ValueError(f"last={last} must lie between 1 and {length - 1}, one less than a window of {length} tokens")
    config = config or (codebook.config if codebook is not None else None)
    names = protocols or (["FP"] if config is None else ["FP", "W0", f"S{config.window}", "cache"])
    wanted = [Protocol.parse(name) for name in names]
    if config is None and (beyond := [p.name for p in wanted if p.name != "FP"]):
        raise ValueError(f"protocol {beyond[0]} needs a codebook or a config; only FP and baselines do without")
    makers = {name: quantized_cache(name, model.config) for name in baselines}  # fails before any long work

    rows: list[EvaluationRow] = []
    plain = partial(one_shot_losses, model, last=last)

    def measure(method: str, protocol: str, bits: tuple[float, float], run: Callable[..., torch.Tensor]) -> None:
        start = time.perf_counter()
        losses = []
        for first in range(0, count, batch_size):
            losses.append(run(ids[first : first + batch_size].to(model.device)).flatten().cpu())
            if progress is not None:
                progress(f"{method} {protocol}", min(first + batch_size, count), count)
        perplexity = math.exp(torch.cat(losses).double().mean().item())
        exact = perplexity if protocol == "FP" else next((r.perplexity for r in rows if r.protocol == "FP"), None)
        counted = length - 1 if last is None else last
        ratio = None if exact is None else perplexity / exact
        seconds = time.perf_counter() - start
        rows.append(
            EvaluationRow(method, protocol, text_name, count, length, counted, perplexity, ratio, *bits, seconds)
        )

    with torch.no_grad():
        dense_bits = 8.0 * torch.empty(0, dtype=model.dtype).element_size()
        if any(p.name == "FP" for p in wanted):
            measure(str(model.dtype).removeprefix("torch."), "FP", (dense_bits, dense_bits), plain)
        for protocol in (p for p in wanted if p.name != "FP"):
            assert config is not None
            here = config.replace(window=protocol.window) if protocol.window else config
            make = partial(AnTKVCache, model.config, here, codebook)
            coded = make
            if protocol.window == 0 and length < here.window + here.chunk:  # a cache would hold all of it exactly
                coded = partial(AnTKVCache, model.config, here.replace(window=1), codebook)
            bits = real_bits(model, ids[:1], coded)
            if protocol.window == 0:  # no token is exact for being recent
                bits = bits[0], bits[0]
            method = here.name_codec(layer.plan.layer_idx for layer in make().quantized_layers)
            if protocol.one_shot:
                with ProtocolEvaluator(model, protocol, here, codebook).active():
                    measure(method, protocol.name, bits, plain)
            else:
                with fast_lane(model):
                    measure(method, protocol.name, bits, lambda x, make=make: cache_losses(model, x, make(), last))
        for name, fresh in makers.items():
            bits = real_bits(model, ids[:1], fresh)
            measure(name, "cache", bits, lambda x, fresh=fresh: cache_losses(model, x, fresh(), last))
    return rows


def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    protocol: str = "FP",
    codebook: AnTKVCodebook | None = None,
    config: AnTKVConfig | None = None,
    **options: Any,
) -> float:
    """Perplexity of one protocol on token windows ``(count, window)``; `options` as in `evaluate`."""
    return evaluate(model, None, windows, codebook, config, protocols=[protocol], **options)[0].perplexity


@torch.no_grad()
def one_shot_losses(model: PreTrainedModel, ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """Token losses of `ids` ``(batch, n)`` in one plain forward, or one inside `ProtocolEvaluator.active`.

    Returns:
        float32 ``(batch, n - 1)``, or the last `last` of them.
    """
    keep = ids.shape[1] if last is None else last + 1
    logits = model(ids, use_cache=False, logits_to_keep=keep).logits
    return _losses(logits[:, :-1], ids[:, ids.shape[1] - keep + 1 :])


@torch.no_grad()
def cache_losses(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, last: int | None = None, chunk: int = CHUNK
) -> torch.Tensor:
    """Token losses of `ids` ``(batch, n)`` when `cache` is filled and read back `chunk` tokens at a time.

    Returns:
        float32 ``(batch, n - 1)``, or the last `last` of them.
    """
    n = ids.shape[1]
    wanted = n - 1 if last is None else last
    losses = []
    for start in range(0, n, chunk):
        part = ids[:, start : start + chunk]
        keep = part.shape[1] if start + part.shape[1] > n - 1 - wanted else 1
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        following = ids[:, start + 1 : start + chunk + 1]
        if keep == part.shape[1] and following.shape[1]:
            losses.append(_losses(logits[:, : following.shape[1]], following))
    return torch.cat(losses, 1)[:, -wanted:]


def real_bits(model: PreTrainedModel, ids: torch.Tensor, make: Callable[[], Cache]) -> tuple[float, float]:
    """Bits an element of coded tokens, and of all tokens, in a real cache filled with `ids` in 128-token chunks."""
    cache = make()
    with fast_lane(model) if isinstance(cache, AnTKVCache) else contextlib.nullcontext():
        cache_losses(model, ids.to(model.device), cache, last=1)
    if isinstance(cache, AnTKVCache):
        footprint = cache.memory_footprint()
        return footprint.bits_per_element, footprint.bits_per_element_with_window
    return cache_bits(cache)


def _losses(logits: torch.Tensor, targets: torch.Tensor, rows: int = 512) -> torch.Tensor:
    """Negative log-likelihoods ``(batch, n)`` in float32, few rows at a time: a vocabulary is wide."""
    parts = [
        cross_entropy(logits[:, i : i + rows].float().transpose(1, 2), targets[:, i : i + rows], reduction="none")
        for i in range(0, targets.shape[1], rows)
    ]
    return torch.cat(parts, 1)


def fast_lane(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """The attention implementation "antkv" for a while: it serves every family that AnTKVCache accepts."""
    return interface.attention_implementation(model, interface.NAME)


def _windows(tokenizer, texts: Sequence[str] | torch.Tensor, window: int, windows: int) -> torch.Tensor:
    if isinstance(texts, torch.Tensor):
        if texts.ndim != 2 or texts.shape[1] < 2:
            raise ValueError(f"token windows have shape {tuple(texts.shape)}; give (count, window) with window >= 2")
        return texts[:windows]
    from ..texts import token_windows

    return token_windows(tokenizer, list(texts), window, count=windows)

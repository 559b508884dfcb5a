"""Lanes of `decoding` with generate's own compile (StaticCache, and ours for it), and transformers' QuantizedCache."""

from __future__ import annotations

import copy
from functools import partial

from decoding import Lane, random_keys, rewind_static, static_cache
from transformers import StaticCache
from transformers.cache_utils import Cache

from antkv_hf import AnTKVCodebook
from antkv_hf.evaluation.baselines import quantized_cache, tensor_bytes

STATIC, COMPILEABLE = "static", "compileable"


def rival_lane(name: str, model, codebook: AnTKVCodebook) -> Lane:
    """The lane called ``static``, ``compileable`` (ours, as transformers compiles it) or ``<quanto or hqq>-int<bits>``.

    Raises:
        ValueError: for another name.
        ImportError: if a quantizer's package is not installed.
    """
    if name == STATIC:
        # generate compiles the forward in the first round and captures it in CUDA graphs.
        # Its mask makes transformers repeat a layer's keys and values for every query head: group + 1 are too few.
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        return Lane(
            "StaticCache, compiled", "sdpa", _static(model), _shorten, _batch_of, warm_ups=1, slow=True,
            layers_beside=2 * group + 1,
        )  # fmt: skip
    if name == COMPILEABLE:
        return Lane(
            "AnTKV, generate's compile", "antkv", partial(static_cache, model, codebook, compileable=True),
            rewind_static, lambda cache: cache.layers[0].batch_size, warm_ups=1, slow=True,
        )  # fmt: skip
    make = quantized_cache(name, model.config)

    def filled(batch: int, context: int, room: int) -> Cache:
        cache = make()
        for i in range(len(cache.layers)):
            cache.update(*random_keys(model, batch, context), i)  # quantizes them all at once
        cache.filled = [copy.copy(layer) for layer in cache.layers]
        cache.batch = batch
        return cache

    # A layer's keys and values are decoded in every step, and joined with the exact ones; hqq's take more room.
    return Lane(
        f"QuantizedCache, {name}", "sdpa", filled, _restore, lambda cache: cache.batch, warm_ups=1, slow=True,
        layers_beside=8 if name.startswith("hqq") else 4,
    )  # fmt: skip


def quantized_bytes(cache: Cache) -> int:
    """Bytes that a `QuantizedCache` holds."""
    held = [(x._quantized_keys, x._quantized_values, x.keys, x.values) for x in cache.layers]
    return tensor_bytes(held)


def _static(model):
    def make(batch: int, context: int, room: int) -> Cache:
        cache = StaticCache(config=model.config, max_cache_len=context + room)
        for i in range(len(cache.layers)):
            cache.update(*random_keys(model, batch, context), i)
        return cache

    return make


def _batch_of(cache: Cache) -> int:
    return cache.layers[0].keys.shape[0]


def _shorten(cache: Cache, tokens: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.sub_(tokens)


def _restore(cache: Cache, tokens: int) -> None:
    """As it was filled: a quantized layer replaces its tensors, and changes none."""
    cache.layers = [copy.copy(layer) for layer in cache.filled]

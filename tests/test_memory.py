"""The memory that `memory_footprint` reports is the memory that is really there."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from transformers import DynamicCache

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec


@pytest.fixture(scope="module")
def shapes():
    """SmolLM2's cache shapes on random weights with a small body: 30 layers, 3 kv heads of 64."""
    model = tiny_llama(
        num_hidden_layers=30, num_attention_heads=3, num_key_value_heads=3, head_dim=64, hidden_size=48,
        intermediate_size=48,
    )  # fmt: skip
    return model, random_codebook(model, AnTKVConfig.preset("1bit"))


def fill(model, cache, tokens: int, dtype=torch.float32, batch: int = 1) -> None:
    """Feeds random queries, keys and values through update and attention, as a model's layers do."""
    g = torch.Generator().manual_seed(0)
    for i in range(len(cache.layers)):
        query, keys, values = (torch.randn(batch, 3, tokens, 64, generator=g).to(dtype) for _ in range(3))
        keys, values = cache.update(keys, values, i)
        torch.nn.functional.scaled_dot_product_attention(query[:, :, -64:], keys, values)


def live_tensor_bytes(ignore: set[int]) -> int:
    """Bytes of all tensor storages alive in the process, each counted once, as the allocator holds them."""
    gc.collect()
    seen: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and type(item) is torch.Tensor and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.data_ptr() not in ignore:
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def live_pointers() -> set[int]:
    gc.collect()
    return {
        t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"
    }


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_at_least_seven_times_smaller_at_2048_tokens(shapes, dtype):
    model, codebook = shapes
    cache = AnTKVCache(model.config, codebook=codebook)
    dense = DynamicCache(config=model.config)
    fill(model, cache, 2048, dtype)
    fill(model, dense, 2048, dtype)
    dense_bytes = sum(t.numel() * t.element_size() for layer in dense.layers for t in (layer.keys, layer.values))
    footprint = cache.memory_footprint()
    assert footprint.tokens == 2048 and footprint.dense_bytes == dense_bytes
    assert footprint.compression >= 7
    assert footprint.coded_tokens == 1920
    assert footprint.bits_per_element <= 1.25
    assert footprint.tables > 0 and "tables, shared by all caches" in str(footprint)


def test_footprint_agrees_with_live_tensors_within_ten_percent(shapes):
    model, codebook = shapes
    fill(model, AnTKVCache(model.config, codebook=codebook), 10)  # places the shared tables
    before = live_pointers()
    cache = AnTKVCache(model.config, codebook=codebook)
    fill(model, cache, 4096)
    measured, reported = live_tensor_bytes(before), cache.memory_footprint().total
    assert abs(measured - reported) <= 0.1 * reported, (measured, reported)


def test_many_decode_steps_do_not_leak(shapes):
    model, codebook = shapes
    cache = AnTKVCache(model.config, codebook=codebook)
    fill(model, cache, 300)
    gone = weakref.ref(cache.layers[0].storage.tail_keys)
    before = cache.memory_footprint()
    for _ in range(256):
        fill(model, cache, 2)
    after = cache.memory_footprint()
    gc.collect()
    assert gone() is None, "an old tail is still alive"
    assert after.tokens == before.tokens + 512
    assert after.window <= before.window * 256 / 172 + 1
    grown = (after.codes - before.codes) / (30 * 3 * 16)  # 16 bytes of codes a token, layer and kv head
    assert grown == after.coded_tokens - before.coded_tokens


@pytest.mark.parametrize(
    ("config", "steps", "codes"),
    [
        (
            AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=10, chunk=20),
            2500,
            2500 * 2,
        ),  # a byte for keys and for values
        # 2 bytes each and 4 for a value's scale and zero; those of 8 channels of keys and where a group starts
        (AnTKVConfig.preset("ott-2bit", group=32, window=10, chunk=32), 2400, 2400 * 8 + 75 * (4 * 8 + 4)),
    ],
    ids=("codebook", "ott-2bit"),
)
def test_ten_thousand_decode_steps(config, steps, codes):
    """One small layer: codes grow by what they must, everything else stays, and no Python object is left behind."""
    model = tiny_llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    book = random_codebook(model, config) if isinstance(config.key, VQSpec) else None
    cache = AnTKVCache(model.config, config, book)
    g = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(1, 1, 1, 8, generator=g) for _ in range(3))
    ignore, seen = live_pointers(), []
    for step in range(1, 4 * steps + 1):
        handles = cache.update(keys, values, 0)
        if step % 50 == 0:  # attention over thousands of codes takes most of the time
            torch.nn.functional.scaled_dot_product_attention(query, *handles)
        if step % steps == 0:  # a multiple of the chunk: the tail is as long each time
            seen.append((cache.memory_footprint(), live_tensor_bytes(ignore), len(gc.get_objects())))
    for (before, bytes_before, objects_before), (after, bytes_after, objects_after) in pairwise(seen[1:]):
        assert after.tokens == before.tokens + steps and after.coded_tokens == before.coded_tokens + steps
        assert (after.window, after.scores, after.sinks) == (before.window, before.scores, before.sinks)
        assert after.codes - before.codes == codes
        assert bytes_after - bytes_before == after.total - before.total
        assert objects_after - objects_before < 50


def test_two_thousand_steps_of_a_model():
    """Beside what the footprint counts, a token leaves its id: 8 bytes, by which the next prompt is compared."""
    model = tiny_llama(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8, hidden_size=8,
        intermediate_size=8,
    )  # fmt: skip
    config = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=10, chunk=20)
    book = random_codebook(model, config)
    token, seen = torch.tensor([[5]]), []
    other = AnTKVCache(model.config, codebook=book)
    for tokens in (token.expand(1, 2000), token):  # places what all caches of the model share, angles too
        model(tokens, past_key_values=other)
    cache, ignore = AnTKVCache(model.config, codebook=book), live_pointers()
    for step in range(1, 2101):
        model(token, past_key_values=cache)
        if step % 700 == 0:
            seen.append(live_tensor_bytes(ignore) - cache.memory_footprint().total)
    assert cache._guard.length == 2100
    assert all(after - before <= 10 * 700 for before, after in pairwise(seen)), seen
    assert seen[-1] - seen[0] >= 8 * 1400 - 8 * 128, "the ids are there, and live_tensor_bytes sees them"


def test_tables_are_shared_by_the_caches_of_a_model(shapes):
    model, codebook = shapes
    caches = [AnTKVCache(model.config, codebook=codebook) for _ in range(3)]
    for cache in caches:
        fill(model, cache, 5)
    codecs = {id(cache.layers[7].storage.codec) for cache in caches}
    assert len(codecs) == 1

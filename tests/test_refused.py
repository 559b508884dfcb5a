"""What a forward is refused for leaves every layer as it was, those too that transformers keeps before ours."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_families import build

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec

CONFIG = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=8, chunk=8)
HELD = 20  # tokens before the step that is refused
LIMIT = 30  # max_length where that is what is tried


def tokens(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=("llama", "gemma3_text", "qwen3_next"))
def model(request):
    """A layer that transformers keeps comes first: skipped, sliding window, linear attention."""
    return tiny_llama() if request.param == "llama" else build(request.param).model


def fresh(model, **options) -> AnTKVCache:
    config = CONFIG.replace(skip_layers=(0,)) if model.config.model_type == "llama" else CONFIG
    return AnTKVCache(model.config, config, random_codebook(model, config), **options)


def state(cache: AnTKVCache) -> list[torch.Tensor]:
    """Everything that the layers hold, by value."""
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        held = layer.storage.tensors() if hasattr(layer, "storage") else vars(layer)
        for value in held.values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part.clone() if isinstance(part, torch.Tensor) else torch.tensor(part) for part in parts
                      if isinstance(part, (torch.Tensor, int))]  # fmt: skip
    return found


@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("grad", "keys require grad"),
        ("max_length", f"max_length={LIMIT} tokens, but {HELD} cached and 11 new ones are 31"),
        ("batch", "batch size changed from 1 to 3; call cache.reset"),
        ("bfloat16", "keys moved from torch.float32 on cpu to torch.bfloat16"),
        ("nothing", "got 0 new tokens with 20 cached"),
    ],
)
def test_a_refused_step_changes_no_layer(model, what, message):
    if what == "bfloat16" and model.config.model_type == "qwen3_next":
        pytest.skip("linear attention takes another dtype as it comes")
    cache = fresh(model, max_length=LIMIT if what == "max_length" else None)
    model(tokens(HELD), past_key_values=cache)
    before = state(cache)
    other = copy.deepcopy(model)
    if what == "grad":
        other.requires_grad_(True)
    if what == "bfloat16":
        other.bfloat16()
    step = tokens({"max_length": 11, "nothing": 0}.get(what, 2), batch=3 if what == "batch" else 1, seed=1)
    with pytest.raises(ValueError, match=message):
        other(step, past_key_values=cache)
    after = state(cache)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    expected = fresh(model, max_length=cache.max_length)
    model(tokens(HELD), past_key_values=expected)
    step = tokens(3, seed=2)
    logits = [model(step, past_key_values=held).logits for held in (cache, expected)]
    assert torch.equal(*logits)
    assert {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")} == {HELD + 3}


@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes")
def test_a_reset_cache_is_as_a_fresh_one(model):
    """transformers 5.17 only zeroes the layers that it keeps, and then concatenates to them."""
    cache = fresh(model)
    for n, seed in ((HELD, 0), (HELD + 5, 1), (4, 2)):
        cache.reset()
        assert cache.memory_footprint().tokens == 0
        expected = fresh(model)
        for step in tokens(n, seed=seed).split(n - 1, 1):
            assert torch.equal(*(model(step, past_key_values=held).logits for held in (cache, expected)))
        lengths = ([x.get_seq_length() for x in held.layers if hasattr(x, "keys")] for held in (cache, expected))
        assert len({tuple(found) for found in lengths}) == 1


def test_keys_and_values_of_another_size():
    llama = tiny_llama()
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("identity"))
    llama(tokens(HELD), past_key_values=cache)
    before, good = state(cache), torch.randn(1, 2, 1, 16)
    with pytest.raises(ValueError, match="value size changed from 16 to 8: this cache belongs to another model"):
        cache.update(good, good[..., :8], 0)
    with pytest.raises(ValueError, match="keys moved from torch.float32 on cpu to torch.float16"):
        cache.update(good.half(), good, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, state(cache), strict=True))
    llama(tokens(1), past_key_values=cache)


def test_an_empty_kept_layer_is_compared_with_no_other(llama):
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("identity", skip_layers=(0,)))
    cache.update(*torch.randn(2, 1, 2, 5, 16), 1)
    other = torch.randn(2, 1, 4, 5, 8, dtype=torch.float16)  # heads, size and dtype of its own
    cache.update(*other, 0)
    assert torch.equal(cache.layers[0].keys, other[0])
    with pytest.raises(ValueError, match="kv heads and head size changed from 4 x 8 to 2 x 16"):
        cache.update(*torch.randn(2, 1, 2, 1, 16), 0)


def test_a_model_of_more_layers():
    llama, deeper = tiny_llama(), tiny_llama(num_hidden_layers=5)
    config = AnTKVConfig.preset("identity")
    cache = AnTKVCache(llama.config, config)
    with pytest.raises(ValueError, match=r"Of the 20 tokens of this one, 20 may be that model's: call cache.reset\(\)"):
        deeper(tokens(HELD), past_key_values=cache)
    cache.reset()
    llama(tokens(HELD), past_key_values=cache)
    before, many = state(cache), torch.randn(1, 2, HELD, 16)
    with pytest.raises(ValueError, match="layer_idx 3 is beyond the 3 layers of this cache"):
        cache.update(many, many, 3)  # as many as it holds, which are its own
    assert all(torch.equal(a, b) for a, b in zip(before, state(cache), strict=True))
    with pytest.raises(ValueError, match=r"Of the 25 tokens of this one, 5 may be that model's: call cache.reset\(\)"):
        deeper(tokens(5), past_key_values=cache)
    good = torch.randn(1, 2, 1, 16)
    with pytest.raises(ValueError, match="layer_idx -1 is beyond the 3 layers"):
        cache.update(good, good, -1)
    empty = AnTKVCache(llama.config, config)
    with pytest.raises(ValueError, match=r"layer_idx 3 is beyond the 3 layers.*model.config, \.\.\.\)$"):
        empty.update(good, good, 3)


def test_a_mask_of_another_size(llama):
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("identity"))
    llama(tokens(HELD), past_key_values=cache)
    with pytest.raises(ValueError, match=r"covers 9 keys, but the cache holds 24: .*call cache\.reset\(\) first"):
        llama(tokens(4), past_key_values=cache, attention_mask=torch.zeros(1, 1, 4, 9))
